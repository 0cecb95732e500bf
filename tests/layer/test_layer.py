"""MoELayer and tickets: behaviour of one layer on virtual ranks and on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, aux_loss, prepare
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.transport.local import LocalTransport
from tests import oracle
from tests.layers import D, E, F, K, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

# ---------------------------------------------------------------- one rank


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("schedule", ["serial", "chunked(1)", "chunked(4)", "chunked(3,experts)"])
def test_one_rank_is_the_oracle(activation, schedule):
    layer = make(activation=activation, schedule=schedule)
    x = tokens(37).requires_grad_()
    y = layer(x)
    routing = layer.router(x)
    want = oracle.moe(x, routing.topk_ids_TK, routing.topk_weights_TK, *layer.expert_weights, activation)
    close(y, want)
    seed = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    for got, expected in zip(
        torch.autograd.grad(y, inputs, seed), torch.autograd.grad(want, inputs, seed), strict=True
    ):
        close(got, expected)


def test_the_inline_path_equals_the_executor_bit_for_bit():
    inline, executed = make(), make(transport=LocalTransport())
    executed.transport.name = "local, through the executor"
    x1, x2 = tokens(29).requires_grad_(), tokens(29).requires_grad_()
    y1, y2 = inline(x1), executed(x2)
    same_bits(y1, y2)
    y1.sum().backward()
    y2.sum().backward()
    same_bits(x1.grad, x2.grad)
    for p1, p2 in zip(inline.parameters(), executed.parameters(), strict=True):
        same_bits(p1.grad, p2.grad)


def test_shapes_and_zero_tokens():
    layer = make()
    assert layer(tokens(6).reshape(2, 3, D)).shape == (2, 3, D)
    y = layer(tokens(0).requires_grad_())
    assert y.shape == (0, D)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.expert_weights)


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_autocast_computes_in_bfloat16_and_routes_in_float32(schedule):
    layer = make(dtype=torch.float32, schedule=schedule)
    x = tokens(33, dtype=torch.float32).requires_grad_()
    routing = layer.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer.router(x).topk_weights_TK, routing.topk_weights_TK)
    assert y.dtype == torch.bfloat16
    want = oracle.moe(x, routing.topk_ids_TK, routing.topk_weights_TK, *layer.expert_weights)
    close(y, want, torch.bfloat16)
    seed = torch.randn_like(want)
    got = torch.autograd.grad(y, [x, *layer.parameters()], seed.to(torch.bfloat16))
    for g, w in zip(got, torch.autograd.grad(want, [x, *layer.parameters()], seed), strict=True):
        assert g.dtype == torch.float32
        close(g, w, torch.bfloat16)


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_autocast_leaves_float64_alone(schedule):
    layer = make(schedule=schedule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(tokens(9))
    same_bits(y, layer(tokens(9)))


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_one_rank_refuses_a_recompute_that_routes_otherwise(schedule):
    class Drifting(LinearRouter):
        calls = 0

        def forward(self, x_TD, **kwargs):
            self.calls += 1
            return super().forward(x_TD * (-1) ** self.calls, **kwargs)

    layer = make(schedule=schedule, router=Drifting(D, E, K, dtype=torch.float64))
    y = checkpoint(layer, tokens(20).requires_grad_(), use_reentrant=False)
    with pytest.raises(ConfigError, match="recompute"):
        y.sum().backward()


def test_compile_fullgraph_forward_and_backward():
    layer = make(dtype=torch.float32, shared_expert_size=F)
    compiled = torch.compile(layer, fullgraph=True)
    for count in (16, 24):
        x1, x2 = (tokens(count, dtype=torch.float32).requires_grad_() for _ in range(2))
        y1, y2 = layer(x1), compiled(x2)
        close(y2, y1.double())
        (g1,), (g2,) = torch.autograd.grad(y1.sum(), x1), torch.autograd.grad(y2.sum(), x2)
        close(g2, g1.double())


def test_losses_sum_over_layers_and_clear():
    model = nn.Sequential(make(aux_loss_coef=0.01), make(aux_loss_coef=0.02, z_loss_coef=0.1), make())
    model(tokens(12))
    total = aux_loss(model)
    assert total > 0 and total.requires_grad
    assert aux_loss(model) == 0


def test_stats_and_explain():
    layer = make(capacity_factor=0.5, transport=LocalTransport(), schedule="chunked(2)")
    with pytest.raises(RuntimeError, match="no forward call"):
        layer.stats()
    layer(tokens(64).requires_grad_()).sum().backward()
    stats = layer.stats()
    assert stats.tokens_per_expert.dtype == torch.int64 and stats.tokens_per_expert.shape == (E,)
    assert int(stats.tokens_per_expert.sum()) + stats.dropped_tokens == 64 * K
    assert stats.dropped_tokens > 0 and stats.payload_bytes == 0 and stats.overload == 1.0
    with pytest.raises(AttributeError):
        stats.schedule = "other"
    text = layer.explain()
    for part in ("P .  E0 E1", "Ut", "simulated from the last measured durations", "expert_mlp"):
        assert part in text, text


# ---------------------------------------------------------------- several ranks


@pytest.mark.parametrize("schedule", ["serial", "chunked(3)"])
def test_payload_is_what_goes_to_other_ranks_and_what_returns_to_them(schedule):
    def rank(me):
        layer = make(me.transport(), schedule=schedule)
        layer(tokens([5, 11][me.rank], me.rank))
        return layer.last_exchange.counts.table.sum(axis=1), layer.stats().payload_bytes  # rows [W, P]; bytes

    results = virtual_world(2).run(rank)
    half = E // 2  # slots 0..half-1 are on rank 0
    for me, (rows, payload_bytes) in enumerate(results):
        theirs = slice(half, E) if me == 0 else slice(0, half)
        own = slice(0, half) if me == 0 else slice(half, E)
        sent, returned = int(rows[me, theirs].sum()), int(rows[1 - me, own].sum())
        assert 0 < sent != returned > 0
        assert payload_bytes == (sent + returned) * D * 8  # float64
    assert [int(n) for n in results[0][0].sum(axis=1)] == [5 * K, 11 * K]


def single_process_gradients(counts):
    """The same model on one rank, all tokens in one batch, loss = mean over ranks of the ranks' mean losses."""
    layer = make()
    losses = [layer(tokens(count, rank)).square().mean() for rank, count in enumerate(counts)]
    (sum(losses) / len(counts)).backward()
    return {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("schedule", ["serial", "chunked(3)"])
def test_initial_weights_and_mean_gradients_do_not_depend_on_the_number_of_ranks(world, schedule):
    counts = [5, 9, 0, 7][:world] if world == 4 else [5, 9]
    counts = [max(count, 1) for count in counts]
    want = single_process_gradients(counts)

    def rank(me):
        layer = make(me.transport(), schedule=schedule)
        prepare(layer)
        layer(tokens(counts[me.rank], me.rank)).square().mean().backward()
        return {name: p.grad for name, p in layer.named_parameters()}

    results = virtual_world(world).run(rank)
    close(sum(r["router.weight"] for r in results) / world, want["router.weight"])
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        close(torch.cat([r[name] for r in results]), want[name])


def test_prepare_names_the_experts_that_ranks_share_out():
    def rank(me):
        model = nn.Sequential(make(me.transport()), nn.Linear(D, D), make(), make(me.transport(), activation="relu"))
        assert prepare(model) is model
        return set(model._ddp_params_and_buffers_to_ignore)

    want = {"0.experts.gate_up_proj", "0.experts.down_proj", "3.experts.up_proj", "3.experts.down_proj"}
    assert virtual_world(2).run(rank) == [want] * 2
    alone = prepare(make())
    assert alone._ddp_params_and_buffers_to_ignore == []


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)", "chunked(2,experts)"])
def test_a_rank_whose_input_needs_no_gradient_still_takes_part(schedule):
    def rank(me, everywhere):
        layer = make(me.transport(), schedule=schedule)
        x = tokens(6, me.rank)
        x.requires_grad_(everywhere or me.rank == 1)
        layer(x).square().sum().backward()
        return x.grad, *[p.grad for p in layer.parameters()]

    partly = virtual_world(2).run(lambda me: rank(me, False))
    wholly = virtual_world(2).run(lambda me: rank(me, True))
    assert partly[0][0] is None
    for some, all_ in zip(partly, wholly, strict=True):
        for got, want in zip(some, all_, strict=True):
            if got is not None:
                same_bits(got, want)


@pytest.mark.parametrize("overlap", [True, False])
def test_overlap_off_waits_for_every_exchange_before_anything_else(overlap):
    """The baseline of every speed-up: were it overlapped by mistake, no result would tell."""

    def rank(me):
        layer = make(me.transport(), schedule="chunked(2)", overlap=overlap)
        log, start = [], layer.transport.start

        def logged_start(*args, action, **kwargs):
            log.append(f"start {action}")
            work = start(*args, action=action, **kwargs)
            wait = work.wait
            work.wait = lambda: (log.append(f"wait {action}"), wait())[1]
            return work

        layer.transport.start = logged_start
        layer(tokens(6, me.rank).requires_grad_()).sum().backward()
        return log

    for log in virtual_world(2).run(rank):
        started = [i for i, entry in enumerate(log) if entry.startswith("start")]
        assert len(started) == 8
        joined = [log[i + 1] == log[i].replace("start", "wait") for i in started]
        assert all(joined) if not overlap else not any(joined[:1]), log


@pytest.mark.parametrize(("wanted_by", "exchanges"), [((), 3), ((1,), 4), ((0, 1), 4)])
def test_input_gradients_are_exchanged_only_where_some_rank_wants_them(wanted_by, exchanges):
    def rank(me):
        layer = make(me.transport(), schedule="chunked(2)")
        layer(tokens(6, me.rank).requires_grad_(me.rank in wanted_by)).sum().backward()
        return layer.transport.stats.exchanges

    assert virtual_world(2).run(rank) == [2 * exchanges] * 2


def test_frozen_experts_still_pass_the_input_gradient():
    def rank(me, frozen):
        layer = make(me.transport(), schedule="chunked(2)")
        for weight in layer.expert_weights:
            weight.requires_grad_(not frozen)
        x = tokens(6, me.rank).requires_grad_()
        layer(x).square().sum().backward()
        assert (layer.experts.down_proj.grad is None) == frozen
        return x.grad

    for got, want in zip(
        virtual_world(2).run(lambda me: rank(me, True)), virtual_world(2).run(lambda me: rank(me, False)), strict=True
    ):
        same_bits(got, want)


def test_a_loss_that_does_not_reach_the_layer_is_attached():
    def rank(me, attach):
        layer = make(me.transport(), schedule="chunked(2)")
        x = tokens(6, me.rank).requires_grad_()
        y = layer(x)
        if me.rank == 0:
            (y.square().sum() if not attach else layer.attach(x.square().sum())).backward()
        else:
            y.square().sum().backward()
        return [p.grad for p in layer.expert_weights], x.grad

    attached = virtual_world(2).run(lambda me: rank(me, True))
    x0 = tokens(6, 0)
    same_bits(attached[0][1], 2 * x0)
    # Rank 0's experts still have the gradients of rank 1's tokens, and only those.
    alone = virtual_world(2).run(lambda me: only_rank_one(me))
    for got, want in zip(attached, alone, strict=True):
        for g, w in zip(got[0], want, strict=True):
            assert torch.equal(g, w)  # not bit for bit: a zero gradient may be -0.0
    assert attached[0][0][0].any()


def only_rank_one(me):
    layer = make(me.transport(), schedule="chunked(2)")
    y = layer(tokens(6, me.rank).requires_grad_())
    (y.square().sum() * me.rank).backward()
    return [p.grad for p in layer.expert_weights]


def test_a_loss_that_reaches_the_input_only_runs_the_pending_exchanges_with_zeros():
    """The auxiliary loss goes through the router to the layer's entry, past the experts."""

    def rank(me):
        layer = make(me.transport(), schedule="chunked(2)", aux_loss_coef=0.1)
        x = tokens(6, me.rank).requires_grad_()
        y = layer(x)
        (layer.take_aux_loss() if me.rank == 0 else y.square().sum()).backward()
        return [p.grad for p in layer.expert_weights]

    for got, want in zip(virtual_world(2).run(rank), virtual_world(2).run(only_rank_one), strict=True):
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)


def test_a_rank_whose_loss_does_not_reach_the_layer_at_all_is_named():
    def rank(me):
        layer = make(me.transport())
        y = layer(tokens(6, me.rank).requires_grad_())
        if me.rank == 1:
            y.sum().backward()

    with pytest.raises(Exception, match="attach"):
        virtual_world(2).run(rank)


def test_backward_twice_with_retain_graph_and_gradient_accumulation():
    def rank(me):
        layer = make(me.transport(), schedule="chunked(2)")
        x = tokens(6, me.rank).requires_grad_()
        loss = layer(x).square().sum()
        loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in layer.parameters()]
        loss.backward()
        for p, g in zip(layer.parameters(), first, strict=True):
            close(p.grad, 2 * g)
        for _ in range(2):
            layer(tokens(4, me.rank)).sum().backward()

    virtual_world(2).run(rank)


def test_one_layer_used_twice_and_two_layers_interleaved():
    def rank(me, twice):
        torch.manual_seed(1)
        layer = make(me.transport(), schedule="chunked(2)")
        other = layer if twice else make(me.transport(), schedule="chunked(3)")
        x = tokens(6, me.rank).requires_grad_()
        (other(layer(x)) * layer(x)).sum().backward()
        return x.grad

    for twice in (True, False):
        first, second = (virtual_world(2, seed=s).run(lambda me, t=twice: rank(me, t)) for s in (1, 2))
        for a, b in zip(first, second, strict=True):
            same_bits(a, b)


def test_double_backward_is_refused():
    layer = make(schedule="chunked(2)")
    x = tokens(4).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---------------------------------------------------------------- tickets


def test_tickets_equal_the_layer_and_refuse_misuse():
    def rank(me):
        plain, staged = make(me.transport(), schedule="chunked(2)"), make(me.transport(), schedule="chunked(2)")
        x1, x2 = (tokens(7, me.rank).requires_grad_() for _ in range(2))
        y1 = plain(x1)
        ticket = staged.begin(x2)
        between = (x2 * 2).tanh()
        with pytest.raises(RuntimeError, match="begun"):
            staged.finish(ticket)
        with pytest.raises(RuntimeError, match="finish it"):
            staged.begin(x2)
        staged.run_experts(ticket)
        with pytest.raises(RuntimeError, match="computed"):
            staged.run_experts(ticket)
        y2 = staged.finish(ticket)
        with pytest.raises(RuntimeError, match="finished"):
            staged.finish(ticket)
        same_bits(y1, y2)
        (y1.square().sum() + (x1 * 2).tanh().sum()).backward()
        (y2.square().sum() + between.sum()).backward()
        for p1, p2 in zip(plain.parameters(), staged.parameters(), strict=True):
            same_bits(p1.grad, p2.grad)
        close(x1.grad, x2.grad)

    virtual_world(2).run(rank)
