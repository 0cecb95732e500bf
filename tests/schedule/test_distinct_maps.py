"""The index maps of deduplicated steps against rows that are written out one by one."""

from __future__ import annotations

import pytest
import torch

from moe_overlap.agreement.distinct import distinct_plan
from moe_overlap.schedule.distinct_maps import UNUSED, TokenMaps, slot_groups
from tests.agreement.test_distinct import CUTS, chunk_of, exchange_of
from tests.strategies import make_routing


@pytest.mark.parametrize("local", [1, 2, 5, 8, 16, 31])
def test_groups_of_slots_are_those_of_the_cut(local):
    ids = [torch.arange(local, dtype=torch.int32)[:, None]]
    for chunks in range(1, 17):
        plan = distinct_plan(exchange_of(ids, local, 0), chunks, "experts")
        groups = slot_groups(torch.cat([ids[0][:, 0], torch.tensor([UNUSED], dtype=torch.int32)]), plan)
        assert groups.dtype == torch.int32 and groups[-1] >= chunks
        assert groups[:-1].tolist() == [chunk_of(plan, local, slot, slot) for slot in range(local)]


@pytest.mark.parametrize("kind", ["uniform", "with_unused", "one_expert", "nobody"])
@pytest.mark.parametrize(("chunks", "by"), CUTS)
def test_metadata_are_the_choices_of_each_row_by_rank_and_token(chunks, by, kind):
    world, local, top_k = 3, 4, 5
    given = [make_routing(kind, count, world * local, top_k, seed=count) for count in (9, 40, 0)]
    ids = [one for one, _ in given]
    for rank, (slots, weights) in enumerate(given):
        found, factors = TokenMaps(distinct_plan(exchange_of(ids, world * local, rank), chunks, by), slots).metadata(
            weights
        )
        wanted = []
        for target in [*(other for other in range(world) if other != rank), rank]:
            for row, row_weights in zip(slots.tolist(), weights.tolist(), strict=True):
                here = {s % local: w for s, w in zip(row, row_weights, strict=True) if s >= 0 and s // local == target}
                wanted += [sorted(here.items())] if here else []
        assert len(found) == len(wanted)
        for got, factor, want in zip(found.tolist(), factors.tolist(), wanted, strict=True):
            assert [(s, w) for s, w in zip(got, factor, strict=True) if s >= 0] == want
            assert all(w == 0 for s, w in zip(got, factor, strict=True) if s < 0)
