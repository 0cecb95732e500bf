"""The planner in a benchmark: the rows beside its choice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_overlap import MoELayer
from moe_overlap.commands.bench.planned import AsItIs, mirrored
from moe_overlap.planning.pair import pair_of
from moe_overlap.planning.search import search
from moe_overlap.planning.window import Chunking, Window
from moe_overlap.schedule.builders import deduplicate, serial, shortcut
from moe_overlap.schedule.check import check
from tests.layers import D, F, tokens
from tests.ranks import virtual_world

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


def test_a_plain_probe_stays_plain_where_a_pair_by_itself_would_not():
    """Else the wire's figures come from fewer bytes than they are held against."""

    def run(me):
        layer = MoELayer(D, F, 8, 6, transport=me.transport(), dedup="on", dtype=torch.float64)
        texts = []
        for pair in (serial(), AsItIs.of(serial()), AsItIs.of(deduplicate(serial()))):
            layer.schedule = pair
            layer(tokens(9, me.rank))
            texts.append(layer.stats().schedule)
        return texts

    assert virtual_world(2).run(run) == [["P M D0 O E0 C0 Or U", "P D0 E0 C0 U", "P M D0 O E0 C0 U"]] * 2
