"""The workloads of bench balance, and the bound they are compared with."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_overlap.commands.bench.oracle import oracle
from moe_overlap.commands.bench.workloads import WORKLOADS, Sizes, choices, counts_of, imbalance
from moe_overlap.errors import ConfigError
from moe_overlap.planning.copy_costs import PhaseCosts
from moe_overlap.planning.copy_load import Load
from moe_overlap.planning.cost_model import AlphaBeta
from moe_overlap.planning.replication import decide, price, priced

SIZES = Sizes(ranks=8, ranks_per_node=4, tokens=512, experts=16, top_k=2)
HOMES = np.arange(16) // 2
DRAWN = [name for name in WORKLOADS if name != "recorded"]


def test_there_are_eight_and_one_against_forecasts_and_each_says_what_it_may_claim():
    assert len(WORKLOADS) == 8 + 1 and all(one.claim for one in WORKLOADS.values())


@pytest.mark.parametrize("name", DRAWN)
def test_choices_follow_from_name_seed_and_step_and_are_distinct(name):
    def drawn(**changes):
        given = {"seed": 3, "step": 5, "rank": 1} | changes
        return choices(name, SIZES, **given)[0]

    ids = drawn()
    assert ids.dtype == torch.int32 and ids.shape == (512, 2) and 0 <= ids.min() and ids.max() < 16
    assert bool((ids[:, 0] != ids[:, 1]).all()) and torch.equal(ids, drawn())
    assert name == "balanced" or not any(torch.equal(ids, drawn(**one)) for one in ({"step": 6}, {"rank": 2}))


@pytest.mark.parametrize(
    "name, least, most",
    [("balanced", 1.0, 1.0), ("zipf0.6", 1.2, 2.2), ("zipf1.0", 1.7, 3.2), ("zipf1.5", 2.5, 4.5),
     ("one_hot_expert", 1.8, 2.6), ("one_hot_node", 1.4, 1.7)],
)  # fmt: skip
def test_static_imbalance_is_that_of_the_name(name, least, most):
    found = imbalance(counts_of(name, SIZES, seed=0, step=0), HOMES)
    assert least <= found <= most


def test_popularity_is_permuted_by_the_seed():
    hottest = {int(counts_of("zipf1.5", SIZES, seed=seed, step=0).sum(axis=0).argmax()) for seed in range(12)}
    assert len(hottest) > 4


def test_flipping_has_another_popularity_in_every_step_and_the_same_in_every_other():
    first, second, third = (counts_of("flipping", SIZES, seed=0, step=step).sum(axis=0) for step in range(3))
    assert np.corrcoef(first, third)[0, 1] > 0.95 > 0.5 > np.corrcoef(first, second)[0, 1]


def test_drifting_goes_over_to_another_popularity():
    first, half, last = (counts_of("drifting", SIZES, seed=0, step=step).sum(axis=0) for step in (0, 50, 100))
    alike = np.corrcoef(first, half)[0, 1], np.corrcoef(half, last)[0, 1], np.corrcoef(first, last)[0, 1]
    assert min(alike[:2]) > alike[2] + 0.1


def test_recorded_reads_a_routing_file(tmp_path):
    ids = torch.arange(32, dtype=torch.int32).reshape(16, 2) % 16
    save_file({"ids": ids, "weights": torch.ones(16, 2)}, str(tmp_path / "r"), metadata={"E": "16"})
    found, _ = choices("recorded", SIZES, seed=0, step=0, rank=0, recorded=tmp_path / "r")
    assert torch.equal(found[:16], ids)
    with pytest.raises(ConfigError, match="--recorded"):
        choices("recorded", SIZES, seed=0, step=0, rank=0)
    with pytest.raises(ConfigError, match="workload"):
        choices("zipf", SIZES, seed=0, step=0, rank=0)
    with pytest.raises(ConfigError, match="top_k"):
        choices("balanced", replace(SIZES, top_k=17), seed=0, step=0, rank=0)


def line(beta_s):
    return AlphaBeta(alpha_s=0.0, beta_s=beta_s)


def phase(copy_s, **more):
    return PhaseCosts(row_s=1.0, exchange=(line(0.1),) * 2, copy=(line(copy_s),) * 2, **more)


def bound_of(load, phases):
    """Of the oracle, proven, with the decision for what is known."""
    known = decide(load, phases, margin=0.0)
    found = oracle(load, phases, known_s=known.predicted_s)
    assert found.proven and found.seconds <= known.predicted_s
    return found.seconds, known.predicted_s


def test_the_oracle_of_a_hot_expert_is_the_closed_form():
    pytest.importorskip("scipy")
    load = Load.at_home(np.array([[8, 0], [8, 0]]), [0, 1], [1, 1])
    # Joined, 16 rows of expert 0 on rank 0, 8 of them rank 1's: left 16 + 2 * 0.1 * 8; with a copy 8 + 3, none cross.
    for copy_s, beside_s, times, right in ((3.0, 0.0, 1, 11.0), (30.0, 0.0, 1, 17.6), (3.0, 5.0, 2, 32.0)):
        phases = [phase(copy_s, joined=True, beside_s=beside_s)] * times
        found = oracle(load, phases, known_s=1e3)
        assert found.proven and found.seconds == pytest.approx(right, rel=1e-3)
        assert priced(load, found.seats, phases) == pytest.approx(right, rel=1e-3)
        assert bound_of(load, phases)[1] == pytest.approx(right)


def late(copy_s, **more):
    """With latencies."""
    copy = AlphaBeta(alpha_s=2.0, beta_s=copy_s), AlphaBeta(alpha_s=0.5, beta_s=copy_s / 4)
    return PhaseCosts(row_s=1.0, exchange=(AlphaBeta(alpha_s=1.0, beta_s=0.1),) * 2, copy=copy, **more)


@pytest.mark.parametrize("relays", [False, True])
@pytest.mark.parametrize("chunks, joined, wgrad", [(1, True, 0.0), (1, False, 0.5), (3, False, 0.0), (3, False, 0.5)])
def test_no_decision_beats_the_oracle(chunks, joined, wgrad, relays):
    pytest.importorskip("scipy")
    sizes = Sizes(ranks=4, ranks_per_node=2, tokens=64, experts=4, top_k=1)
    more = {"chunks": chunks, "joined": joined}
    phases = [late(5.0, relays=relays, **more), late(5.0, wgrad_row_s=wgrad, **more)]
    for name in ("zipf1.5", "one_hot_expert"):
        load = Load.at_home(counts_of(name, sizes, seed=1, step=0), range(4), [1] * 4, ranks_per_node=2)
        bound, known = bound_of(load, phases)
        assert known <= bound / 0.9


@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_no_choice_of_relayed_copies_is_below_the_oracle(per_node):
    """All sets of copies of one hot expert on 4 ranks, and rows shared out over them in many ways."""
    pytest.importorskip("scipy")
    counts, rng, relayed = np.array([[40, 1, 2], [60, 0, 1], [50, 2, 2], [70, 1, 0]]), np.random.default_rng(0), 0
    load = Load.at_home(counts, [0, 1, 2], [1] * 4, ranks_per_node=per_node)
    for exposed in (False, True):
        phases = [late(12.0, relays=True, exposed_copies=exposed, beside_s=9.0)]
        bound, best = bound_of(load, phases)
        for ranks in (ranks for n in (1, 2, 3) for ranks in itertools.combinations((1, 2, 3), n)):
            for shares in rng.dirichlet(np.full(len(ranks) + 1, 8.0), 60):
                rows = np.floor(shares[1:] * 220).astype(int).tolist()
                copies = [(0, rank, n) for rank, n in zip(ranks, rows, strict=True)]
                seconds, by_relay = price(load, ((0, 0, 220 - sum(rows)), *load.seats[1:], *copies), phases)
                assert bound <= seconds * (1 + 1e-6)
                best, relayed = min(best, seconds), relayed + by_relay
        assert best <= bound / 0.9
    assert relayed


def test_the_oracle_wants_the_homes_alone():
    pytest.importorskip("scipy")
    load = Load(counts=np.array([[2, 0], [0, 0]]), seats=((0, 0, 1), (1, 1, 0), (0, 1, 1)), spare=(0, 0))
    with pytest.raises(ConfigError, match="seats"):
        oracle(load, [phase(1.0)], known_s=2.0)


def test_without_time_the_bound_is_not_proven():
    pytest.importorskip("scipy")
    load = Load.at_home(counts_of("zipf1.0", SIZES, seed=0, step=0), HOMES.tolist(), [2] * 8, ranks_per_node=4)
    known_s = decide(load, [phase(300.0)]).predicted_s
    found = oracle(load, [phase(300.0)], known_s=known_s, seconds=1e-3)
    assert not found.proven and 0 <= found.seconds <= known_s
