"""Cost models with a known outcome, and ways to make schedule="auto" take them instead of measuring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from moe_overlap import ShortcutBlock
from moe_overlap.agreement.counts import BLOCKS, block_counts_of_rows
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.node_counts import NodeCounts
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.auto import auto
from moe_overlap.auto import calibrate as measuring
from moe_overlap.planning.cost_model import AlphaBeta, CostModel, DistinctCosts
from tests.layers import F, make, tokens
from tests.parallel.model import Op
from tests.tolerances import same_bits

FREE = AlphaBeta(alpha_s=0.0, beta_s=0.0)
FORWARD = ("experts",)
BACKWARD = ("experts_dgrad", "experts_wgrad")


def line(beta_s: float, alpha_s: float = 0.0) -> AlphaBeta:
    return AlphaBeta(alpha_s=alpha_s, beta_s=beta_s)


def cost_model(
    ops: int = 0, *, alpha_s: float = 0.0, hide: tuple[str, ...] = FORWARD + BACKWARD, **given: Any
) -> CostModel:
    """A byte on the wire costs 1 ns and a message `alpha_s`; what `hide` names costs 0.2 us a row, all else nothing."""
    values: dict[str, Any] = dict.fromkeys(
        ("experts", "experts_dgrad", "experts_wgrad", "permute", "unpermute", "unpermute_backward", "permute_backward"),
        FREE,
    )
    values |= dict.fromkeys(hide, line(2e-7))
    values |= {"backbone_s": (1e-6,) * ops, "backbone_backward_s": (2e-6,) * ops}
    values |= {"exchange": {"inter": line(1e-9, alpha_s)}, "source": "planted", **given}
    return CostModel(**values)


def exchange(counts: Any = None, *, world: int = 2, slots: int = 8, rows: int = 3, grad: bool = True) -> ExchangePlan:
    """An agreed step: `rows` from every block of every rank to every slot, or the given counts [W, BLOCKS, P]."""
    if counts is None:
        counts = np.full((world, BLOCKS, slots), rows)
    return ExchangePlan(rank=0, world_size=len(counts), step=1, phase="forward", grad_enabled=grad,
                        x_requires_grad=grad, counts=Counts.of(np.asarray(counts, dtype=np.int64), 0))  # fmt: skip


def distinct_costs(model: CostModel, **given: Any) -> CostModel:
    """The model with figures of deduplicated steps: those of plain ones, but for the given ones."""
    apart = ("inside", "gateway_byte_s")
    same = {field.name: getattr(model, field.name) for field in fields(DistinctCosts) if field.name not in apart}
    return replace(model, distinct=DistinctCosts(**(same | given)))


def routed(
    ids_of_rank: list[torch.Tensor], *, slots: int = 8, rank: int = 0, grad: bool = True, nodes: int = 0
) -> ExchangePlan:
    """A step agreed on with deduplication, from every rank's choices int32 [T, K]; nodes: to each of which a row goes
    once."""
    world = len(ids_of_rank)
    tables = [block_counts_of_rows(ids, slots, world, nodes) for ids in ids_of_rank]
    whole = [torch.stack(kind).to(torch.int64).numpy() for kind in zip(*tables, strict=True)]
    counts, first, last = (Counts.of(one, rank) for one in whole[:3])
    return ExchangePlan(rank=rank, world_size=world, step=1, phase="forward", grad_enabled=grad, x_requires_grad=grad,
                        counts=counts, dedup=1, first=first, last=last, ranks_per_node=world // nodes if nodes else 0,
                        node_rows=NodeCounts.of(whole[3], whole[1:3], rank) if nodes else None)  # fmt: skip


def choices(tokens: int, top_k: int, *, experts: int = 8, seed: int = 0) -> torch.Tensor:
    """int32 [T, K]: different experts for each token, all sets equally likely."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(dim=1)[:, :top_k].to(torch.int32)


@contextmanager
def planted(model: CostModel) -> Iterator[list[dict[str, Any]]]:
    """No probe runs; what "auto" would measure is `model`. Yields the arguments of the calls."""
    calls: list[dict[str, Any]] = []

    def instead(*_: Any, **arguments: Any) -> CostModel:
        calls.append(arguments)
        return model

    with patch.object(auto, "calibrate", instead):
        yield calls


@contextmanager
def measured_as(model: CostModel) -> Iterator[None]:
    """The probes run, one round of them, and the fit of what they measured is `model`."""
    with patch.object(measuring, "ROUNDS", (1, 1)), patch.object(measuring, "fit", lambda *_, **__: model):
        yield


@contextmanager
def one_round() -> Iterator[None]:
    """The probes run once after they are warm."""
    with patch.object(measuring, "ROUNDS", (1, 1)):
        yield


SHAPES = ("layer", "shared", "block")
OPS = 3
SOME = (12, 9)  # tokens of each rank


def build(shape, transport, schedule="auto", *, overlap=True, mode="none"):
    """A layer, one with a shared expert, or a block with three ops beside the exchanges; always the same weights."""
    torch.manual_seed(3)
    if shape != "block":
        return make(transport, schedule=schedule, overlap=overlap, shared_expert_size=F if shape == "shared" else None)
    moe = make(transport, overlap=overlap)
    choice = {"schedule": "auto"} if schedule == "auto" else {"slot": 1}
    return ShortcutBlock([Op(mode) for _ in range(OPS + 1)], moe, tap=1, overlap=overlap, **choice)


def layer_of(model):
    return model.moe if isinstance(model, ShortcutBlock) else model


def step(model, rank, counts=SOME, call=None):
    """Output, input gradient and every parameter's."""
    x = tokens(counts[rank], rank).requires_grad_()
    y = (call or model)(x)
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def same(got, want, check=same_bits):
    assert got.keys() == want.keys()
    for name in want:
        check(got[name], want[name])
