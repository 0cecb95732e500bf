"""Routing that is recorded and replayed: exact ids, gradients of the router, recomputes, micro-batches, refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_overlap import (
    ConfigError,
    MoELayer,
    PlanMismatch,
    RoutingLog,
    RoutingRecorder,
    RoutingReplay,
    ShortcutBlock,
    TrafficMonitor,
)
from moe_overlap.layer.routing_log import LayerLog
from moe_overlap.routing import HashRouter, LinearRouter, Recorded, RecurrentRouter, SwitchRouter
from tests.layers import D, E, F, K, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

SIZES = (9, 0, 20, 3)  # of each rank: uneven, and one without tokens


class TwoLayers(nn.Module):
    """x + first(x), then second; either may be computed again."""

    def __init__(self, transports=(None, None), again=False, **options):
        super().__init__()
        self.first, self.second = (make(transport, **options) for transport in transports)
        nn.init.normal_(self.second.router.weight, generator=torch.Generator().manual_seed(8))
        self.again = again

    def forward(self, x):
        for layer in (self.first, self.second):
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.again else layer(x))
        return x


def scramble(model):
    """Other router weights, by which other experts would be chosen."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LinearRouter):
                module.weight.normal_(generator=torch.Generator().manual_seed(99))


def ids_of(log):
    return [call.ids_TK for layer in log.layers for call in layer.calls]


def recorded(model, *inputs):
    with RoutingRecorder(model) as recorder:
        outputs = [model(x) for x in inputs]
    return recorder.log, outputs


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "chunked(3)", "dedup": "on"},
        {"schedule": "chunked(2,experts)", "overlap": False},
        {"capacity_factor": 0.6},
    ],
)
def test_a_replay_in_training_takes_the_recorded_experts_on_every_rank(k, options):
    """With checkpointing, two layers, two micro-batches, and routers that would choose otherwise now."""

    def rank(me):
        model = TwoLayers((me.transport(), me.transport()), top_k=k, again=True, **options)
        inputs = [tokens(SIZES[me.rank], seed=10 * me.rank + n) for n in range(2)]
        with torch.no_grad():
            log, _ = recorded(model, *inputs)
        scramble(model)
        outputs = []
        with RoutingRecorder(model) as again, RoutingReplay(model, log):
            losses = [model(x).square().sum() for x in inputs]
            outputs += [loss.detach() for loss in losses]
        sum(losses).backward()  # recomputes after the replay, the last micro-batch first
        routers = [model.first.router, model.second.router]
        fresh, _ = recorded(model, *inputs)
        return ids_of(log), ids_of(again.log), [r.weight.grad for r in routers], ids_of(fresh)

    results = virtual_world(4).run(rank)
    for was, again, _, _ in results:
        assert len(was) == 4
        for a, b in zip(was, again, strict=True):
            assert torch.equal(a, b)
    # With as many choices as experts the set is the same, and its order is not.
    assert any(not torch.equal(a, b) for was, _, _, fresh in results for a, b in zip(was, fresh, strict=True))
    for layer in range(2):
        assert sum(grads[layer].abs().sum() for _, _, grads, _ in results) > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": "topk_softmax"},
        {"router": "sigmoid", "capacity_factor": 0.5},
        {"router": "topk_softmax", "capacity_factor": 0.5, "aux_loss_coef": 0.1, "z_loss_coef": 0.1},
    ],
)
def test_with_an_equal_router_output_gradients_and_loss_are_equal_too(options):
    layer, x = make(**options), tokens(40)

    def step():
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        loss = layer.take_aux_loss()
        (y.square().sum() + (0 if loss is None else loss)).backward()
        dropped = layer.stats().dropped_tokens
        return y, loss, leaf.grad, layer.router.weight.grad, dropped

    with RoutingRecorder(layer) as recorder:
        want = step()
    with RoutingReplay(layer, recorder.log):
        found = step()
    assert found[-1] == want[-1]
    for a, b in zip(found[:-1], want[:-1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)
    if options.get("capacity_factor"):
        assert want[-1] > 0 and recorder.log.layers[0].calls[0].chosen_TK is not None


def test_weights_as_recorded_are_constants_and_give_the_same_output():
    layer, x = make(), tokens(12)
    log, (want,) = recorded(layer, x)
    scramble(layer)
    with RoutingReplay(layer, log, weights="recorded"):
        y = layer(x)
    same_bits(y, want)
    y.sum().backward()
    assert layer.router.weight.grad is None
    with RoutingReplay(layer, log):
        assert not torch.equal(layer(x), want)


def test_the_same_decision_with_other_schedules_and_on_other_ranks():
    x = tokens(16, seed=4)
    log, (want,) = recorded(make(), x)

    def rank(me, **options):
        layer = make(me.transport(), **options)
        scramble(layer)
        half = log.layers[0].cut((8, 8)).calls[me.rank]
        mine = RoutingLog(layers=(LayerLog(name="", num_experts=E, calls=(half,)),))
        with RoutingReplay(layer, mine, weights="recorded"):
            return layer(x[8 * me.rank : 8 * me.rank + 8])

    for options in ({}, {"schedule": "chunked(4)"}, {"schedule": "chunked(2,experts)"}):
        close(torch.cat(virtual_world(2).run(partial(rank, **options))), want)


def test_recomputes_are_told_apart_by_their_tokens_in_any_order():
    """Calls of one layer whose records differ, computed again first to last and last to first."""
    layer = make(schedule="chunked(2)")
    inputs = [tokens(8, seed=n) for n in range(3)]
    log, _ = recorded(layer, *inputs)
    scramble(layer)
    for order in ((0, 1, 2), (2, 0, 1)):
        with RoutingReplay(layer, log):
            losses = [checkpoint(layer, x, use_reentrant=False).sum() for x in inputs]
        for n in order:
            losses[n].backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_a_noisy_router_is_replayed_without_its_noise_having_a_say():
    router = SwitchRouter(D, E, K, jitter=0.9, capacity_factor=None, dtype=torch.float64)
    layer = MoELayer(D, F, E, K, router=router, dtype=torch.float64)
    x = tokens(50)
    log, _ = recorded(layer, x)
    with RoutingRecorder(layer) as again, RoutingReplay(layer, log):
        checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False).sum().backward()
    assert torch.equal(ids_of(log)[0], ids_of(again.log)[0])


def test_padding_zero_experts_and_routers_with_a_state():
    mask = torch.tensor([True] * 7 + [False] * 5)
    for router in (
        LinearRouter(D, E, K, zero_experts=3, dtype=torch.float64),
        RecurrentRouter(D, E, K, router_size=6, dtype=torch.float64),
    ):
        layer, x = MoELayer(D, F, E, K, router=router, dtype=torch.float64), tokens(12)
        with RoutingRecorder(layer) as recorder:
            want = layer(x, token_mask=mask)
        ids = ids_of(recorder.log)[0]
        assert bool((ids[7:] == -1).all()) and bool((ids[:7] >= 0).all())
        with RoutingReplay(layer, recorder.log):
            found = layer(x, token_mask=mask)
        want, found = (one if isinstance(one, tuple) else (one,) for one in (want, found))
        for a, b in zip(found, want, strict=True):
            same_bits(a, b)


def test_a_router_that_weighs_nothing_else_is_replayed_by_its_recorded_weights_alone():
    router = HashRouter(30, E, K)
    layer = MoELayer(D, F, E, K, router=router, dtype=torch.float64)
    x = tokens(5)
    router.give(torch.arange(5))
    log, (want,) = recorded(layer, x)
    router.give(torch.arange(10, 15))
    with RoutingReplay(layer, log, weights="recorded"):
        same_bits(layer(x), want)
    with pytest.raises(ConfigError) as caught, RoutingReplay(layer, log):
        layer(x)
    assert caught.value.field == "replay.weights"


def test_recomputes_failed_calls_and_other_recorders_are_not_recorded():
    layer, x = make(), tokens(6)
    with RoutingRecorder(layer) as recorder:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        with pytest.raises(ConfigError):
            layer(x.to(torch.float32))
        assert len(recorder.log.layers[0].calls) == 1
        with pytest.raises(ConfigError), RoutingRecorder(layer):
            pass
    layer(x)
    log = recorder.log
    assert [one.tokens for one in log.layers] == [(6,)]
    assert log.bytes == 6 * K * (4 + 8)
    with recorder:
        pass
    assert recorder.log.layers[0].calls == ()


def test_what_a_recompute_may_need_lives_as_long_as_the_graph():
    layer, x = make(), tokens(6)
    log, _ = recorded(layer, x)
    with RoutingReplay(layer, log):
        y = checkpoint(layer, x, use_reentrant=False)
    (ref,) = layer._tape._replayed
    assert ref() is not None
    del y
    assert ref() is None
    assert layer._tape.runs
    layer(x)  # which finds that nothing is left
    assert not layer._tape.runs


def other(log, **change):
    """The same log with something else about its one layer."""
    (layer,) = log.layers
    values = {"name": layer.name, "num_experts": layer.num_experts, "calls": layer.calls} | change
    return RoutingLog(layers=(LayerLog(**values),))


def narrow(call):
    return Recorded(ids_TK=call.ids_TK[:, :1], weights_TK=call.weights_TK[:, :1])


WRONG = {
    "replay.calls": lambda log: other(log, calls=()),
    "replay.tokens": lambda log: other(log, calls=(log.layers[0].calls[0].rows(0, 3),)),
    "replay.top_k": lambda log: other(log, calls=tuple(narrow(call) for call in log.layers[0].calls)),
    "replay.num_experts": lambda log: other(log, num_experts=2 * E),
    "replay.layers": lambda log: RoutingLog(layers=log.layers * 2),
    "replay.file": lambda log: "/nowhere/at-all.safetensors",
}


@pytest.mark.parametrize("field", WRONG)
def test_a_recording_that_does_not_fit_on_one_rank_is_refused_by_all_and_nothing_is_sent(field):
    def rank(me):
        transport = me.transport()
        layer, x = make(transport), tokens(4, seed=me.rank)
        log, (want,) = recorded(layer, x)
        sent = transport.stats.payload_bytes
        with pytest.raises(ConfigError) as caught, RoutingReplay(layer, WRONG[field](log) if me.rank == 1 else log):
            layer(x)
        assert transport.stats.payload_bytes == sent
        with RoutingReplay(layer, log):
            same_bits(layer(x), want)
        return caught.value

    errors = virtual_world(2).run(rank)
    assert [error.field for error in errors] == [field] * 2
    assert "rank 1" in str(errors[0])


def test_ranks_that_replay_different_calls_or_numbers_of_calls_learn_of_it_in_the_first():
    def rank(me):
        transport = me.transport()
        layer, x = make(transport), tokens(4, seed=me.rank)
        log, _ = recorded(layer, x, x)
        if me.rank == 0:
            log = other(log, calls=log.layers[0].calls[:1])
        sent = transport.stats.payload_bytes
        with pytest.raises(PlanMismatch, match="router_state.*other lengths"), RoutingReplay(layer, log):
            layer(x)
        assert transport.stats.payload_bytes == sent

    virtual_world(2).run(rank)


def test_another_number_of_calls():
    layer, x = make(), tokens(4)
    log, _ = recorded(layer, x, x)
    with pytest.raises(ConfigError) as caught, RoutingReplay(layer, log):
        layer(x)
    assert (caught.value.field, caught.value.value) == ("replay.calls", 1)
    with pytest.raises(ConfigError) as caught, RoutingReplay(layer, log):
        for _ in range(3):
            layer(x)
    assert (caught.value.field, caught.value.value) == ("replay.calls", 3)
    with RoutingReplay(layer, log):  # both are over
        layer(x)
        layer(x)


def test_bad_arguments():
    log, _ = recorded(make(), tokens(2))
    with pytest.raises(ConfigError, match="weights"):
        RoutingReplay(make(), log, weights="old")
    with pytest.raises(ConfigError, match="model"):
        RoutingRecorder(nn.Linear(2, 2))
    layer = make()
    with RoutingReplay(layer, log):
        with pytest.raises(ConfigError, match="one replay"), RoutingReplay(layer, log):
            pass
        layer(tokens(2))


@pytest.mark.parametrize("way", ["block", "tickets", "deduplicated"])
def test_every_way_of_calling_a_layer_records_and_replays(way):
    def rank(me):
        layer = make(me.transport(), dedup="on" if way == "deduplicated" else "off")
        block = ShortcutBlock([nn.Identity()], layer, tap=0, slot=0) if way == "block" else None

        def call(x):
            if block is not None:
                return block(x)
            if way == "deduplicated":
                return layer(x)
            ticket = layer.begin(x)
            layer.run_experts(ticket)
            return layer.finish(ticket)

        x = tokens(SIZES[me.rank], seed=me.rank).requires_grad_()
        with RoutingRecorder(layer) as recorder:
            want = call(x)
        scramble(layer)
        with RoutingReplay(layer, recorder.log, weights="recorded"):
            same_bits(call(x), want)
        with RoutingRecorder(layer) as again, RoutingReplay(layer, recorder.log):
            call(x).square().sum().backward()
        assert torch.equal(ids_of(again.log)[0], ids_of(recorder.log)[0])
        return layer.router.weight.grad.abs().sum()

    assert sum(virtual_world(4).run(rank)) > 0


def test_low_precision_and_autocast():
    layer, x = make(dtype=torch.bfloat16), tokens(9, dtype=torch.bfloat16)
    log, (want,) = recorded(layer, x)
    with RoutingReplay(layer, log):
        y = checkpoint(layer, x, use_reentrant=False)
    same_bits(y, want)
    y.sum().backward()
    layer = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        log, (want,) = recorded(layer, x.float())
        with RoutingReplay(layer, log):
            same_bits(layer(x.float()), want)
    assert log.layers[0].calls[0].weights_TK.dtype == torch.float32


def test_a_compiled_model_records_and_replays_with_a_graph_break():
    layer, x = make(), tokens(6)
    compiled = torch.compile(layer, backend="eager")
    compiled(x)
    log, (want,) = recorded(compiled, x)
    assert [one.tokens for one in log.layers] == [(6,)]
    scramble(layer)
    with RoutingReplay(compiled, log, weights="recorded"):
        same_bits(compiled(x), want)
    assert not torch.equal(compiled(x), want)


def test_a_transform_of_functions_is_refused_while_something_records():
    layer, x = make(), tokens(3)
    with RoutingRecorder(layer), pytest.raises(ConfigError, match=r"torch\.func"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    torch.func.grad(lambda x: layer(x).sum())(x)


def test_a_calibration_is_neither_recorded_nor_replayed_nor_counted():
    def rank(me):
        layer, x = make(me.transport(), schedule="auto"), tokens(6 + me.rank, seed=me.rank)
        with TrafficMonitor(layer) as monitor, RoutingRecorder(layer) as recorder:
            layer(x)
            counted = monitor.report()[""].calls
        other = make(me.transport(), schedule="auto", activation="gelu")  # whose figures nobody has kept
        with RoutingRecorder(other) as again, RoutingReplay(other, recorder.log):
            other(x)
        assert torch.equal(ids_of(again.log)[0], ids_of(recorder.log)[0])
        return len(recorder.log.layers[0].calls), counted

    assert virtual_world(2).run(rank) == [(1, 1)] * 2
