"""Into how many groups schedule="auto" cuts experts in host memory, and the limit of the device's memory beside it."""

from __future__ import annotations

import pytest

from moe_overlap import ConfigError
from moe_overlap.auto.probe_pairs import offloaded_pairs
from moe_overlap.errors import PlanMismatch
from moe_overlap.schedule.builders import chunked
from moe_overlap.transport.host_link import EmulatedHostLink
from tests.auto.offloads import host_model, planned_of
from tests.auto.planted import exchange, planted
from tests.auto.slept import SLEPT, set_clock
from tests.layers import D, E, F, make, results, tokens
from tests.ranks import virtual_world


def test_every_number_of_groups_with_a_largest_one_of_its_own_is_looked_at():
    for slots, wanted in ((16, {1, 2, 3, 4, 6, 8, 16}), (6, {1, 2, 3, 6}), (3, {1, 2, 3}), (1, {1})):
        planned = planned_of(1e-8, exchange(world=1, slots=slots))
        for found in planned.candidates.values():
            assert {one.chunks for one in found} == wanted
    # Twelve experts, whose best cut lies between those of a power of two.
    assert planned_of(1.2e-8, exchange(world=1, slots=12)).pair.chunks not in (1, 2, 4, 8, 16)


def test_a_limit_of_the_device_is_kept():
    """16 experts of 1000 bytes; a link that takes no time would leave them in one group, beside whose slot there is one
    of half of them after a step in two."""
    within = {24_000: 1, 23_999: 2, 16_000: 2, 15_999: 3, 12_000: 3, 8_000: 4, 2_000: 16}
    for limit, groups in ((None, 1), *within.items()):
        pair = planned_of(1e-12, device_limit_bytes=limit).pair
        assert (pair.chunks, pair.backward_chunks) == (groups, groups), limit
    with pytest.raises(ConfigError, match=r"device_limit_bytes = 1999: expected at least 2000"):
        planned_of(1e-12, device_limit_bytes=1999)


def test_probes_keep_within_the_limit():
    def cuts(experts, limit):
        fewest, more = offloaded_pairs(chunked, experts, limit)
        return [one.chunks for one in (*fewest, *more)]

    assert cuts(16, None) == [1, 4, 4, 16] and cuts(16, 8) == [4, 5, 5, 16]
    assert cuts(32, 6) == [11, 12, 12, 16]
    assert cuts(8, 2) == [8, 9, 9] and cuts(1, 2) == [1, 2, 2]
    with pytest.raises(ConfigError, match="device_limit_bytes"):
        cuts(16, 2)


@pytest.mark.parametrize("held, groups", [(2, E), (E, 2), (E + E // 2, 1)])
def test_a_layer_keeps_within_its_link_s_limit_in_probes_and_steps(held, groups, monkeypatch):
    """So many experts of eight at a time, over a link that is no reason to cut."""
    set_clock(monkeypatch)
    expert_bytes = 2 * F * D * 8
    link = EmulatedHostLink(device_limit_bytes=held * expert_bytes)
    most, plain = [], link.slot

    def slot(num_bytes):
        found = plain(num_bytes)
        most.append(link.device_bytes)
        return found

    link.slot = slot
    layer = make(schedule="auto", activation=SLEPT, expert_offload=link)
    results(layer, tokens(64))
    pair = layer._last_step.pair
    assert (pair.chunks, pair.backward_chunks) == (groups, groups)
    assert max(most) <= held * expert_bytes and f"no more than {held * expert_bytes}" in layer.explain()


def test_ranks_with_other_limits_are_refused_before_anything_is_sent():
    def rank(me):
        link = EmulatedHostLink(device_limit_bytes=10**9 if me.rank else None)
        layer = make(me.transport(), schedule="auto", expert_offload=link)
        with pytest.raises(PlanMismatch, match="nothing was sent"):
            layer(tokens(4))
        return layer.transport.stats.exchanges

    with planted(host_model(1e-6)):
        assert virtual_world(2).run(rank) == [0, 0]
