"""Ranks whose routers, shared experts or projections differ learn of it, before they train another model on each."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_overlap import MoELayer, PlanMismatch, ShortcutBlock
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import same_bits

D, F, E, K, T = 12, 16, 8, 2, 10
SAID = r"ranks 0 and 1 have different weights of what each rank has whole .*seed all ranks alike"
PARTS = ("router", "shared_expert", "latent_in", "latent_out")


def layer_of(me: SimpleNamespace, **options) -> MoELayer:
    """With the same weights on all ranks, whatever else draws random numbers meanwhile."""
    layer = MoELayer(D, F, E, K, transport=me.transport(), **{"shared_expert_size": 8, "latent_size": 6} | options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in filter(None, (getattr(layer, name) for name in PARTS)):
            for parameter in part.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return layer


def tokens(rank: int) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(10 + rank))


def shift(layer: MoELayer, name: str, by: float) -> None:
    with torch.no_grad():
        for parameter in getattr(layer, name).parameters():
            parameter += by


@pytest.mark.parametrize("options", [
    {}, {"schedule": "chunked(2)"}, {"schedule": "auto"}, {"dedup": "on"}, {"mode": "static", "static_capacity": 2.0},
], ids=lambda options: "-".join(map(str, options.values())) or "serial")  # fmt: skip
@pytest.mark.parametrize("part", PARTS)
def test_another_part_on_one_rank_is_refused_by_all_in_the_first_call(part: str, options: dict) -> None:
    def run(me: SimpleNamespace) -> str:
        layer = layer_of(me, **options)
        if me.rank == 1:
            shift(layer, part, 0.1)
        with pytest.raises(PlanMismatch, match=SAID) as caught, torch.set_grad_enabled(part != "router"):
            layer(tokens(me.rank))
        return str(caught.value)

    said = virtual_world(2).run(run)
    assert all("step 1" in one for one in said) and len({re.sub(r"rank ., peer .", "", one) for one in said}) == 1


def test_equal_parts_pass_whatever_the_experts_and_after_reopening_they_are_looked_at_again() -> None:
    def run(me: SimpleNamespace) -> None:
        layer = layer_of(me)
        with torch.no_grad():
            for weight in layer.expert_weights:
                weight += me.rank
        for _ in range(5):
            layer(tokens(me.rank)).sum().backward()
        if me.rank == 0:
            shift(layer, "router", 1e-6)  # as another order of sums would
        for _ in range(5):
            layer(tokens(me.rank))
        if me.rank == 0:
            shift(layer, "router", 0.1)
        for _ in range(5):  # 11 to 15: nobody looks
            layer(tokens(me.rank))
        with pytest.raises(PlanMismatch, match=SAID + ".*step 16"):
            layer(tokens(me.rank))
        layer.transport.reopen()
        with pytest.raises(PlanMismatch, match=SAID + ".*step 1"):
            layer(tokens(me.rank))
        layer.transport.reopen()
        if me.rank == 0:
            shift(layer, "router", -0.1)
        layer(tokens(me.rank))

    virtual_world(2).run(run)


def trained(averaged: bool) -> list[str]:
    torch.manual_seed(0)
    layer = MoELayer(D, F, E, K, group=dist.group.WORLD, aux_loss_coef=0.1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for step in range(4):
        try:
            layer(tokens(dist.get_rank() + 2 * step)).square().sum().backward()
        except PlanMismatch as error:
            return [f"{step}: {error}"]
        if averaged:
            for parameter in layer.router.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    return []


@pytest.mark.parametrize("averaged", [False, True])
def test_a_loop_that_averages_no_gradients_is_told_in_its_second_step(averaged: bool) -> None:
    for errors in gloo_pool(2).run(trained, averaged):
        assert errors == [] if averaged else re.match("1: " + SAID, errors[0])


@pytest.mark.parametrize("part", ["router", "shared_expert"])
def test_a_part_that_is_meant_to_differ_says_so(part: str) -> None:
    def run(me: SimpleNamespace) -> None:
        layer = layer_of(me)
        shift(layer, part, 0.1 * me.rank)
        getattr(layer, part).differs_by_rank = True
        layer(tokens(me.rank))
        if me.rank == 1:
            shift(layer, "latent_in", 0.1)  # the others are compared
        with pytest.raises(PlanMismatch, match=SAID):
            layer(tokens(me.rank))

    virtual_world(2).run(run)


def test_one_rank_compares_nothing_and_what_is_computed_again_was_compared() -> None:
    for rank in range(2):
        torch.manual_seed(rank)
        MoELayer(D, F, E, K)(tokens(rank))

    def run(me: SimpleNamespace) -> None:
        layer = layer_of(me, shared_expert_size=None)
        block = ShortcutBlock([torch.nn.Identity()], layer, tap=0, slot=0)
        for _ in range(3):
            x = tokens(me.rank).requires_grad_()
            checkpoint(block, x, use_reentrant=False).sum().backward()

    virtual_world(2).run(run)


@pytest.mark.parametrize("call", [2, 4])
def test_calls_of_auto_are_counted_without_its_probes(call: int) -> None:
    def run(me: SimpleNamespace) -> None:
        layer = layer_of(me, schedule="auto")
        for _ in range(call - 1):
            layer(tokens(me.rank)).sum().backward()
        assert layer.dispatcher.steps > call
        if me.rank == 1:
            shift(layer, "router", 0.1)
        with pytest.raises(PlanMismatch, match=SAID):
            layer(tokens(me.rank))

    virtual_world(2).run(run)


@pytest.mark.parametrize("op", ["cat", "mul", "_to_copy", "sum", "dot"])
@pytest.mark.parametrize("options", [{}, {"dedup": "on"}], ids=["plain", "dedup"])
def test_a_checkpoint_that_keeps_results_of_an_op_takes_none_of_the_comparison(op: str, options: dict) -> None:
    def policy(_ctx, func, *_args, **_kwargs):
        kept = str(func).startswith(f"aten.{op}.")
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def run(me: SimpleNamespace) -> list[torch.Tensor]:
        layer, grads = layer_of(me, **options), []
        for _ in range(3):  # nothing is compared in the third
            x = tokens(me.rank).requires_grad_()
            context = partial(create_selective_checkpoint_contexts, policy)
            checkpoint(layer, x, use_reentrant=False, context_fn=context).square().sum().backward()
            grads.append(x.grad)
        return grads

    for first, second, third in virtual_world(2).run(run):
        same_bits(first, third)
        same_bits(second, third)
