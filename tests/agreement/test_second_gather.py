"""The second gather of a deduplicated step whose copies of experts were chosen from its counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_overlap.agreement.cost import second_gather_cost
from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.distinct import distinct_plan
from moe_overlap.agreement.second_gather import pairs_of, with_pairs
from moe_overlap.errors import PlanMismatch
from moe_overlap.placement import Placement
from tests.equality import Decides
from tests.layers import E, make, tokens
from tests.ranks import virtual_world


def seen(me, calls):
    """The last step of a layer on this rank, and the bytes beside rows that its forward calls sent."""
    layer = make(me.transport(), placement=Placement.identity(E, me.world_size), dedup="on")
    layer.dispatcher.rule = Decides()
    with torch.no_grad():
        for counts in calls:
            layer(tokens(counts[me.rank], me.rank))
    return (
        layer.last_exchange,
        layer._last_step.topk_ids_TK,
        layer.transport.stats.row_meta_bytes,
        layer._last_step.plan,
    )


def test_pairs_are_those_of_the_seats_that_the_step_has():
    """Counted by hand from every rank's choices."""
    for exchange, *_ in (steps := virtual_world(4).run(lambda me: seen(me, [(9, 30, 0, 17)]))):
        seats, width = exchange.seats, exchange.num_slots // 4
        assert seats.has_copies and not exchange.copies_kept
        for source, (_, ids, _, _) in enumerate(steps):
            of_source = seats.of_ids(ids, source).tolist()
            for block in range(BLOCKS):
                part = of_source[len(of_source) * block // BLOCKS : len(of_source) * (block + 1) // BLOCKS]
                want = np.zeros((2, exchange.num_slots), dtype=np.int64)
                for row in part:
                    for rank in {seat // width for seat in row}:
                        here = [seat for seat in row if seat // width == rank]
                        want[0, min(here)] += 1
                        want[1, max(here)] += 1
                for known, right in zip((exchange.first, exchange.last), want, strict=True):
                    assert np.array_equal(known.table[source, block], right)


def test_its_bytes_are_the_closed_form_and_steps_without_copies_have_none():
    def bytes_of(counts):
        found = []
        for exchange, ids, sent, plan in virtual_world(4).run(lambda me: seen(me, [counts])):
            beside = distinct_plan(exchange, plan.chunks).outgoing_rows * ids.shape[1] * (4 + 8)
            found.append((sent - beside, exchange.num_slots))
        return found

    for sent, slots in bytes_of((9, 30, 0, 17)):
        assert sent == second_gather_cost(ranks=4, slots=slots).bytes == 3 * 2 * 16 * slots * 4
    assert [sent for sent, _ in bytes_of((0, 0, 0, 0))] == [0] * 4


@pytest.mark.parametrize("way", [0, 1])
def test_pairs_that_do_not_go_with_the_counts_are_refused(way):
    steps = virtual_world(4).run(lambda me: seen(me, [(9, 30, 0, 17)]))
    exchange = steps[1][0]
    said = torch.stack([pairs_of(ids, one) for one, ids, *_ in steps])
    assert np.array_equal(with_pairs(exchange, said).first.table, exchange.first.table)
    said[3, way * BLOCKS * exchange.num_slots] += 1
    with pytest.raises(PlanMismatch, match="rank 3 announced rows that do not go with its counts"):
        with_pairs(exchange, said)
