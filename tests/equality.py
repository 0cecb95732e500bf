"""The equality matrix: one function that runs a case on one rank, and one that says what the answer is.

A case is run twice, with overlap and with every exchange joined; outputs, input gradient and every parameter gradient
must be equal bit for bit, and right against the dense float64 oracle over all ranks' tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_overlap import MoELayer, ShortcutBlock
from moe_overlap.agreement.seats import seats_of
from moe_overlap.placement import LocalFirst, Placement
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.builders import agree_ahead, chunked, serial, shared_expert, tap_of_position
from moe_overlap.schedule.published import filled, pairwise
from moe_overlap.transport.base import Transport
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests import oracle, strategies
from tests.tolerances import close, same_bits

D, F, E, K = 16, 24, 8, 2
WORLDS = (1, 2, 4)
SCHEDULES = ("serial", "chunked-tokens", "chunked-experts", "chunked-apart", "shared_expert-0", "shared_expert-1",
             "shared_expert-ahead", "shortcut-pos1", "shortcut-pos2", "shortcut-pos3", "shortcut-ahead-pos1",
             "shortcut-early-ahead-pos2")  # fmt: skip
PUBLISHED = {"chunked-pairwise": pairwise, "chunked-filled": filled}  # what no other schedule has
CHUNKS = (1, 2, 3, 4, 7, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
STATIC = {"mode": "static", "static_capacity": "no_drop"}
MODES = {"hierarchical": "on", "static": "off"}  # what `dedup` is there
LOADS = ("balanced", "one_expert", "empty_expert", "no_tokens", "uneven")


def _permuted(experts: int, world: int) -> Placement:
    """Expert 3 i + 2 in slot i."""
    return Placement(experts, experts, world, tuple((3 * i + 2) % experts for i in range(experts)))


def _uneven(experts: int, world: int) -> Placement:
    """Most experts on the last rank, none on the first of more than two."""
    first = [[] if world > 2 and rank == 0 else [rank] for rank in range(world - 1)]
    taken = {expert for one in first for expert in one}
    return Placement.of_ranks([*first, [expert for expert in range(experts) if expert not in taken][::-1]])


def _copied(experts: int, world: int) -> Placement:
    """Each rank has its experts, and the first one of the next rank; expert 0 is everywhere."""
    each = experts // world
    own = [[*range(rank * each, (rank + 1) * each)] for rank in range(world)]
    more = [sorted({(rank + 1) % world * each, 0} - {rank * each}) for rank in range(world)]
    homes = [expert // each for expert in range(experts)]
    return Placement.of_ranks([b + a for a, b in zip(own, more, strict=True)], homes=homes)


def _local(experts: int, world: int) -> Placement:
    """The uneven one with copies of the last rank's first two experts on all ranks but one, tokens to the own rank."""
    plain = _uneven(experts, world)
    ranks = plain.experts_of_ranks()
    hot = ranks[-1][:2]
    placed = [[*one, *hot] for one in ranks[: world - 1]]
    if world > 2:
        placed[1] = ranks[1]
    homes = list(plain.home_ranks)
    return Placement.of_ranks([*placed, ranks[-1]], homes=homes, selector=LocalFirst())


PLACEMENTS = {"identity": Placement.identity, "permuted": _permuted, "uneven": _uneven, "copied": _copied,
              "local": _local, "decided": Placement.identity}  # fmt: skip


class Decides:
    """The rule of "decided": in each step copies of the two experts that are wanted most, on all ranks but their own.
    Where nobody has a token, none."""

    digest = 11

    def __init__(self, *, relayed: bool = False) -> None:
        self.relayed = relayed

    def __call__(self, counts: np.ndarray, base: Placement) -> Placement:
        wanted = counts.sum(axis=(0, 1))
        ranks = base.experts_of_ranks()
        for expert in wanted.argsort(kind="stable")[-2:].tolist() if wanted.any() else ():
            for rank, experts in enumerate(ranks):
                if rank != base.home_ranks[expert]:
                    experts.append(expert)
        return Placement.of_ranks(ranks, homes=base.home_ranks, selector=LocalFirst()) if wanted.any() else base


@dataclass(frozen=True)
class Case:
    world: int
    schedule: str
    chunks: int
    dtype: torch.dtype
    load: str
    dedup: str = "off"  # "hierarchical": "on", and so; "static": off, and mode="static"
    node: int = 0  # ranks of a node, 0: not known
    placement: str = "identity"  # one of PLACEMENTS
    relayed: bool = False  # copies go from rank to rank, where the placement has several of an expert

    def __str__(self) -> str:
        dedup = f"{self.dedup}-{self.node}" if self.node else self.dedup
        placement = self.placement + "-relayed" * self.relayed
        return f"{self.world}-{self.schedule}-{self.chunks}-{str(self.dtype)[6:]}-{self.load}-{dedup}-{placement}"

    @property
    def experts(self) -> int:
        return E if E % self.world == 0 else 2 * self.world

    @property
    def placed(self) -> Placement:
        return PLACEMENTS[self.placement](self.experts, self.world)

    def homes(self, rank: int) -> list[int]:
        """The experts whose parameters a rank has."""
        return list(seats_of(self.placed).homes[rank])

    @property
    def top_k(self) -> int:
        """More than one choice on a rank is what deduplication is about."""
        return K if self.dedup in ("off", "static") else 5

    def tokens(self, rank: int) -> int:
        if self.dedup == "static":  # as many on all ranks
            return {"no_tokens": 0, "uneven": 33}.get(self.load, 16)
        if self.load == "no_tokens" and rank == self.world - 1:
            return 0
        return (5, 17, 2, 33, 9, 20)[rank] if self.load == "uneven" else 16


def all_cases(world: int, dedup: str = "off") -> list[Case]:
    """Every combination; `serial` has one chunk only."""
    product = itertools.product(SCHEDULES, CHUNKS, DTYPES, LOADS)
    return [Case(world, s, c, d, load, dedup) for s, c, d, load in product if s != "serial" or c == 1]


def cases_in_turn(world: int, dedup: str = "off") -> list[Case]:
    """Of `all_cases` a third, dtypes in turn: each combination of three factors is there, and over all of WORLDS each
    of four. `serial`, of one chunk, has every dtype."""

    def in_turn(case: Case) -> bool:
        turn = WORLDS.index(world) + SCHEDULES.index(case.schedule) + CHUNKS.index(case.chunks) + LOADS.index(case.load)
        return case.schedule == "serial" or case.dtype == DTYPES[turn % len(DTYPES)]

    return [case for case in all_cases(world, dedup) if in_turn(case)]


def published_cases(world: int, schedule: str, dedup: str) -> list[Case]:
    """Every second combination of chunks and load of one of PUBLISHED, dtypes and placements in turn."""
    placements = list(PLACEMENTS) if dedup == "off" else ["identity"]
    return [
        Case(world, schedule, c, DTYPES[i % len(DTYPES)], load, dedup, placement=placements[i % len(placements)])
        for i, (c, load) in enumerate(list(itertools.product(CHUNKS, LOADS))[::2])
    ]


def pairwise_cases(world: int, dedup: str = "off") -> list[Case]:
    """Few cases of one world in which every pair of values of two other factors occurs (greedy)."""
    cases = all_cases(world, dedup)

    def pairs(case: Case) -> set[tuple[object, ...]]:
        values = (("schedule", case.schedule), ("chunks", case.chunks), ("dtype", case.dtype), ("load", case.load))
        return set(itertools.combinations(values, 2))

    missing = set().union(*(pairs(case) for case in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


class FixedChoice(nn.Module):
    """A router whose choice is given and whose weights are learned: sigmoid(x w_e) of the experts chosen."""

    def __init__(self, ids_TK: Tensor, num_experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.ids_TK = ids_TK
        self.weight = nn.Parameter(torch.empty(num_experts, D, dtype=dtype))

    def forward(self, x_TD: Tensor, *, reduce: object = None, local_experts: object = None) -> RoutingDecision:
        wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        scores_TE = torch.sigmoid(x_TD.to(wide) @ self.weight.to(wide).T)
        chosen = self.ids_TK.clamp_min(0).long()
        weights_TK = torch.where(self.ids_TK >= 0, scores_TE.gather(1, chosen), torch.zeros((), dtype=wide))
        counts = torch.bincount(self.ids_TK[self.ids_TK >= 0].long(), minlength=self.weight.shape[0])
        return RoutingDecision(
            topk_ids_TK=self.ids_TK,
            topk_weights_TK=weights_TK,
            tokens_per_expert_E=counts,
            dropped_tokens=torch.zeros((), dtype=torch.int64),
            status=torch.zeros(1, dtype=torch.int32),
        )


class Op(nn.Module):
    """A backbone op: h + tanh(h w)."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(D, D, dtype=dtype))

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(h @ self.weight.T)


def inputs(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_TD, ids_TK, dy_TD) of one rank."""
    tokens = case.tokens(rank)
    generator = torch.Generator().manual_seed(100 + rank)
    x, dy = (torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(case.dtype) for _ in range(2))
    kind = case.load if case.load in strategies.ROUTINGS else "uniform"
    ids, _ = strategies.make_routing(kind, tokens, case.experts, case.top_k, seed=rank)
    if case.load == "one_node":
        ids = ids.masked_fill(ids < case.experts - case.experts // case.world * case.node, -1)
    return x, ids, dy


def weights(case: Case) -> dict[str, Tensor]:
    """Every parameter of the whole model, all experts, by the names that `build` uses."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5).to(case.dtype)

    count = case.experts
    named = {"router.weight": draw(count, D), "experts.gate_up_proj": draw(count, 2 * F, D),
             "experts.down_proj": draw(count, D, F)}  # fmt: skip
    if case.schedule.startswith("shared"):
        named |= {"shared_expert.up.weight": draw(2 * F, D), "shared_expert.down.weight": draw(D, F)}
    if case.schedule.startswith("shortcut"):
        named = {f"moe.{name}": value for name, value in named.items()}
        named |= {f"backbone.{i}.weight": draw(D, D) for i in range(3)}
        named |= {"backbone.3.branch.weight": draw(D, D), "backbone.3.gate.weight": draw(1, D)}
    return named


def build(case: Case, transport: Transport, rank: int, *, overlap: bool) -> nn.Module:
    """The model of one rank, with its slices of `weights`."""
    _, ids, _ = inputs(case, rank)
    router = FixedChoice(ids, case.experts, case.dtype)
    hierarchical = case.dedup == "hierarchical"
    name, _, variant = case.schedule.partition("-")
    schedule, shared = "serial", None
    if schedule_of_name := PUBLISHED.get(case.schedule):
        schedule = schedule_of_name(case.chunks)
    elif name == "chunked":
        schedule = chunked(case.chunks, "tokens" if variant == "apart" else variant)
        if variant == "apart":  # backward in other chunks, where it can be cut in another way
            schedule = schedule.with_backward(chunked(3 * case.chunks % 8 + 1, "experts"))
    elif variant == "ahead":
        schedule, shared = agree_ahead(shared_expert(chunks=case.chunks)), F
    elif name == "shared_expert":
        schedule, shared = shared_expert(int(variant), chunks=case.chunks), F
    elif name == "serial":
        schedule = serial()
    moe = MoELayer(D, F, case.experts, case.top_k, transport=transport, router=router, schedule=schedule,
                   overlap=overlap, dedup=MODES.get(case.dedup, case.dedup), placement=case.placed,
                   **(STATIC if case.dedup == "static" else {}), ranks_per_node=case.node or None,
                   hierarchical=hierarchical, shared_expert_size=shared, dtype=case.dtype)  # fmt: skip
    model: nn.Module = moe
    if case.placement == "decided":
        moe.dispatcher.rule = Decides(relayed=case.relayed)
    if name == "shortcut":
        position = int(variant[-1])
        branch = nn.Linear(D, D, bias=False, dtype=case.dtype)
        tap = tap_of_position(position)
        ahead = {"ahead": 3 - position % 2 if "ahead" in variant else 0,
                 "router_tap": 0 if "early" in variant else None}  # fmt: skip
        model = ShortcutBlock([Op(case.dtype) for _ in range(3)], moe, tap=tap, slot=1, **ahead,
                              backward_slot=position % 2, shared_expert=branch, combine="gated", chunks=case.chunks,
                              backward_chunks=case.chunks % 5 + 1, overlap=overlap)  # fmt: skip
    if case.relayed and case.placement != "decided":
        model.schedule = replace(model.schedule, relayed_copies=True)
    full = weights(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = full.pop(name)
            if name.endswith(("gate_up_proj", "down_proj")):
                value = value[case.homes(rank)]
            parameter.copy_(value)
    assert not full, f"weights without a parameter: {list(full)}"
    return model


def run_rank(case: Case, transport: Transport, rank: int, *, overlap: bool) -> dict[str, Tensor]:
    """Output, input gradient and every parameter gradient of one rank."""
    model = build(case, transport, rank, overlap=overlap)
    x, _, dy = inputs(case, rank)
    x.requires_grad_()
    y = model(x)
    y.backward(dy)
    results = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        results[name] = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return {name: value for name, value in results.items() if value is not None}


def run_both(case: Case, on: Transport, off: Transport, rank: int) -> dict[str, Tensor]:
    """Overlap on and off on one rank: asserts equal bits, returns the results."""
    results = run_rank(case, on, rank, overlap=True)
    joined = run_rank(case, off, rank, overlap=False)
    assert results.keys() == joined.keys()
    for name in results:
        same_bits(results[name], joined[name])
    return results


def run_on_gloo(texts: list[tuple[Any, ...]]) -> list[dict[str, Tensor]]:
    """This rank's results of each case, over one pair of process-group transports per model (called in a rank)."""
    group = dist.group.WORLD
    rank = dist.get_rank()
    results = []
    for fields in texts:
        case = Case(*fields)
        on, off = ProcessGroupTransport(group, timeout_s=20.0), ProcessGroupTransport(group, timeout_s=20.0)
        results.append(run_both(case, on, off, rank))
    return results


def expected(case: Case) -> list[dict[str, Tensor]]:
    """The float64 oracle: per rank, what `run_rank` must return; dense gradients are one rank's own."""
    model = case.schedule if case.schedule.startswith("shortcut") else case.schedule.partition("-")[0]
    plain = {"serial": "serial", "chunked": "serial", "shared_expert": "shared_expert-0"}.get(model, model)
    return _expected(replace(case, schedule=plain, chunks=1, relayed=False))


@lru_cache(maxsize=64)
def _expected(case: Case) -> list[dict[str, Tensor]]:
    everything = []
    full = {name: value.double().requires_grad_() for name, value in weights(case).items()}
    short = case.schedule.startswith("shortcut")
    p = {name.removeprefix("moe."): value for name, value in full.items()}
    tap = tap_of_position(int(case.schedule[-1])) if short else 0
    router_tap = 0 if "early" in case.schedule else tap
    losses, outputs, xs = [], [], []
    for rank in range(case.world):
        x, ids, dy = inputs(case, rank)
        h = x.double().requires_grad_()
        xs.append(h)
        tapped = read = h
        for i in range(3 if short else 0):
            if i == tap:
                tapped = h
            if i == router_tap:
                read = h
            h = h + torch.tanh(h @ p[f"backbone.{i}.weight"].T)
        scores = torch.sigmoid(read @ p["router.weight"].T)
        weights_TK = torch.where(
            ids >= 0, scores.gather(1, ids.clamp_min(0).long()), torch.zeros((), dtype=torch.float64)
        )
        y = oracle.moe(tapped, ids, weights_TK, p["experts.gate_up_proj"], p["experts.down_proj"])
        if short:
            gate = torch.sigmoid(h @ p["backbone.3.gate.weight"].T)
            y = y + h + gate * (h @ p["backbone.3.branch.weight"].T)
        if "shared_expert.up.weight" in p:
            y = y + oracle.mlp(tapped, p["shared_expert.up.weight"], p["shared_expert.down.weight"], "swiglu")
        outputs.append(y)
        losses.append((y * dy.double()).sum())
    names = list(full)
    expert_names = [name for name in names if name.endswith(("gate_up_proj", "down_proj"))]
    summed = torch.autograd.grad(sum(losses), [full[n] for n in expert_names], retain_graph=True)
    for rank in range(case.world):
        grads = torch.autograd.grad(losses[rank], [xs[rank], *full.values()], retain_graph=True)
        result = {"y": outputs[rank].detach(), "dx": grads[0], **dict(zip(names, grads[1:], strict=True))}
        for name, grad in zip(expert_names, summed, strict=True):
            result[name] = grad[case.homes(rank)]
        everything.append(result)
    return everything


def check_right(case: Case, results: list[dict[str, Tensor]]) -> None:
    """Assert that every rank's results are the oracle's, to the dtype's tolerance."""
    for rank, (got, want) in enumerate(zip(results, expected(case), strict=True)):
        assert got.keys() == want.keys()
        for name in want:
            try:
                close(got[name], want[name], case.dtype)
            except AssertionError as wrong:
                raise AssertionError(f"{case}, rank {rank}, {name}: {wrong}") from None
