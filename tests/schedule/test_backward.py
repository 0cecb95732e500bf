"""The backward schedule as executed by autograd: order, checkpointing, hooks, gradients by finite differences."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint, create_selective_checkpoint_contexts

from moe_overlap import ConfigError, MoELayer, RemoteAbort, ShortcutBlock, sac_policy
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import chunked, window
from moe_overlap.schedule.check import check
from moe_overlap.schedule.recorder import record
from tests.ranks import virtual_world
from tests.tolerances import same_bits

D, F, E = 8, 12, 4


class Op(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.linear = nn.Linear(D, D, dtype=torch.float64)
        self.checkpointed = checkpointed
        self.calls = 0

    def body(self, h):
        self.calls += 1
        return h + torch.tanh(self.linear(h))

    def forward(self, h):
        return checkpoint(self.body, h, use_reentrant=False) if self.checkpointed else self.body(h)


def make_block(me, *, tap=0, slot=1, backward_slot=None, chunks=1, backward_chunks=None, overlap=True,
               checkpointed=False, router=None):  # fmt: skip
    torch.manual_seed(2)
    moe = MoELayer(D, F, E, 1, transport=me.transport(), dtype=torch.float64, router=router)
    return ShortcutBlock(
        [Op(checkpointed) for _ in range(3)],
        moe,
        tap=tap,
        slot=slot,
        backward_slot=backward_slot,
        chunks=chunks,
        backward_chunks=backward_chunks,
        overlap=overlap,
        shared_expert=nn.Linear(D, D, bias=False, dtype=torch.float64),
    )


def run(me, mode="none", **options):
    """(executed backward actions, gradients, transport statistics, block) of one rank."""
    block = make_block(me, checkpointed=mode == "op", **options)
    x = torch.randn(
        9 + me.rank, D, dtype=torch.float64, generator=torch.Generator().manual_seed(me.rank)
    ).requires_grad_()
    with record() as events:
        y = checkpoint(block, x, use_reentrant=False) if mode == "block" else block(x)
        (y * y).sum().backward()
    executed = [event.action for event in events if event.phase == "backward" and event.lane == "comp"]
    return executed, [y.detach(), x.grad, *(p.grad for p in block.parameters())], block.moe.transport.stats, block


def executed_as_planned(executed, block):
    planned = [action.text for action in block.schedule.backward if action.lane == "comp"]
    return executed == planned


@pytest.mark.parametrize("mode", ["none", "op", "block"])
@pytest.mark.parametrize(("chunks", "backward_chunks"), [(1, 1), (3, 3), (1, 4)])
@pytest.mark.parametrize("tap", [0, 1, 2])
def test_the_engine_executes_the_backward_schedule(tap, chunks, backward_chunks, mode):
    for slot in range(5 - tap):
        for backward_slot in {None, 0, 4 - tap}:
            for executed, _, _, block in virtual_world(2).run(
                lambda me, s=slot, b=backward_slot: run(
                    me, mode, tap=tap, slot=s, backward_slot=b, chunks=chunks, backward_chunks=backward_chunks
                )
            ):
                assert executed_as_planned(executed, block), (executed, block.schedule.backward.text)


WRITTEN_BY_HAND = (
    "Ut Ct0 Ct1 Ct2 Bt3 Ed0 Dt0 Bt2 Ed1 Dt1 Bt1 Ed2 Dt2 Ew0 Bt0 Ew1 Pt",
    "Ut Ct0 Ct1 Ct2 Ed0 Ed1 Ed2 Ew1 Dt0 Ew0 Dt1 Dt2 Pt Bt3 Bt2 Bt1 Bt0",
    "Bt3 Ut Bt2 Ct0 Ct2 Bt1 Ct1 Ed2 Ed1 Dt1 Ed0 Dt2 Dt0 Ew0 Bt0 Pt",
)


@pytest.mark.parametrize("mode", ["none", "op", "block"])
@pytest.mark.parametrize("text", WRITTEN_BY_HAND)
def test_any_valid_backward_program_is_executed_as_written(text, mode):
    """Ops between the chunks, weight gradients in groups and early, exchanges in another order."""
    pair = window(4, 1, chunks=2)
    planned = replace(pair, backward=Schedule.parse(text), backward_chunks=3)
    check(planned)

    def rank(me, schedule):
        block = make_block(me, checkpointed=mode == "op")
        block.schedule = schedule
        x = torch.randn(9 + me.rank, D, dtype=torch.float64, generator=torch.Generator().manual_seed(me.rank))
        x.requires_grad_()
        with record() as events:
            y = checkpoint(block, x, use_reentrant=False) if mode == "block" else block(x)
            (y * y).sum().backward()
        executed = [event.action for event in events if event.phase == "backward" and event.lane == "comp"]
        return executed, [y.detach(), x.grad, *(p.grad for p in block.parameters())], block

    on = virtual_world(2).run(lambda me: rank(me, planned))
    off = virtual_world(2).run(lambda me: rank(me, planned.join()))
    mirrored = virtual_world(2).run(lambda me: rank(me, pair))
    for (executed, grads, block), (_, joined, _), (_, usual, _) in zip(on, off, mirrored, strict=True):
        assert executed_as_planned(executed, block)
        for got, same, near in zip(grads, joined, usual, strict=True):
            same_bits(got, same)
            torch.testing.assert_close(got, near, rtol=1e-12, atol=1e-12)


def test_weight_gradients_beside_the_last_exchange_or_before_it_are_the_same():
    def rank(me, schedule):
        torch.manual_seed(2)
        moe = MoELayer(D, F, E, 2, transport=me.transport(), schedule=schedule)
        x = torch.randn(11, D, generator=torch.Generator().manual_seed(me.rank)).requires_grad_()
        moe(x).square().sum().backward()
        return [x.grad, *(p.grad for p in moe.parameters())]

    for chunks in (1, 3):
        beside, before = (chunked(chunks, defer_weight_grads=defer) for defer in (True, False))
        assert beside.backward.text.endswith("Ew0 Pt") and f"Ew0 Dt{chunks - 1} Pt" in before.backward.text
        check(before)
        for got, want in zip(
            virtual_world(2).run(lambda me, s=beside: rank(me, s)),
            virtual_world(2).run(lambda me, s=before: rank(me, s)),
            strict=True,
        ):
            for a, b in zip(got, want, strict=True):
                same_bits(a, b)


def test_exchanges_run_between_the_backwards_of_the_ops():
    """The adjoint combine is under way while Bt2 and Bt1 run: its start comes before them, its wait after."""

    def rank(me):
        block = make_block(me, tap=1, slot=1)
        order = []
        start = block.moe.transport.start

        def note(*args, action, **kwargs):
            order.append(f"start {action}")
            return start(*args, action=action, **kwargs)

        block.moe.transport.start = note
        for i, op in enumerate(block.backbone):
            op.register_full_backward_hook(lambda *_, i=i: order.append(f"B{i}t done"))
        block(torch.randn(5, D, dtype=torch.float64, requires_grad=True)).sum().backward()
        return order

    for order in virtual_world(2).run(rank):
        assert order == [
            "start D0",
            "start C0",
            "start Ct0",
            "B3t done",
            "B2t done",
            "start Dt0",
            "B1t done",
            "B0t done",
        ]


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("slot", [0, 1, 3])
def test_checkpointing_changes_no_bit_and_recomputes_once(slot, chunks):
    def gradients(mode):
        return virtual_world(2, seed=4).run(lambda me: run(me, mode, tap=1, slot=slot, chunks=chunks))

    plain = gradients("none")
    for mode, calls, agreements, exchanges in (("op", 2, 1, 4), ("block", 2, 2, 6)):
        for (_, want, _, _), (_, got, stats, block) in zip(plain, gradients(mode), strict=True):
            for g, w in zip(got, want, strict=True):
                same_bits(g, w)
            assert [op.calls for op in block.backbone[:3]] == [calls] * 3
            assert (stats.agreements, stats.exchanges) == (agreements, exchanges * chunks)


@contextmanager
def count_gates():
    """The calls of gate_topk's kernel in this thread."""
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.moe_overlap.gate_topk.default:
                calls.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        yield calls


def test_selective_checkpointing_keeps_the_routing():
    def rank(me, selective):
        block = make_block(me, tap=1, slot=1)
        x = torch.randn(6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(me.rank)).requires_grad_()
        context = {"context_fn": partial(create_selective_checkpoint_contexts, sac_policy())} if selective else {}
        y = checkpoint(block, x, use_reentrant=False, **context) if selective else block(x)
        with count_gates() as gates:
            y.square().sum().backward()
        assert not gates, "the router's choice was made again"
        return [x.grad, *(p.grad for p in block.parameters())]

    for got, want in zip(
        virtual_world(2).run(lambda me: rank(me, True)), virtual_world(2).run(lambda me: rank(me, False)), strict=True
    ):
        for g, w in zip(got, want, strict=True):
            same_bits(g, w)


def test_a_reentrant_checkpoint_is_refused():
    def rank(me):
        block = make_block(me)
        x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
        y = checkpoint(block, x, use_reentrant=True)
        with pytest.raises(ConfigError, match="use_reentrant"):
            y.sum().backward()

    virtual_world(2).run(rank)


class Drifting(LinearRouter):
    """A router that chooses otherwise when asked again."""

    calls = 0

    def forward(self, x_TD, **kwargs):
        self.calls += 1
        return super().forward(x_TD * (-1) ** self.calls, **kwargs)


@pytest.mark.parametrize(("world", "error"), [(1, ConfigError), (2, (ConfigError, CheckpointError))])
def test_a_recompute_that_routes_otherwise_is_refused(world, error):
    """On one rank all shapes stay the same and only the digest tells; on two, torch may see other shapes first."""

    def rank(me):
        torch.manual_seed(0)
        block = make_block(me, router=Drifting(D, E, 1, dtype=torch.float64))
        x = torch.randn(50, D, dtype=torch.float64, requires_grad=True)
        y = checkpoint(block, x, use_reentrant=False)
        y.sum().backward()

    with pytest.raises(error, match=r"(?i)recompute"):
        virtual_world(world).run(rank)


def test_statistics_and_losses_count_a_recomputed_step_once():
    def rank(me):
        torch.manual_seed(0)
        moe = MoELayer(D, F, E, 1, transport=me.transport(), dtype=torch.float64, aux_loss_coef=0.1)
        x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
        y = checkpoint(moe, x, use_reentrant=False)
        loss = moe.take_aux_loss()
        (y.sum() + loss).backward()
        assert moe.take_aux_loss() is None
        return moe.dispatcher.steps

    assert virtual_world(2).run(rank) == [1, 1]


def test_a_layer_in_a_block_reports_the_schedule_it_ran():
    def rank(me):
        block = make_block(me, tap=1, slot=1)
        block(torch.randn(5, D, dtype=torch.float64, requires_grad=True)).sum().backward()
        return block.moe.stats().schedule, block.moe.explain()

    for schedule, text in virtual_world(2).run(rank):
        assert schedule == "P D0 B0 E0 C0 B1 B2 U"
        assert "comp | P B0 E0 B1 B2 U" in text and "not measured" not in text


@pytest.mark.parametrize("tap", [0, 4])
def test_backward_does_not_write_into_the_gradient_it_is_given(tap):
    """With nothing after the tap, the gradient of the backbone's output is the caller's own tensor."""

    def rank(me):
        x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
        y = make_block(me, tap=tap, slot=0)(x)
        dy = torch.randn_like(y)
        before = dy.clone()
        y.backward(dy)
        same_bits(dy, before)

    virtual_world(2).run(rank)


def test_weight_gradients_by_groups_of_experts_anywhere_after_their_rows():
    """A hand-written backward: Ew1 before the exchanges are waited for, Ew0 and an empty group last."""

    def rank(me, backward):
        torch.manual_seed(1)
        pair = chunked(2)
        if backward:
            pair = replace(pair, name="by hand", backward=Schedule.parse(backward))
        layer = MoELayer(D, F, E, 2, transport=me.transport(), schedule=pair, dtype=torch.float64)
        x = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(me.rank)).requires_grad_()
        with record() as events:
            layer(x).square().sum().backward()
        order = [event.action for event in events if event.phase == "backward" and event.lane == "comp"]
        return order, [x.grad, *(p.grad for p in layer.parameters())]

    by_hand = "Ut Ct0 Ct1 Ed0 Dt0 Ed1 Dt1 Ew1 Ew2 Pt Ew0"
    want = virtual_world(2).run(lambda me: rank(me, None))
    for (order, got), (_, plain) in zip(virtual_world(2).run(lambda me: rank(me, by_hand)), want, strict=True):
        assert order == ["Ut", "Ed0", "Ed1", "Ew1", "Ew2", "Pt", "Ew0"]
        for g, w in zip(got, plain, strict=True):
            same_bits(g, w)


def test_an_error_before_the_tap_reaches_the_peers_at_once():
    def rank(me):
        block = make_block(me, tap=1, slot=1)
        if me.rank == 1:
            block.backbone[0].body = lambda h: h @ torch.zeros(1)
        x = torch.randn(5, D, dtype=torch.float64)
        with pytest.raises(RuntimeError if me.rank == 1 else RemoteAbort):
            block(x)

    virtual_world(2).run(rank)


def test_parameter_hooks_see_complete_gradients():
    def rank(me):
        block = make_block(me, tap=1, slot=1, chunks=2)
        seen = {}
        for name, parameter in block.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, n=name: seen.__setitem__(n, p.grad.clone()))
        block(torch.randn(5, D, dtype=torch.float64, requires_grad=True)).sum().backward()
        for name, parameter in block.named_parameters():
            same_bits(seen[name], parameter.grad)

    virtual_world(2).run(rank)


# ---------------------------------------------------------------- finite differences over all ranks at once


class AllRanks(torch.autograd.Function):
    """y of all ranks as one function of all ranks' inputs and weights: each rank's graph lives in its own thread."""

    @staticmethod
    def forward(ctx, body, world, *tensors):
        ctx.body, ctx.world = body, world
        ctx.save_for_backward(*tensors)
        return torch.cat(virtual_world(world).run(lambda me: body(me, *tensors).detach()))

    @staticmethod
    def backward(ctx, dy):
        tensors = ctx.saved_tensors

        def rank(me):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in tensors]
                y = ctx.body(me, *leaves)
                first = sum(ctx.body.counts[: me.rank])
                return torch.autograd.grad(y, leaves, dy[first : first + y.shape[0]], allow_unused=True)

        grads = virtual_world(ctx.world).run(rank)
        summed = []
        for column in zip(*grads, strict=True):
            parts = [g for g in column if g is not None]
            summed.append(sum(parts[1:], parts[0]) if parts else None)
        return (None, None, *summed)


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)", "chunked(3,experts)"])
@pytest.mark.parametrize(("world", "counts"), [(1, [4]), (2, [3, 2]), (2, [4, 0]), (4, [2, 1, 0, 3])])
@pytest.mark.parametrize("dedup", ["off", "on"])
def test_gradcheck_over_all_ranks(dedup, world, counts, schedule):
    """One function of all ranks' inputs and of all weights, router included; weights are shared, tokens are not."""
    d, f, e, k = (3, 4, 4, 2) if dedup == "off" else (3, 4, 8, 5)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    def body(me, router_weight, w_in, w_out, *xs):
        layer = MoELayer(d, f, e, k, transport=me.transport(), schedule=schedule, dedup=dedup, dtype=torch.float64)
        local = slice(me.rank * e // world, (me.rank + 1) * e // world)
        layer.router.weight = None
        experts = layer.experts
        del experts._parameters["gate_up_proj"], experts._parameters["down_proj"], layer.router._parameters["weight"]
        layer.router.weight, experts.gate_up_proj, experts.down_proj = router_weight, w_in[local], w_out[local]
        return layer(xs[me.rank])

    body.counts = counts
    xs = [draw(count, d) for count in counts]
    arguments = (draw(e, d), draw(e, 2 * f, d), draw(e, d, f), *xs)
    assert torch.autograd.gradcheck(lambda *t: AllRanks.apply(body, world, *t), arguments, fast_mode=True)
