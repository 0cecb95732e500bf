"""The backward schedule of deduplicated steps as executed by autograd: where the router's gradient comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from moe_overlap import MoELayer, ShortcutBlock, prepare
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import chunked, deduplicate
from moe_overlap.schedule.check import check
from moe_overlap.schedule.recorder import record
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

D, F, E, K = 8, 12, 8, 4
BY_HAND = (
    "Ut Ct0 Ct1 Od Ed0 Ed1 Mt Dt1 Dt0 Ew0 Pt",
    "Ut Ct0 Ct1 Ed1 Ed0 Dt0 Dt1 Od Ew1 Mt Ew0 Pt",
    "Ut Ct1 Ct0 Ed1 Dt1 Od Ed0 Mt Dt0 Pt Ew2 Ew0 Ew1",
)
SCHEDULES = ("serial", "chunked(3)", "chunked(2,experts)", *BY_HAND)


def make(me, schedule="serial", **options):
    """A layer whose schedule is a word, or chunked(2) with a backward written by hand."""
    torch.manual_seed(1)
    if schedule in BY_HAND:
        schedule = replace(deduplicate(chunked(2)), name="by hand", backward=Schedule.parse(schedule))
        check(schedule)
        if options.get("dedup") == "off":
            words = [word for word in schedule.backward.text.split() if word not in ("Od", "Mt")]
            schedule = replace(chunked(2), name="by hand", backward=Schedule.parse(" ".join(words)))
    return MoELayer(D, F, E, K, transport=me.transport(), dtype=torch.float64, schedule=schedule,
                    **{"dedup": "on", **options})  # fmt: skip


def tokens(me, needed=True):
    generator = torch.Generator().manual_seed(me.rank)
    return torch.randn(9 + me.rank, D, dtype=torch.float64, generator=generator).requires_grad_(needed)


def actions(events, *lanes):
    return [event.action for event in events if event.phase == "backward" and event.lane in lanes]


@pytest.mark.parametrize("needed", ["all", "one", "none"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_router_runs_after_the_gradients_of_its_weights_and_the_last_rows(schedule, overlap, needed):
    """Also where no x needs a gradient: then rows do not travel, their metadata does."""

    def rank(me):
        layer = make(me, schedule, overlap=overlap)
        x = tokens(me, needed == "all" or (needed == "one" and me.rank == 1))
        before_router = []

        def seen(_, __, decision):
            decision.topk_weights_TK.register_hook(lambda grad: before_router.extend(actions(events, "wire")))

        layer.router.register_forward_hook(seen)
        with record() as events:
            layer(x).square().sum().backward()
        pair = layer.schedule
        assert actions(events, "comp") == [a.text for a in pair.backward if a.lane == "comp"]
        rows = [] if needed == "none" else [f"Dt{c}" for c in range(pair.backward_chunks)]
        returned = {*rows, "Mt", *(f"Ct{c}" for c in range(pair.backward_chunks))}
        if needed == "none":  # a wait that was not needed leaves no interval
            before_router = [action for action in before_router if not action.startswith("Dt")]
        assert len(before_router) == len(returned) and set(before_router) == returned
        return [p.grad for p in layer.parameters()]

    got = virtual_world(2).run(rank)
    want = virtual_world(2).run(lambda me: plain(me, schedule))
    for one, (_, right) in zip(got, want, strict=True):
        for g, w in zip(one, right, strict=True):
            close(g, w)


def plain(me, schedule="serial", **options):
    """(gradient of x, gradients of the parameters) without deduplication."""
    layer, x = make(me, schedule, dedup="off", **options), tokens(me)
    layer(x).square().sum().backward()
    return x.grad, [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("frozen", ["experts", "router", "both"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_frozen_parts(schedule, frozen):
    def rank(me):
        layer, x = make(me, schedule), tokens(me)
        if frozen != "router":
            layer.experts.requires_grad_(False)
        if frozen != "experts":
            layer.router.requires_grad_(False)
        layer(x).square().sum().backward()
        return x.grad, [p.grad for p in layer.parameters()]

    want = virtual_world(2).run(lambda me: plain_frozen(me, schedule, frozen))
    for (dx, grads), (right, others) in zip(virtual_world(2).run(rank), want, strict=True):
        close(dx, right)
        for got, expected in zip(grads, others, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                close(got, expected)


def plain_frozen(me, schedule, frozen):
    layer, x = make(me, schedule, dedup="off"), tokens(me)
    if frozen != "router":
        layer.experts.requires_grad_(False)
    if frozen != "experts":
        layer.router.requires_grad_(False)
    layer(x).square().sum().backward()
    return x.grad, [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("how", ["auxiliary", "attached", "input"])
@pytest.mark.parametrize("dedup", ["off", "on"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_loss_that_does_not_reach_the_output_of_one_rank(schedule, dedup, how):
    """Its peers' rows get their gradients all the same, and its own tokens none from the experts."""

    def rank(me, missing):
        layer, x = make(me, schedule, dedup=dedup, aux_loss_coef=0.1), tokens(me)
        y, aux = layer(x), layer.take_aux_loss()
        zero = 0 * y.sum()
        if me.rank == 1 and missing:
            zero = torch.zeros((), dtype=torch.float64)
            loss = {"auxiliary": aux, "input": x.sum(), "attached": torch.ones((), dtype=torch.float64)}[how]
            if how != "auxiliary":
                loss = layer.attach(loss)
        elif me.rank == 1:
            loss = {"auxiliary": aux, "input": x.sum(), "attached": 0.0}[how]
        else:
            loss = y.square().sum() + aux
        (loss + zero).backward()
        return x.grad, [p.grad for p in layer.parameters()]

    want = virtual_world(2).run(lambda me: rank(me, False))
    for (dx, grads), (right, others) in zip(virtual_world(2).run(lambda me: rank(me, True)), want, strict=True):
        for got, expected in zip([dx, *grads], [right, *others], strict=True):
            close(torch.zeros_like(expected) if got is None else got, expected)


def test_a_block_in_any_position_gives_the_gradients_of_a_plain_one():
    def rank(me, dedup, tap, slot, chunks):
        torch.manual_seed(2)
        ops = [nn.Linear(D, D, dtype=torch.float64) for _ in range(3)]
        moe = MoELayer(D, F, E, K, transport=me.transport(), dtype=torch.float64, dedup=dedup)
        block = ShortcutBlock(ops, moe, tap=tap, slot=slot, chunks=chunks, backward_chunks=3 - chunks)
        assert block.schedule.deduplicated == (dedup == "on")
        x = tokens(me)
        with record() as events:
            y = block(x)
            y.square().sum().backward()
        assert actions(events, "comp") == [a.text for a in block.schedule.backward if a.lane == "comp"]
        return [y.detach(), x.grad, *(p.grad for p in block.parameters())]

    for tap in range(4):
        for slot in range(4 - tap):
            for chunks in (1, 2):
                case = (tap, slot, chunks)
                got, want = (
                    virtual_world(2).run(lambda me, d=dedup, c=case: rank(me, d, *c)) for dedup in ("on", "off")
                )
                for one, right in zip(got, want, strict=True):
                    for g, w in zip(one, right, strict=True):
                        close(g, w)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_add_up_over_micro_batches_and_are_scaled_once(schedule):
    def rank(me, dedup, batches):
        layer = prepare(make(me, schedule, dedup=dedup))
        for _ in range(batches):
            layer(tokens(me)).square().sum().backward()
        return [p.grad for p in layer.parameters()]

    once, twice = (virtual_world(2).run(lambda me, n=n: rank(me, "on", n)) for n in (1, 2))
    want = virtual_world(2).run(lambda me: rank(me, "off", 1))
    for first, both, right in zip(once, twice, want, strict=True):
        for a, b, w in zip(first, both, right, strict=True):
            same_bits(b, 2 * a)
            close(a, w)


class Constant(LinearRouter):
    """A router whose weights are constant, with a loss of its own."""

    def forward(self, x_TD, **kwargs):
        decision = super().forward(x_TD, **kwargs)
        return replace(decision, topk_weights_TK=decision.topk_weights_TK.detach(), aux_loss=x_TD.square().sum())


@pytest.mark.parametrize("dedup", ["off", "on"])
def test_a_backward_of_the_output_after_one_that_did_not_reach_it(dedup):
    """The first one runs the exchanges with zeros, and leaves what the second one needs as it is."""

    def rank(me, twice):
        torch.manual_seed(3)
        layer = make(me, "chunked(2)", dedup=dedup, router=Constant(D, E, K, dtype=torch.float64))
        x = tokens(me)
        y, aux = layer(x), layer.take_aux_loss()
        if twice:
            aux.backward()
            y.square().sum().backward()
        else:
            (aux + y.square().sum()).backward()
        return [x.grad, *(p.grad for p in layer.experts.parameters())]

    want = virtual_world(2).run(lambda me: rank(me, False))
    for got, right in zip(virtual_world(2).run(lambda me: rank(me, True)), want, strict=True):
        for g, w in zip(got, right, strict=True):
            close(g, w)
