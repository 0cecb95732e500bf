"""Work beside the agreement (N): the same bits in the order that was planned, and errors as elsewhere.

`tests/equality.py` has schedules with ops ahead, and routers that read an earlier state, for every dtype and load.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, MoELayer, PlanMismatch, RemoteAbort, ShortcutBlock, aux_loss
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.builders import agree_ahead, chunked
from moe_overlap.schedule.recorder import record
from tests import oracle
from tests.auto.planted import cost_model, measured_as
from tests.layers import D, E, F, make, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits


class Op(nn.Module):
    """h + tanh(h w); calls `before` first."""

    def __init__(self, before=None):
        super().__init__()
        self.linear = nn.Linear(D, D, dtype=torch.float64)
        self.before = before

    def forward(self, h):
        if self.before is not None:
            self.before()
        return h + torch.tanh(self.linear(h))


def block(transport, *, moe=None, before=None, ops=4, tap=1, slot=1, **options):
    """`before` is called in the op right after the tap of the router."""
    moe = make(transport, **(moe or {}))
    torch.manual_seed(5)
    first = options.get("router_tap", tap)
    made = [Op(before if i == first else None) for i in range(ops)]
    return ShortcutBlock(made, moe, tap=tap, slot=None if "schedule" in options else slot, **options)


def step(model, rank, mode="none"):
    """(results, events) of a step."""
    x = tokens(9 + 3 * rank, seed=rank).requires_grad_()
    with record() as events:
        y = checkpoint(model, x, use_reentrant=False) if mode == "checkpoint" else model(x)
        y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())], events


CASES = {
    "one chunk": {},
    "three chunks": {"chunks": 3},
    "groups of experts": {"chunks": 2, "by": "experts", "backward_chunks": 3},
    "deduplicated": {"moe": {"dedup": "on", "top_k": 4}, "chunks": 2},
    "deduplicated where it pays": {"moe": {"dedup": "auto", "top_k": 4}},
    "does not pay": {"moe": {"dedup": "auto", "top_k": 1}, "chunks": 2},
}


@pytest.mark.parametrize("mode", ["none", "checkpoint"])
@pytest.mark.parametrize("case", CASES)
def test_bits_and_backward_are_those_without(case, mode):
    def rank(me, **options):
        model = block(me.transport(), **{**CASES[case], **options})
        results, events = step(model, me.rank, mode)
        back = [e.action for e in events if e.phase == "backward" and e.lane == "comp"]
        assert back == [a.text for a in model.moe._last_step.pair.backward if a.lane == "comp"]
        return results

    want = virtual_world(2).run(lambda me: rank(me))
    for options in ({"ahead": 1}, {"ahead": 3}, {"ahead": 2, "overlap": False}):
        for got, results in zip(virtual_world(2, seed=7).run(lambda me, o=options: rank(me, **o)), want, strict=True):
            for a, b in zip(got, results, strict=True):
                same_bits(a, b)


def forward_order(events):
    """What a rank did in forward, in the order in which it was over; N when it was waited for."""
    mine = [e for e in events if e.phase == "forward" and (e.lane == "comp" or (e.action, e.lane) == ("N", "wait"))]
    return [e.action for e in sorted(mine, key=lambda e: e.end_s)]


@pytest.mark.parametrize("dedup", ["off", "on"])
def test_n_is_waited_for_after_the_ops_beside_it_and_at_once_where_joined(dedup):
    def rank(me, overlap):
        order = []
        transport = me.transport()
        begin = transport.begin_agree
        transport.begin_agree = lambda said: (order.append("N begins"), begin(said))[1]
        model = block(transport, moe={"dedup": dedup, "top_k": 4}, ahead=2, overlap=overlap)
        _, events = step(model, me.rank)
        assert model.moe.stats().schedule.startswith("N B0 B1 P ") and "N B0 B1 P " in model.moe.explain()
        (on_wire,) = [e for e in events if (e.action, e.lane) == ("N", "wire")]
        first_op = next(e for e in events if e.action == "B0")
        assert order == ["N begins"] and on_wire.start_s <= first_op.start_s
        assert (on_wire.end_s > first_op.start_s) == overlap
        return forward_order(events)

    begin = {True: ["B0", "B1", "N", "P"], False: ["N", "B0", "B1", "P"]}
    for overlap, want in begin.items():
        for order in virtual_world(2).run(lambda me, o=overlap: rank(me, o)):
            assert order[:4] == want and order[-1] == "U"


def shared(me, schedule, *, grad=True):
    layer = make(me.transport(), schedule=schedule, shared_expert_size=F)
    if not grad:
        with torch.no_grad():
            return [layer(tokens(5, seed=me.rank))], []
    return step(layer, me.rank)


@pytest.mark.parametrize("pair", ["shared_expert(ahead)", agree_ahead(chunked(3, "experts", shared=True))])
def test_a_shared_expert_beside_the_agreement(pair):
    plain = "shared_expert" if isinstance(pair, str) else chunked(3, "experts", shared=True)
    for grad in (True, False):
        got = virtual_world(2).run(lambda me, g=grad: shared(me, pair, grad=g))
        want = virtual_world(2).run(lambda me, g=grad: shared(me, plain, grad=g))
        for (results, events), (expected, _) in zip(got, want, strict=True):
            assert not grad or forward_order(events)[:3] == ["S", "N", "P"]
            for a, b in zip(results, expected, strict=True):
                same_bits(a, b)


def on_gloo(ahead):
    import torch.distributed as dist

    from moe_overlap.transport.process_group import ProcessGroupTransport

    transport = ProcessGroupTransport(dist.group.WORLD, timeout_s=20.0)
    results, events = step(block(transport, chunks=2, ahead=ahead), dist.get_rank())
    return results, forward_order(events)[:3]


def test_on_gloo_ranks():
    for (got, order), (want, _) in zip(gloo_pool(2).run(on_gloo, 2), gloo_pool(2).run(on_gloo, 0), strict=True):
        assert order == ["B0", "B1", "N"]
        for a, b in zip(got, want, strict=True):
            same_bits(a, b)


class InPlace(nn.Module):
    def forward(self, h):
        return h.mul_(2)


def test_an_op_ahead_that_works_in_place_in_inference_leaves_the_rows_alone():
    def rank(me, ahead):
        made = ShortcutBlock([nn.Identity(), InPlace()], make(me.transport()), tap=1, slot=0, ahead=ahead)
        with torch.no_grad():
            return made(tokens(6, seed=me.rank))

    for got, want in zip(*(virtual_world(2).run(lambda me, n=n: rank(me, n)) for n in (1, 0)), strict=True):
        same_bits(got, want)


# ---------------------------------------------------------------- schedule="auto"


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dedup", ["off", "auto"])
@pytest.mark.parametrize("kind", ["block", "shared"])
def test_the_planner_keeps_what_was_fixed_before_it(kind, dedup, grad):
    model = cost_model(3 if kind == "block" else 1)

    def rank(me, ahead):
        options = {"dedup": dedup, "top_k": 4}
        if kind == "block":
            made = block(me.transport(), moe=options, schedule="auto", ahead=ahead)
        else:
            auto = AutoSchedule(op_verb="S", num_ops=0, dedup=dedup, num_ahead=ahead)
            made = make(me.transport(), schedule=auto, shared_expert_size=F, **options)
        layer = made.moe if kind == "block" else made
        if grad:
            results, events = step(made, me.rank)
            back = [e.action for e in events if e.phase == "backward" and e.lane == "comp"]
            assert back == [a.text for a in layer._last_step.pair.backward if a.lane == "comp"]
            assert ("while ranks agree" in layer.explain()) == bool(ahead)
        else:
            with torch.no_grad():
                results = [made(tokens(9, seed=me.rank))]
        text = layer.stats().schedule
        assert text.startswith(("P", "N B0 P", "N S P")[ahead and (1 if kind == "block" else 2)]), text
        return results

    with measured_as(model):
        want, got = (virtual_world(2).run(lambda me, n=n: rank(me, n)) for n in (0, 1))
    for one, other in zip(got, want, strict=True):
        for a, b in zip(one, other, strict=True):
            close(a, b)  # backward may be cut otherwise


# ---------------------------------------------------------------- what goes wrong


def test_a_rank_that_refuses_is_heard_after_the_ops_and_the_next_step_is_right():
    def rank(me):
        ran = []
        model = block(me.transport(), ahead=1, before=lambda: ran.append(1))
        want, _ = step(model, me.rank)
        model.zero_grad()
        x = tokens(9)
        if me.rank == 1:
            x[0, 0] = float("nan")
        with pytest.raises(ConfigError) as caught:
            model(x)
        assert caught.value.field == "logits"
        assert len(ran) == 2, "the op had run when the refusal was heard"
        for got, expected in zip(step(model, me.rank)[0], want, strict=True):
            same_bits(got, expected)

    virtual_world(2).run(rank)


def test_ranks_with_other_work_beside_the_agreement_are_refused():
    def rank(me):
        model = block(me.transport(), ahead=1 + me.rank)
        with pytest.raises(PlanMismatch, match="schedule_digest"):
            step(model, me.rank)

    virtual_world(2).run(rank)


def fail():
    raise RuntimeError("in an op")


@pytest.mark.parametrize("options", [{"ahead": 1}, {"router_tap": 0}])
def test_an_op_that_fails_beside_the_agreement_is_told_to_the_peers(options):
    def rank(me):
        model = block(me.transport(), before=fail if me.rank == 0 else None, **options)
        with pytest.raises(RuntimeError if me.rank == 0 else RemoteAbort, match="in an op"):
            step(model, me.rank)
        model.moe.transport.reopen()
        for op in model.backbone:
            op.before = None
        return step(model, me.rank)[0]

    want = virtual_world(2).run(lambda me: step(block(me.transport(), **options), me.rank)[0])
    for got, expected in zip(virtual_world(2).run(rank), want, strict=True):
        for a, b in zip(got, expected, strict=True):
            same_bits(a, b)


class Wide(nn.Module):
    def forward(self, h):
        return torch.cat([h, h], dim=-1)


def test_the_same_mistake_of_all_ranks_beside_the_agreement_is_theirs():
    def rank(me):
        model = ShortcutBlock([Wide(), nn.Identity()], make(me.transport()), tap=0, slot=0, ahead=1)
        with pytest.raises(ConfigError, match="backbone op 0"):
            model(tokens(6))

    virtual_world(2).run(rank)


@pytest.mark.parametrize(
    ("field", "options"),
    [("ahead", {"ahead": -1}), ("ahead", {"ahead": 4}), ("ahead", {"ahead": 1.0}), ("router_tap", {"router_tap": 2}),
     ("router_tap", {"router_tap": -1}), ("router_tap", {"router_tap": "0"})],
)  # fmt: skip
def test_a_block_refuses_what_there_is_not(field, options):
    with pytest.raises(ConfigError) as caught:
        block(None, **options)
    assert caught.value.field == field


def test_a_layer_refuses_more_shared_experts_ahead_than_it_has():
    def rank(me):
        with pytest.raises(ConfigError, match="num_ahead"):
            make(me.transport(), schedule=AutoSchedule(op_verb="B", num_ops=0, num_ahead=1))

    virtual_world(2).run(rank)


# ---------------------------------------------------------------- a router that reads an earlier state


def dense(layers, x, read):
    """y of one layer whose experts lie on several ranks, in float64, by the oracle."""
    routing = layers[0].router(read)
    w_in, w_out = (torch.cat([layer.expert_weights[i] for layer in layers]) for i in (0, 1))
    return oracle.moe(x, routing.topk_ids_TK, routing.topk_weights_TK, w_in, w_out)


@pytest.mark.parametrize("path", ["inline", "chunked(2)", "deduplicated", "tickets", "latents"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_router_input_of_its_own_is_right_by_the_oracle(world, path):
    options = {"schedule": "chunked(2)"} if path in ("chunked(2)", "deduplicated") else {}
    options |= {"dedup": "on", "top_k": 4} if path == "deduplicated" else {}
    options |= {"latent_size": 8} if path == "latents" else {}

    def rank(me):
        layer = make(None if world == 1 and path == "inline" else me.transport(), **options)
        x, read = (tokens(9 + me.rank, seed=me.rank + 10 * i).requires_grad_() for i in range(2))
        if path == "tickets":
            ticket = layer.begin(x, router_input=read)
            layer.run_experts(ticket)
            y = layer.finish(ticket)
        else:
            y = layer(x, router_input=read)
        y.square().sum().backward()
        return layer, x, read, y

    found = virtual_world(world).run(rank)
    layers = [layer for layer, *_ in found]
    total = 0.0
    router, weights = layers[0].router.weight, [w for layer in layers for w in layer.expert_weights]
    for layer, x, read, y in found:
        rows = x if path != "latents" else x @ layer.latent_in.weight.T
        want = dense(layers, rows, read)
        want = want if path != "latents" else want @ layer.latent_out.weight.T
        close(y.detach(), want.detach())
        loss = want.square().sum()
        total = total + loss
        dx, dread = torch.autograd.grad(loss, [x, read], retain_graph=True)
        close(x.grad, dx)
        close(read.grad, dread)
        assert dread.abs().max() > 0
        (own,) = torch.autograd.grad(loss, router, retain_graph=True)
        close(layer.router.weight.grad, own)
    for weight, want in zip(weights, torch.autograd.grad(total, weights), strict=True):
        close(weight.grad, want)


@pytest.mark.parametrize("read", ["early state", "x"])
def test_a_loss_of_such_a_router_alone_runs_the_pending_exchanges(read):
    def rank(me):
        layer = make(me.transport(), aux_loss_coef=0.1)
        x, state = (tokens(7, seed=i).requires_grad_() for i in (1, 2))
        y = layer(x, router_input=state if read == "early state" else None)
        (y.sum() + aux_loss(layer) if me.rank else aux_loss(layer)).backward()
        return layer.router.weight.grad, (state if read == "early state" else x).grad, layer.expert_weights[0].grad

    for router, state, experts in virtual_world(2).run(rank):
        assert all(one.abs().max() > 0 for one in (router, state, experts))


def test_a_block_whose_router_reads_early_runs_the_rest_of_its_ops_beside_the_agreement():
    def rank(me, overlap):
        order = []
        transport = me.transport()
        begin = transport.begin_agree

        class Noted:
            def __init__(self, inner):
                self.inner = inner

            def wait(self):
                order.append("N is waited for")
                return self.inner.wait()

            def interval(self):
                return self.inner.interval()

        transport.begin_agree = lambda said: (order.append("N begins"), Noted(begin(said)))[1]
        model = block(transport, tap=2, router_tap=1, overlap=overlap)
        for i, op in enumerate(model.backbone):
            op.before = lambda i=i: order.append(f"op {i}")
        model.backbone[1].linear.weight.register_hook(lambda _: order.append("gradient of op 1"))
        model.moe.router.weight.register_hook(lambda _: order.append("gradient of the router"))
        step(model, me.rank)
        return order

    for overlap, want in ((True, ["op 1", "N is waited for"]), (False, ["N is waited for", "op 1"])):
        for order in virtual_world(2).run(lambda me, o=overlap: rank(me, o)):
            assert order[:6] == ["op 0", "N begins", *want, "op 2", "op 3"]
            assert order[6:] == ["gradient of the router", "gradient of op 1"], "beside the last exchange"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", [{}, {"moe": {"dedup": "on", "top_k": 4}}, {"schedule": "auto"}, {"ahead": 2},
                                     {"moe": {"latent_size": 8}}])  # fmt: skip
def test_a_block_whose_router_reads_early_checkpointed_and_with_an_input_without_gradient(options, frozen):
    def rank(me, mode, overlap=True):
        model = block(me.transport(), tap=2, router_tap=0, overlap=overlap, pre_norm=nn.Identity(), **options)
        x = tokens(9, seed=me.rank).requires_grad_(not frozen)
        y = checkpoint(model, x, use_reentrant=False) if mode == "checkpoint" else model(x)
        y.square().sum().backward()
        return [y.detach(), *([] if frozen else [x.grad]), *(p.grad for p in model.parameters())]

    with measured_as(cost_model(2)):
        want = virtual_world(2).run(lambda me: rank(me, "none"))
        others = [virtual_world(2).run(lambda me: rank(me, "checkpoint"))]
        others.append(virtual_world(2).run(lambda me: rank(me, "none", overlap=False)))
    for got in others:
        for one, expected in zip(got, want, strict=True):
            for a, b in zip(one, expected, strict=True):
                same_bits(a, b)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "bad", [torch.zeros(5, D, dtype=torch.float64), torch.zeros(6, D, dtype=torch.int64), "x",
            torch.zeros(6, D, dtype=torch.float64, device="meta")],
)  # fmt: skip
def test_a_router_input_that_does_not_go_with_x_is_refused_on_all_ranks(bad, world):
    def rank(me):
        layer = make(me.transport() if world > 1 else None)
        want = layer(tokens(6)).detach()
        with pytest.raises(ConfigError) as caught:
            layer(tokens(6), router_input=bad if me.rank == 0 else None)
        assert caught.value.field == ("router_input" if me.rank == 0 else "x")
        same_bits(layer(tokens(6)).detach(), want)

    virtual_world(world).run(rank)


def test_what_is_not_there_is_named():
    def rank(me):
        with pytest.raises(NotImplementedError, match="latent"):
            block(me.transport(), moe={"latent_size": 8}, tap=2, router_tap=0, schedule="auto")

    virtual_world(2).run(rank)


def test_an_earlier_state_may_be_of_another_dtype_and_x_is_what_the_rows_hold():
    layer = MoELayer(D, F, E, 2, router=LinearRouter(D, E, 2, dtype=torch.float32), dtype=torch.float64)
    x, read = tokens(6), tokens(6, seed=3).float()
    close(layer(x, router_input=read).detach(), dense([layer], x, read).detach())
