"""The planner in a benchmark: the rows beside its choice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moe_overlap.auto.planned import pair_of
from moe_overlap.commands.bench.planned import mirrored
from moe_overlap.planning.search import search
from moe_overlap.planning.window import Chunking, Window
from moe_overlap.schedule.builders import deduplicate, shortcut
from moe_overlap.schedule.check import check

NUM_OPS = 3  # beside the exchanges of position 2


@pytest.mark.parametrize("own", [True, False])
def test_the_mirror_has_the_ops_the_other_way_round(own):
    """All of them fit under the dispatch, with the rows that stay, which are no op of the block."""
    cut = Chunking(chunks=1, by="tokens", first_s=(9.0,), experts_s=(1.0,), second_s=(0.1,))
    window = Window(phase="forward", head_s=0.1, tail_s=0.1, ops_s=(1.0,) * (NUM_OPS + own), chunkings=(cut,),
                    metadata_s=0.1 if own else None)  # fmt: skip
    best = search(window)[0]
    assert best.ops_before == (NUM_OPS + own,)
    asked = deduplicate if own else lambda pair: pair
    model = SimpleNamespace(case="scmoe_pos2", position=2, as_asked=asked,
                            window_pair=lambda slot, **cut: shortcut(2, slot, **cut))  # fmt: skip
    pair = pair_of(best, None, num_ops=NUM_OPS, op_verb="B")
    plan = SimpleNamespace(planned=SimpleNamespace(candidates={"forward": [best]}, pair=pair))
    mirror = mirrored(model, plan)
    check(mirror)
    assert mirror.backward == asked(shortcut(2, NUM_OPS)).backward and mirror.forward == pair.forward
