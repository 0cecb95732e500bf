"""Random deduplicated steps against a dense float64 oracle: routings, cuts, orders of actions, weights of any sign.

One case is one forward and backward of all ranks. Output, gradients of x, of the routing weights and of the experts
are compared; the schedules are drawn among all that `check` allows.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_overlap import MoELayer
from moe_overlap.placement import LocalFirst, Modulo, Placement
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.actions import Action, Schedule, dependencies
from moe_overlap.schedule.builders import SchedulePair, chunked, deduplicate
from moe_overlap.schedule.check import check
from tests.ranks import virtual_world
from tests.tolerances import close

D, F = 6, 4
MOST_TOKENS, MOST_EXPERTS, MOST_CHOICES = 40, 24, 8
CASES_PER_LAYER = 20  # a layer is made once for several routings and schedules
# Most of the time goes into exchanges, in each of which every rank's thread changes: many chunks are drawn seldom.
CUTS = ("tokens", "experts")
WORLDS = (2, 2, 2, 3, 3, 4, 5)
NODES = ((4, 2), (4, 2), (6, 2), (6, 3))  # ranks, ranks of a node
CHUNKS = (1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 5, 8, 16)


class Given(nn.Module):
    """A router whose choice and whose weights are given."""

    def __init__(self, ids_TK: Tensor, weights_TK: Tensor) -> None:
        super().__init__()
        self.ids_TK, self.weights_TK = ids_TK, weights_TK

    def forward(self, x_TD: Tensor, **_: object) -> RoutingDecision:
        nothing = torch.zeros(1, dtype=torch.int32)
        return RoutingDecision(topk_ids_TK=self.ids_TK, topk_weights_TK=self.weights_TK, tokens_per_expert_E=nothing,
                               dropped_tokens=nothing, status=nothing)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One case: of each rank x [T, D], ids [T, K], weights [T, K] and dy [T, D], and whether x and the weights need a
    gradient; and the schedules."""

    given: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    needed: list[tuple[bool, bool]]
    pair: SchedulePair


def draw_ids(kind: str, tokens: int, experts: int, top_k: int, draw: torch.Generator, world: int) -> Tensor:
    """int32 [T, K], no id twice in a token."""
    scores = torch.rand(tokens, experts, generator=draw)
    local = experts // world
    if kind == "skewed":
        scores += torch.arange(experts) * 0.2
    elif kind == "one_rank":  # and what does not fit there: elsewhere, or nowhere
        rank = int(torch.randint(world, (), generator=draw))
        scores[:, rank * local : (rank + 1) * local] += 2.0
    elif kind == "without_a_rank":
        rank = int(torch.randint(world, (), generator=draw))
        scores[:, rank * local : (rank + 1) * local] -= 2.0
    best = scores.topk(top_k, dim=1)
    ids = best.indices.to(torch.int32)
    if kind == "without_a_rank":
        ids = ids.masked_fill(best.values < 0, -1)
    if kind == "unused":
        ids = ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.5, -1)
    if kind == "nobody":
        ids = torch.full_like(ids, -1)
    return ids.gather(1, torch.rand(ids.shape, generator=draw).argsort(dim=1))


NAMES = ("y", "dx", "dweights", "dw_in", "dw_out")
KINDS = ("uniform", "skewed", "one_rank", "without_a_rank", "unused", "nobody")


def draw_order(actions: list[Action], draw: random.Random, *, ascending: tuple[str, ...] = ()) -> Schedule:
    """Any order in which everything stands after what it reads; actions of each verb `ascending` by their indices."""
    needs = [set(found) for found in dependencies(Schedule(tuple(actions)))]
    for verb in ascending:
        experts = [position for position, action in enumerate(actions) if action.verb == verb]
        for before, after in zip(experts, experts[1:], strict=False):
            needs[after].add(before)
    left, order = list(range(len(actions))), []
    while left:
        position = draw.choice([one for one in left if needs[one].isdisjoint(left)])
        left.remove(position)
        order.append(actions[position])
    return Schedule(tuple(order))


def draw_pair(draw: random.Random, *, gateways: bool) -> SchedulePair:
    """Forward and backward cut and ordered in any way that `check` allows, with gateways `check_over_gateways`."""
    forward, backward = (deduplicate(chunked(draw.choice(CHUNKS), draw.choice(CUTS))) for _ in range(2))
    pair = forward.with_backward(backward)
    if draw.random() < 0.7:
        verbs = (("E", "C"), ("Ed", "Dt")) if gateways else (("E",), ("Ed",))
        weights = [Action("Ew", group) for group in range(1, draw.randint(1, 4))]
        backwards = [*pair.backward, *weights]
        pair = replace(
            pair,
            name="drawn",
            forward=draw_order(list(pair.forward), draw, ascending=verbs[0] if pair.by == "experts" else ()),
            backward=draw_order(backwards, draw, ascending=verbs[1] if pair.backward_by == "experts" else ()),
        )
    check(pair)
    return pair.join(draw.random() < 0.2)


def draw_step(world: int, experts: int, top_k: int, seed: int, *, gateways: bool) -> Step:
    draw, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    given = []
    kind = chance.choice((*KINDS, "mixed"))
    for _ in range(world):
        tokens = chance.choice((0, 1, chance.randint(0, MOST_TOKENS), chance.randint(0, MOST_TOKENS)))
        ids = draw_ids(chance.choice(KINDS) if kind == "mixed" else kind, tokens, experts, top_k, draw, world)
        x, dy = (torch.randn(tokens, D, generator=draw, dtype=torch.float64) for _ in range(2))
        weights = torch.randn(tokens, top_k, generator=draw, dtype=torch.float64)
        weights = weights.masked_fill(torch.rand(weights.shape, generator=draw) < 0.2, 0.0)
        given.append((x, ids, weights, dy))
    needed = [(chance.random() < 0.8, chance.random() < 0.8) for _ in range(world)]
    return Step(given, needed, draw_pair(chance, gateways=gateways))


def expected(step: Step, w_in: Tensor, w_out: Tensor) -> list[list[Tensor]]:
    """[y, dx, dweights, dw_in, dw_out] of each rank; the experts' gradients are those of all experts."""
    w_in, w_out = (one.clone().requires_grad_() for one in (w_in, w_out))
    leaves, outputs, losses = [], [], []
    for x, ids, weights, dy in step.given:
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        used = torch.where(ids >= 0, weights, 0)
        weights_TE = x.new_zeros(len(x), len(w_in)).scatter_add(1, ids.clamp(min=0).long(), used)
        gate, up = torch.einsum("td,efd->tef", x, w_in).chunk(2, dim=2)
        y = torch.einsum("tef,edf,te->td", functional.silu(gate) * up, w_out, weights_TE)
        leaves += [x, weights]
        outputs.append(y.detach())
        losses.append((y * dy).sum())
    grads = torch.autograd.grad(sum(losses), [*leaves, w_in, w_out])
    return [[y, *grads[2 * rank : 2 * rank + 2], *grads[-2:]] for rank, y in enumerate(outputs)]


class Drawn:
    """Copies of any experts anywhere, others for other counts; sometimes none; every second time from rank to rank."""

    def __init__(self, seed: int) -> None:
        self.digest = seed
        self.relayed = False  # of the call that was the last one of any rank: who calls reads it at once

    def __call__(self, counts, base: Placement) -> Placement:
        draw = random.Random(f"{self.digest} {counts.tolist()}")
        chance, selector = draw.choice((0.0, 0.1, 0.5)), draw.choice((Modulo(), LocalFirst()))
        ranks = base.experts_of_ranks()
        for rank, expert in itertools.product(range(base.world_size), range(base.num_experts)):
            if rank != base.home_ranks[expert] and draw.random() < chance:
                ranks[rank].append(expert)
        self.relayed = draw.random() < 0.5
        if sum(map(len, ranks)) == base.num_slots:
            return base
        return Placement.of_ranks(ranks, homes=base.home_ranks, selector=selector)


def run(
    me, steps: list[Step], experts: int, top_k: int, w_in: Tensor, w_out: Tensor, node: int | None, rule: Drawn | None
) -> list[list[Tensor]]:
    """What `expected` says, of one rank, in each step: those gradients that are needed, of its own experts. `node`:
    ranks of a node, to each of which a row goes once; `rule`: of the copies of each step."""
    layer = MoELayer(D, F, experts, top_k, transport=me.transport(), router=Given(*steps[0].given[me.rank][1:3]),
                     dedup="on", ranks_per_node=node, hierarchical=node is not None,
                     dtype=torch.float64)  # fmt: skip
    layer.dispatcher.rule = rule
    local = slice(me.rank * experts // me.world_size, (me.rank + 1) * experts // me.world_size)
    with torch.no_grad():
        for parameter, value in zip(layer.expert_weights, (w_in, w_out), strict=True):
            parameter.copy_(value[local])
    results = []
    for step in steps:
        x, ids, weights, dy = step.given[me.rank]
        x, weights = (one.clone().requires_grad_(n) for one, n in zip((x, weights), step.needed[me.rank], strict=True))
        layer.router.ids_TK, layer.router.weights_TK = ids, weights
        layer.schedule = step.pair
        y = layer(x)
        leaves = [one for one in (x, weights, *layer.expert_weights) if one.requires_grad]
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    return results


def check_cases(seed: int, cases: int, *, hierarchical: bool = False, copies: bool = False) -> None:
    """`cases` random steps of one layer; copies: of experts, chosen in each step."""
    chance = random.Random(seed)
    world, node = chance.choice(NODES) if hierarchical else (chance.choice(WORLDS), None)
    experts = world * min(chance.randint(1, MOST_EXPERTS // world) for _ in range(2))
    top_k = chance.randint(1, min(MOST_CHOICES, experts))
    steps = [draw_step(world, experts, top_k, 1000 * seed + case, gateways=hierarchical) for case in range(cases)]
    rule, draw = Drawn(seed) if copies else None, torch.Generator().manual_seed(seed)
    w_in, w_out = (torch.randn(experts, *shape, generator=draw, dtype=torch.float64) for shape in ((2 * F, D), (D, F)))
    by_rank = virtual_world(world, seed=seed).run(lambda me: run(me, steps, experts, top_k, w_in, w_out, node, rule))
    local = experts // world
    for case, step in enumerate(steps):
        for rank, (got, want) in enumerate(
            zip((results[case] for results in by_rank), expected(step, w_in, w_out), strict=True)
        ):
            own = slice(rank * local, (rank + 1) * local)
            wanted = dict(zip(NAMES, [*want[:3], want[3][own], want[4][own]], strict=True))
            for name, needed in zip(("dx", "dweights"), step.needed[rank], strict=True):
                if not needed:
                    del wanted[name]
            for (name, right), one in zip(wanted.items(), got, strict=True):
                try:
                    close(one, right)
                except AssertionError as wrong:
                    where = f"seed {seed}, case {case}, rank {rank} of {world}, {experts} experts, top {top_k}, {name}"
                    raise AssertionError(f"{where}: {step.pair.forward} / {step.pair.backward}: {wrong}") from None


@pytest.mark.parametrize("seed", range(50))
def test_random_steps_are_right(seed):
    check_cases(seed, CASES_PER_LAYER)


@pytest.mark.parametrize("seed", range(10))
def test_random_steps_in_which_rows_cross_nodes_once_are_right(seed):
    check_cases(5000 + seed, CASES_PER_LAYER // 2, hierarchical=True)


@pytest.mark.parametrize("seed", range(10))
def test_random_steps_with_copies_chosen_in_each_are_right(seed):
    check_cases(7000 + seed, CASES_PER_LAYER // 2, copies=True)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(100))
def test_many_random_steps_are_right(part):
    """20,000 of them."""
    for seed in range(10):
        check_cases(1000 + 10 * part + seed, CASES_PER_LAYER)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(100))
def test_many_random_steps_in_which_rows_cross_nodes_once_are_right(part):
    """2,000 of them."""
    check_cases(6000 + part, CASES_PER_LAYER, hierarchical=True)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(100))
def test_many_random_steps_with_copies_chosen_in_each_are_right(part):
    """2,000 of them."""
    check_cases(8000 + part, CASES_PER_LAYER, copies=True)
