"""What calls leave behind: losses accumulate until taken, nothing piles up, and a compiled call leaves what
an eager one does."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_overlap import ShortcutBlock, aux_loss
from moe_overlap.layer import left
from moe_overlap.transport.local import LocalTransport
from tests.layers import D, K, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

BACKENDS = ["eager", "aot_eager"]
PATHS = ["inline", "scheduled", "tickets", "block"]


@pytest.fixture(autouse=True)
def strict():
    """A warning that a test does not expect fails it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an auxiliary loss was dropped")
        yield


@pytest.fixture
def fresh():
    """Nothing compiled before: as many graphs as a test makes, and none of another one's."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def caller(path, transport=None, **options):
    """(layer, x -> y) on one of the paths of an eager call."""
    scheduled = {"schedule": "chunked(2)"} if path == "scheduled" else {}  # a block orders its layer's exchanges itself
    layer = make(transport, **{"aux_loss_coef": 0.1, **scheduled, **options})
    if path == "block":
        block = ShortcutBlock([nn.Linear(D, D, dtype=torch.float64), torch.tanh], layer, tap=0, slot=1)
        return layer, block
    if path == "tickets":

        def staged(x):
            ticket = layer.begin(x)
            layer.run_experts(ticket)
            return layer.finish(ticket)

        return layer, staged
    return layer, layer


def expected_loss(layer, *inputs):
    return sum(layer.router(x).aux_loss for x in inputs)


def router_gradient(layer, loss):
    (grad,) = torch.autograd.grad(loss, layer.router.weight)
    return grad


# ---------------------------------------------------------------- losses accumulate until taken


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("world", [1, 2])
def test_losses_of_several_calls_add_up_and_carry_gradients(world, path):
    def rank(me):
        layer, call = caller(path, me.transport() if world > 1 else None)
        inputs = [tokens(count, count) for count in (5, 8, 3)]
        outputs = [call(x) for x in inputs]
        total = aux_loss(layer)
        want = expected_loss(layer, *inputs)
        close(total.detach(), want.detach())
        total.backward()
        close(layer.router.weight.grad, router_gradient(layer, want))
        assert aux_loss(layer) == 0 and layer.take_aux_loss() is None
        del outputs

    virtual_world(world).run(rank)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_neither_replace_nor_add(path, mode):
    layer, call = caller(path)
    x = tokens(6)
    y = call(x)
    with mode():
        call(tokens(9, 1))
    assert layer.stats().tokens_per_expert.sum() == 9 * K, "what is said is said of the last call"
    loss = layer.take_aux_loss()
    close(loss.detach(), expected_loss(layer, x).detach())
    assert loss.requires_grad
    with mode():
        call(x)
    assert layer.take_aux_loss() is None
    del y


@pytest.mark.parametrize("path", ["inline", "scheduled", "block"])
@pytest.mark.parametrize("selective", [False, True])
def test_a_recompute_adds_none(path, selective):
    layer, call = caller(path)
    x = tokens(6).requires_grad_()
    y = checkpoint(call, x, use_reentrant=False)
    taken = layer.take_aux_loss()
    (y.sum() + taken).backward()
    assert layer.take_aux_loss() is None
    y = checkpoint(call, x, use_reentrant=False)
    y.sum().backward()
    close(layer.take_aux_loss().detach(), taken.detach())


def test_micro_batches_of_a_step_count_once_each():
    layer = make(aux_loss_coef=0.1)
    model = nn.Sequential(nn.Linear(D, D, dtype=torch.float64), layer)
    batches = [tokens(7, seed) for seed in range(4)]
    losses = [model(x).square().mean() for x in batches]
    (sum(losses) + aux_loss(model)).backward()
    got = layer.router.weight.grad.clone()
    layer.router.weight.grad = None
    for x in batches:
        (model(x).square().mean() + aux_loss(model)).backward()
    close(got, layer.router.weight.grad)


# ---------------------------------------------------------------- nothing piles up


def count_tensors():
    gc.collect()
    return sum(type(one) in (torch.Tensor, nn.Parameter) for one in gc.get_objects())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backward", [True, False])
def test_a_thousand_untaken_steps_cost_no_memory_and_one_warning(path, backward):
    layer, call = caller(path)

    def step():
        y = call(tokens(4))
        if backward:
            y.sum().backward()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            step()
        before = count_tensors()
        for _ in range(1000 if path == "inline" and backward else 100):
            step()
        assert count_tensors() <= before + 2
    assert sum("auxiliary loss was dropped" in str(one.message) for one in caught) == 1
    assert len(layer._left._calls) <= 2


@pytest.mark.parametrize("path", PATHS)
def test_a_loss_whose_graph_is_gone_is_dropped_with_a_warning(path):
    layer, call = caller(path)
    x = tokens(6, 2)
    y = call(tokens(5))
    del y
    with pytest.warns(UserWarning, match="nobody had taken"):
        kept = call(x)
    close(layer.take_aux_loss().detach(), expected_loss(layer, x).detach())
    del kept


@pytest.mark.parametrize("path", PATHS)
def test_a_loss_whose_backward_is_over_is_dropped_and_the_others_can_be_used(path):
    layer, call = caller(path)
    x = tokens(6, 2)
    loss = call(tokens(5)).sum()
    loss.backward()  # and `loss` stays, as in a training loop
    with pytest.warns(UserWarning, match="backward of that call is over"):
        y = call(x)
    layer.zero_grad()
    (y.sum() * 0 + layer.take_aux_loss()).backward()
    close(layer.router.weight.grad, router_gradient(layer, expected_loss(layer, x)))
    assert loss.grad_fn is not None


def test_the_loss_of_the_last_call_lives_without_its_output():
    layer = make(aux_loss_coef=0.1)
    layer(tokens(5))
    assert layer.take_aux_loss().requires_grad
    call = left.Call(torch.ones(()), None)
    assert not call.is_over


def test_what_was_left_does_not_hold_the_graph_of_a_call_that_was_taken():
    layer = make(aux_loss_coef=0.1)
    before = count_tensors()
    y = layer(tokens(5).requires_grad_())
    aux_loss(layer)
    del y
    assert count_tensors() <= before + 3, "ids, what was chosen and the number of dropped slots, for stats()"


def test_a_copy_begins_with_nothing_left():
    layer = make(aux_loss_coef=0.1)
    y = layer(tokens(5))
    twin = copy.deepcopy(layer)
    assert twin.take_aux_loss() is None
    with pytest.raises(RuntimeError, match="no forward call"):
        twin.stats()
    assert layer.take_aux_loss() is not None
    del y


# ---------------------------------------------------------------- attach, stats, explain, events


@pytest.mark.parametrize("path", PATHS)
def test_attach_reaches_every_call_since_the_last_time(path):
    """Rank 0's loss depends on neither of its two calls; both have exchanges to run for rank 1."""

    def rank(me, attach):
        layer, call = caller(path, me.transport(), aux_loss_coef=0.0)
        x = tokens(6, me.rank).requires_grad_()
        outputs = [call(x), call(x)]
        mine = x.square().sum() if me.rank == 0 else sum(y.square().sum() for y in outputs)
        if not attach and me.rank == 0:
            mine = mine + sum(0 * y.sum() for y in outputs)
        elif me.rank == 0:
            mine = layer.attach(mine)
        mine.backward()
        assert layer.attach(mine) is mine, "both are over"
        return [weight.grad for weight in layer.expert_weights]

    attached = virtual_world(2).run(lambda me: rank(me, True))
    for got, want in zip(attached, virtual_world(2).run(lambda me: rank(me, False)), strict=True):
        for g, w in zip(got, want, strict=True):
            close(g, w)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_attach_after_each_call_reaches_that_call(order):
    """And may be asked for twice, if one result is thrown away."""

    def rank(me):
        layer = make(me.transport(), schedule="chunked(2)")
        x = tokens(6, me.rank).requires_grad_()
        outputs, losses = [], []
        for _ in range(2):
            outputs.append(layer(x))
            layer.attach(x.sum())
            losses.append(layer.attach(x.square().sum()) if me.rank == 0 else outputs[-1].square().sum())
        for n in order:
            losses[n].backward()
        return [weight.grad for weight in layer.expert_weights]

    for grads in virtual_world(2).run(rank):
        assert all(grad.any() for grad in grads)


def test_attach_leaves_out_what_is_over():
    def rank(me):
        layer = make(me.transport(), schedule="chunked(2)")
        x = tokens(6, me.rank).requires_grad_()
        first = layer(x).sum()
        first.backward()
        second = layer(x)
        loss = layer.attach(x.sum()) if me.rank == 0 else second.sum()
        loss.backward()

    virtual_world(2).run(rank)


@pytest.mark.parametrize("path", PATHS)
def test_stats_and_events_are_those_of_the_last_call(path):
    layer, call = caller(path, LocalTransport(), aux_loss_coef=0.0)
    for count in (3, 8, 5):
        y = call(tokens(count))
        assert layer.stats().tokens_per_expert.sum() == count * K
    events = len(layer.last_events)
    y.sum().backward()
    assert path == "inline" or len(layer.last_events) > events
    assert "forward" in layer.explain()


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize("backend", [*BACKENDS, "inductor"])
def test_a_compiled_layer_leaves_what_an_eager_one_does(backend, fresh):
    layer = make(aux_loss_coef=0.1, z_loss_coef=0.01, capacity_factor=1.0)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for count in (5, 5):
        x = tokens(count)
        y = compiled(x)
        got = aux_loss(layer)
        stats = layer.stats()
        want_y = layer(x)
        close(y.detach(), want_y.detach())
        want = layer.stats()
        assert stats.tokens_per_expert.equal(want.tokens_per_expert)
        assert (stats.dropped_tokens, stats.schedule) == (want.dropped_tokens, want.schedule)
        eager = aux_loss(layer)
        close(got.detach(), eager.detach())
        gradients = [torch.autograd.grad(y.sum() + loss, list(layer.parameters())) for y, loss in
                     ((y, got), (want_y, eager))]  # fmt: skip
        for mine, theirs in zip(*gradients, strict=True):
            close(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_losses_add_up_whatever_was_left_before_and_are_compiled_once(backend, fresh):
    layers = [make(aux_loss_coef=0.1) for _ in range(10)]
    inputs = [tokens(6, seed) for seed in range(4)]
    for layer in layers:
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        outputs = [compiled(x) for x in inputs]
        with torch.no_grad():
            layer(inputs[0])
        loss = layer.take_aux_loss()
        want = expected_loss(layer, *inputs)
        close(loss.detach(), want.detach())
        close(router_gradient(layer, loss), router_gradient(layer, want))
        del outputs
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one graph for all layers and all that was left"
    assert not left._arrived


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_that_calls_a_layer_twice(backend, fresh):
    layer, other = make(aux_loss_coef=0.1), make(aux_loss_coef=0.2)
    model = nn.Sequential(layer, nn.Tanh(), other, layer)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = tokens(6)
    y = model(x)
    want = aux_loss(model)
    for _ in range(3):
        close(compiled(x).detach(), y.detach())
        got = aux_loss(model)
        close(got.detach(), want.detach())
    close(router_gradient(layer, got), router_gradient(layer, want))


@pytest.mark.parametrize("backend", BACKENDS)
def test_untaken_losses_of_compiled_calls_do_not_pile_up(backend, fresh):
    layer = make(aux_loss_coef=0.1)
    compiled = torch.compile(layer, backend=backend)

    def step(count):
        for _ in range(count):
            compiled(tokens(4)).sum().backward()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(20)
        before = count_tensors()
        step(200)
        assert count_tensors() <= before + 2
    assert sum("auxiliary loss was dropped" in str(one.message) for one in caught) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inside", [True, False])
def test_a_recompute_of_a_compiled_call_adds_none(backend, inside, fresh):
    """A checkpoint inside what is compiled breaks the graph: it may not write outside of itself."""
    layer = make(aux_loss_coef=0.1)
    x = tokens(6).requires_grad_()
    if inside:
        call = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend=backend)
    else:
        compiled = torch.compile(layer, backend=backend)
        call = lambda x: checkpoint(compiled, x, use_reentrant=False)  # noqa: E731
    y = call(x)
    taken = layer.take_aux_loss()
    close(taken.detach(), expected_loss(layer, x).detach())
    (y.sum() + taken).backward()
    assert layer.take_aux_loss() is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_training_step_takes_its_losses(backend, fresh):
    layer = make(aux_loss_coef=0.1)

    def loss_of(x):
        return layer(x).square().mean() + aux_loss(layer)

    compiled = torch.compile(loss_of, backend=backend)
    for seed in range(3):
        x = tokens(6, seed)
        got, want = compiled(x), loss_of(x)
        close(got.detach(), want.detach())
        close(router_gradient(layer, got), router_gradient(layer, want))


def test_an_export_leaves_nothing(fresh):
    layer = make(aux_loss_coef=0.1)
    for strict in (False, True):
        program = torch.export.export(layer, (tokens(6),), strict=strict)
        same_bits(program.module()(tokens(6)).detach(), layer(tokens(6)).detach())
        assert aux_loss(layer) > 0, "of the eager call"
        assert aux_loss(layer) == 0 and not left._arrived
