"""The row buffers of a step come from the workspace pool: no number is read that was not written, and none changes
while somebody can still read it. Here every tensor, however small, comes from the pool, and fresh memory holds NaN."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_overlap import RemoteAbort
from moe_overlap.layer.functional import moe_forward
from moe_overlap.ops import workspace
from moe_overlap.schedule import rows
from tests.layers import make, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

SCHEDULES = ["serial", "chunked(2)", "chunked(3,experts)"]


@pytest.fixture(autouse=True)
def pooled(monkeypatch, poison):
    monkeypatch.setattr(workspace, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(workspace, "POOL", workspace.Workspace())
    return workspace.POOL


@pytest.fixture
def unpooled(monkeypatch):
    """`unpooled(fn)`: what fn() gives where every buffer is new."""

    class Fresh:
        @staticmethod
        def empty(shape, *, like, dtype=None, rows=True):
            return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)

    def run(function):
        with monkeypatch.context() as patched:
            patched.setattr(rows, "workspace", Fresh)
            return function()

    return run


def check(unpooled, rank, world=2):
    """The results of `rank` on every rank, pooled, twice in a row, are those of new buffers, bit for bit."""
    want = unpooled(lambda: virtual_world(world).run(rank))
    for _ in range(2):
        for got, expected in zip(virtual_world(world).run(rank), want, strict=True):
            for one, other in zip(got, expected, strict=True):
                same_bits(one, other)
                assert one.isfinite().all()


def gradients(layer, x):
    return [x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]


def build(me, world, schedule):
    # One rank with one chunk would run inline: it has no buffers of this kind.
    return make(me.transport() if world > 1 else None, schedule="chunked(2)" if world == 1 else schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", [1, 2])
def test_steps_of_changing_sizes(unpooled, world, schedule):
    def rank(me):
        layer, results = build(me, world, schedule), []
        for count in (7, 3, 0, 9, 7):
            x = tokens(count + me.rank, me.rank).requires_grad_()
            layer.zero_grad()
            y = layer(x)
            y.square().sum().backward()
            results += [y.detach().clone(), *gradients(layer, x)]
        return results

    check(unpooled, rank, world)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_graph_that_is_retained_gives_the_same_gradients_after_other_steps(unpooled, schedule):
    def rank(me):
        layer = build(me, 2, schedule)
        x = tokens(7, me.rank).requires_grad_()
        loss = layer(x).square().sum()
        results = []
        for _ in range(3):
            layer.zero_grad()
            x.grad = None
            loss.backward(retain_graph=True)
            results += gradients(layer, x)
            layer(tokens(9, 5).requires_grad_()).sum().backward()  # takes whatever is free
        for first, third in zip(results[: len(results) // 3], results[-len(results) // 3 :], strict=True):
            same_bits(first, third)
        return results

    check(unpooled, rank)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:4])
def test_several_steps_under_way_in_any_order(unpooled, order):
    def rank(me):
        layer = build(me, 2, "chunked(2)")
        inputs = [tokens(5 + n, n).requires_grad_() for n in range(3)]
        outputs = [layer(x) for x in inputs]
        kept = [y.detach().clone() for y in outputs]
        results = []
        for n in order:
            layer.zero_grad()
            outputs[n].square().sum().backward()
            results += gradients(layer, inputs[n])
        for y, before in zip(outputs, kept, strict=True):
            same_bits(y.detach(), before)
        return [*results, *kept]

    check(unpooled, rank)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_recompute(unpooled, schedule):
    def rank(me):
        layer = build(me, 2, schedule)
        x = tokens(7, me.rank).requires_grad_()
        y = checkpoint(layer, checkpoint(layer, x, use_reentrant=False), use_reentrant=False)
        y.square().sum().backward()
        return [y.detach(), *gradients(layer, x)]

    check(unpooled, rank)


def test_a_gradient_that_is_kept_is_not_written_again(unpooled):
    """A parameter takes a gradient over without a copy; so may the caller."""

    def rank(me):
        layer = build(me, 2, "chunked(2)")
        kept = []
        for n in range(4):
            layer.zero_grad()
            layer(tokens(6, n).requires_grad_()).square().sum().backward()
            kept.append([p.grad for p in layer.parameters()])
        layer.zero_grad()
        for n in range(2):  # and accumulated ones
            layer(tokens(6, n).requires_grad_()).square().sum().backward()
        return [grad for grads in (*kept, [p.grad for p in layer.parameters()]) for grad in grads]

    check(unpooled, rank)


def test_a_step_that_fails_in_the_middle_gives_its_memory_back_and_spoils_nothing(unpooled, pooled):
    def rank(me):
        layer = make(me.transport(), schedule="shared_expert(1)", shared_expert_size=8)
        x = tokens(7, me.rank).requires_grad_()
        results = []
        for _ in range(3):
            layer.zero_grad()
            x.grad = None
            y = layer(x)
            forward = layer.shared_expert.forward
            if me.rank == 0:
                layer.shared_expert.forward = None
            with pytest.raises(TypeError if me.rank == 0 else RemoteAbort):
                layer(tokens(9, 4).requires_grad_())
            layer.shared_expert.forward = forward
            del y
            layer.transport.reopen()
            y = layer(x)
            y.square().sum().backward()
            results += [y.detach().clone(), *gradients(layer, x)]
        return results

    check(unpooled, rank)


def test_the_buffers_come_from_the_pool(unpooled, pooled):
    def rank(me):
        layer = build(me, 2, "chunked(2)")
        before = pooled.stats().created
        layer(tokens(7, me.rank).requires_grad_()).sum().backward()
        return pooled.stats().created - before

    assert min(virtual_world(2).run(rank)) > max(unpooled(lambda: virtual_world(2).run(rank)))


def test_memory_does_not_grow_with_the_steps(pooled):
    def rank(me):
        layer = build(me, 2, "chunked(2)")
        for n in range(30):
            layer.zero_grad()
            layer(tokens(7, n % 3).requires_grad_()).sum().backward()
            if n == 9:
                before = pooled.stats().held_bytes
        return before, pooled.stats().held_bytes

    for before, after in virtual_world(2).run(rank):
        assert after <= 1.2 * before


def test_the_functional_form(unpooled):
    def rank(me):
        half = [w.detach()[4 * me.rank : 4 * me.rank + 4].clone().requires_grad_() for w in make().expert_weights]
        transport, results = me.transport(), []
        for n in range(3):
            x = tokens(6, n + me.rank).requires_grad_()
            routing = make().router(x.detach())
            y = moe_forward(x, routing.topk_ids_TK, routing.topk_weights_TK.detach(), *half, transport=transport)
            results += [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *half])]
        return results

    check(unpooled, rank)


def on_gloo(pool):
    """Steps of one rank of a gloo world, every buffer from the pool or none."""
    from moe_overlap import MoELayer

    smallest, workspace.SMALLEST_BYTES = workspace.SMALLEST_BYTES, 1 if pool else 1 << 40
    try:
        torch.manual_seed(3)
        layer = MoELayer(16, 24, 8, 2, group=torch.distributed.group.WORLD, schedule="chunked(2)", dtype=torch.float64)
        results = []
        for n in range(4):
            layer.zero_grad()
            x = tokens(5 + n, n + layer.transport.rank).requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            results += [y.detach().numpy(), x.grad.numpy(), *(p.grad.clone().numpy() for p in layer.parameters())]
        layer.transport.close("the test is over")
        return results
    finally:
        workspace.SMALLEST_BYTES = smallest


def test_ranks_that_are_processes():
    pooled, fresh = (gloo_pool(2).run(on_gloo, pool) for pool in (True, False))
    for got, want in zip(pooled, fresh, strict=True):
        for one, other in zip(got, want, strict=True):
            same_bits(torch.from_numpy(one), torch.from_numpy(other))


@pytest.mark.parametrize("payload", [None, torch.bfloat16])
def test_rows_of_one_rank_that_are_in_order_are_not_moved(monkeypatch, payload):
    """Exchanges give back the rows themselves (the local transport) or memory of their own (a virtual rank)."""

    def step(transport, schedule):
        layer = make(transport, schedule=schedule, payload_dtype=payload, dtype=torch.float32)
        x = tokens(11, dtype=torch.float32).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        return [y.detach(), *gradients(layer, x)]

    def moved(*_, **__):
        raise AssertionError("rows were moved")

    want = step(None, "chunked(3)")
    with monkeypatch.context() as patched:
        patched.setattr(rows.raw, "pack", moved)
        patched.setattr(rows.raw, "unpack_into", moved)
        found = [step(None, "chunked(3,experts)")]
        for schedule in ("chunked(3,experts)", "serial"):
            found += virtual_world(1).run(lambda me, schedule=schedule: step(me.transport(), schedule))
        with pytest.raises(AssertionError, match="moved"):
            step(None, "chunked(3)")
    for got, other in zip(*found[:2], strict=True):
        same_bits(got, other)
    for one in found:  # matmuls of other shapes round differently
        for got, expected in zip(one, want, strict=True):
            close(got, expected)
