"""FlexMoE's planner makes the very changes that its plain reference makes, one after another."""

import numpy as np
import pytest

from moe_overlap.placement import flex, flex_expand, flex_flow, flex_regroup
from moe_overlap.placement.topology import Topology
from tests.placement import flex_reference


def drawn_traffic(rng, ranks, experts):
    kind = rng.integers(5)
    if kind == 0:
        return rng.integers(0, 10, (ranks, experts))
    if kind == 1:
        return rng.poisson(50 * rng.lognormal(0, 1.2, experts), (ranks, experts))
    if kind == 2:
        load = 1000 / np.arange(1, experts + 1) ** rng.choice([0.5, 1.0, 1.5])
        return np.tile(load.astype(np.int64)[rng.permutation(experts)], (ranks, 1))
    if kind == 3:  # many ranks that tie
        traffic = np.full((ranks, experts), rng.integers(0, 3))
        traffic[:, rng.integers(experts)] += 100
        return traffic
    return rng.integers(0, 3, (ranks, experts)) * rng.integers(0, 1000)


def drawn_slots(rng, ranks, experts):
    """(slots int64 [W, E], room int64 [W], homes int64 [E]): every expert once, some more often, also on one rank."""
    room = rng.integers(0, 5, ranks) if rng.random() < 0.5 else np.full(ranks, -(-experts // ranks) + rng.integers(4))
    while room.sum() < experts:
        room[rng.integers(ranks)] += 1
    slots, homes = np.zeros((ranks, experts), dtype=np.int64), np.zeros(experts, dtype=np.int64)
    for expert in rng.permutation(experts):
        homes[expert] = rng.choice(np.nonzero(slots.sum(axis=1) < room)[0])
        slots[homes[expert], expert] = 1
    for _ in range(rng.integers(1 + room.sum() - experts)):
        rank, expert = rng.choice(np.nonzero(slots.sum(axis=1) < room)[0]), rng.integers(experts)
        if slots[rank, expert] == 0 or rng.random() < 0.3:
            slots[rank, expert] += 1
    return slots, room, homes


def drawn_topology(rng, ranks):
    """Of any speeds: links to other nodes may be the faster ones."""
    per_node = int(rng.choice([0, *(size for size in range(1, ranks + 1) if ranks % size == 0)]))
    if rng.random() < 0.3:
        return Topology(world_size=ranks, ranks_per_node=per_node)
    return Topology(
        world_size=ranks, ranks_per_node=per_node, row_s=10 ** rng.uniform(-8, -5),
        row_bytes=int(10 ** rng.uniform(0, 5)), expert_bytes=int(10 ** rng.uniform(3, 9)),
        intra_bytes_per_s=10 ** rng.uniform(8, 12), inter_bytes_per_s=10 ** rng.uniform(8, 11.5),
    )  # fmt: skip


def maps(module, flow_class, monkeypatch, drawn, threshold, budget, keep_homes):
    """The map after every change, and the last one."""
    (slots, room, homes), traffic, topology = drawn
    found = []
    flow = flow_class.of(slots.copy(), room, traffic, topology, threshold)
    put = flow_class.put

    def kept(flow, change):
        put(flow, change)
        found.append(flow.slots.tobytes())

    with monkeypatch.context() as patch:
        patch.setattr(flow_class, "put", kept)
        last = module.flex_slots(flow, homes, threshold=threshold, budget=budget, keep_homes=keep_homes)
    return [*found, last.tobytes()]


@pytest.mark.parametrize("seed", range(12))
def test_flex_makes_the_changes_of_its_reference(seed, monkeypatch):
    changes = 0
    for case in range(25):
        rng = np.random.default_rng([seed, case])
        ranks, experts = int(rng.integers(1, 13)), int(rng.integers(1, 17))
        traffic = drawn_traffic(rng, ranks, experts).astype(np.int64)
        drawn = drawn_slots(rng, ranks, experts), traffic, drawn_topology(rng, ranks)
        threshold, keep = float(rng.choice([1.0, 1.05, 1.2, 1.5])), bool(rng.random() < 0.4)
        budget = int(rng.integers(12)) if rng.random() < 0.4 else None
        here = maps(flex, flex_flow.Flow, monkeypatch, drawn, threshold, budget, keep)
        plain = maps(flex_reference, flex_reference.Flow, monkeypatch, drawn, threshold, budget, keep)
        assert here == plain, case
        changes += len(here) - 1
    assert changes > 20


@pytest.mark.parametrize("per_node", [0, 8])
def test_flex_makes_the_changes_of_its_reference_on_many_ranks(per_node, monkeypatch):
    """Where sums are long enough for NumPy to sum them in parts, and ranks tie."""
    load = 1 / np.arange(1, 25)
    load = np.round(load / load.sum() * 160 * 8192).astype(np.int64)[np.random.default_rng(1).permutation(24)]
    slots = np.zeros((160, 24), dtype=np.int64)
    slots[np.arange(24), np.arange(24)] = 1
    traffic = np.tile(load // 160, (160, 1))
    drawn = (slots, np.full(160, 1), np.arange(24)), traffic, Topology(world_size=160, ranks_per_node=per_node)
    here = maps(flex, flex_flow.Flow, monkeypatch, drawn, 1.2, None, False)
    assert here == maps(flex_reference, flex_reference.Flow, monkeypatch, drawn, 1.2, None, False)
    assert len(here) > 50


def both_flows(rng):
    """The same drawn slots in the planner and in its reference, and which experts have to stay, bool [W, E]."""
    ranks, experts = rng.choice([(2, 3), (3, 4), (4, 6), (12, 16)]).tolist()
    slots, room, homes = drawn_slots(rng, ranks, experts)
    drawn = (
        room,
        drawn_traffic(rng, ranks, experts).astype(np.int64),
        drawn_topology(rng, ranks),
        rng.choice([0.5, 0.8, 1.05]),
    )
    fixed = np.zeros(slots.shape, dtype=bool)
    fixed[homes, np.arange(experts)] = rng.random() < 0.3
    return flex_flow.Flow.of(slots.copy(), *drawn), flex_reference.Flow.of(slots.copy(), *drawn), fixed


@pytest.mark.parametrize("seed", range(4))
def test_expansion_of_each_expert_is_the_best_of_all_ranks(seed):
    """Also of those experts that the planner does not come to, as it takes the first that is helped. And the bound that
    leaves experts out is on no rank above what that rank comes to."""
    helped = left_out = 0
    for case in range(200):
        flow, plain, fixed = both_flows(np.random.default_rng([seed, case]))
        most, leavers = flex_flow.LESS * plain.above(plain.seconds), flex_expand.Leavers.of(flow, fixed)
        now, hope = plain.above(plain.seconds), flex_expand._hope(flow, leavers)
        least = np.zeros(flow.slots.shape)  # on ranks that the bound is not asked of
        ranks, more = flex_expand._least_more(flow, leavers)
        least[ranks] = more
        for hot in range(len(flow.load)):
            found = [(most, 0.0, -1, None)]
            for rank in np.nonzero(flow.slots[:, hot] == 0)[0].tolist():
                change = [(hot, flex_flow.with_slots(flow.slots[:, hot], {rank: 1}))]
                if flow.full[rank]:
                    change = flex_reference._making_room(plain, fixed, rank, hot, change)
                if change is not None:
                    seconds = plain.changed_s(change)
                    found.append((plain.above(seconds), float(seconds[rank]), rank, change))
                    if flow.full[rank] and not (flow.slots[flow.seconds > flow.limit_s, hot] > 0).any():
                        more, slack = found[-1][0] - now, 1e-9 * float((flow.seconds**2).sum() + (seconds**2).sum())
                        assert more >= least[rank, hot] - slack, (case, hot, rank)
            best, got = min(found, key=lambda one: one[:3])[3], flex_expand._helped(flow, leavers, hot, most)
            assert listed(got) == listed(best), (case, hot)
            assert hope[hot] or best is None, (case, hot)
            helped, left_out = helped + (best is not None), left_out + (not hope[hot])
    assert helped > 40 and left_out > 40


def listed(change):
    return change and [(expert, slots.tolist()) for expert, slots in change]


def test_pairs_left_out_before_they_are_summed_could_not_be_taken():
    taken = left_out = 0
    for case in range(160):
        flow, plain, fixed = both_flows(np.random.default_rng([5, case]))
        seats, total, most = flex_regroup.Seats.of(flow, fixed), float(plain.sync_s.sum()), plain.seconds.max()
        kept = [flex_regroup._gaining(flow, seats, node, total)[:2] for node in range(flow.topology.nodes)]
        kept = {frozenset(pair) for one, two in kept for pair in zip(one.tolist(), two.tolist(), strict=True)}
        seat = {place: i for i, place in enumerate(zip(seats.rank.tolist(), seats.expert.tolist(), strict=True))}
        for rank, expert, other, second in flex_reference._pairs(plain, fixed):
            one, two = seat[rank, expert], seat[other, second]
            change = seats.change(flow, one, two)
            more_s = sum(plain.sync(slots).sum() - plain.sync_s[:, expert].sum() for expert, slots in change)
            may = more_s < -1e-9 * total and plain.changed_s(change).max() <= most
            assert frozenset((one, two)) in kept or not may, (case, rank, expert, other, second)
            taken, left_out = taken + may, left_out + (frozenset((one, two)) not in kept)
    assert taken > 40 and left_out > 40, (taken, left_out)


def test_a_change_leaves_what_a_new_flow_would_have():
    rng = np.random.default_rng(3)
    slots, room, _ = drawn_slots(rng, 12, 16)
    traffic, topology = drawn_traffic(rng, 12, 16).astype(np.int64), Topology(world_size=12, ranks_per_node=4)
    flow = flex_flow.Flow.of(slots.copy(), room, traffic, topology, 1.2)
    for _ in range(20):
        expert = int(rng.integers(16))
        column = np.zeros(12, dtype=np.int64)
        column[rng.choice(np.nonzero(flow.size - flow.slots[:, expert] < room)[0])] = 1
        flow.put([(expert, column)])
        new = flex_flow.Flow.of(flow.slots.copy(), room, traffic, topology, 1.2)
        for name in ("count", "size", "per_slot", "cost_s", "sync_s", "seconds", "rows", "own"):
            assert np.array_equal(getattr(flow, name), getattr(new, name)), name
        assert all(np.array_equal(one, other) for one, other in zip(flow.ranks, new.ranks, strict=True))
