"""Every public entry point under torch.compile, on one rank and on several: eager's results and gradients, or a graph
break that gives them; never a parameter without a gradient. And what torch.export makes of one rank."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import moe_overlap
from moe_overlap import Experts, MoELayer, ShortcutBlock, aux_loss, moe_forward, ops
from moe_overlap.routing.linear import LinearRouter
from tests.layers import D, E, F, K, make, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close

BACKENDS = ["eager", "aot_eager"]
# What aot_eager traces too: on several ranks it is soaked.
EAGER_SOAKED = [pytest.param(BACKENDS[0], marks=pytest.mark.soak), BACKENDS[1]]
# Compiles C++ for many seconds: for what is seen through.
SLOW = "inductor"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def layer_call(layer):
    return lambda x: layer(x).square().mean() + aux_loss(layer)


def ticket_call(layer):
    def call(x):
        ticket = layer.begin(x)
        between = (2 * x).tanh()
        layer.run_experts(ticket)
        y = layer.finish(ticket)
        return y.square().mean() + between.sum()

    return call


def attach_call(layer):
    def call(x):
        y = layer(x)
        return layer.attach(x.square().sum()) + 0.5 * y.sum()

    return call


def functional_call(layer):
    w_in, w_out = layer.expert_weights

    def call(x):
        routing = layer.router(x)
        transport = None if layer.transport.world_size == 1 else layer.transport
        y = moe_forward(x, routing.topk_ids_TK, routing.topk_weights_TK, w_in, w_out, transport=transport)
        return y.square().mean()

    return call


def block_call(layer):
    block = ShortcutBlock([nn.Linear(D, D, dtype=torch.float64), torch.tanh], layer, tap=0, slot=1)
    with torch.no_grad():
        block.backbone[0].weight.copy_(torch.eye(D))
        block.backbone[0].bias.zero_()
    return lambda x: block(x).square().mean()


CALLS = {
    "layer": (layer_call, {"aux_loss_coef": 0.1}),
    "layer, chunked": (layer_call, {"schedule": "chunked(2)", "aux_loss_coef": 0.1}),
    "layer, shared expert": (layer_call, {"shared_expert_size": F, "schedule": "shared_expert(1)"}),
    "tickets": (ticket_call, {"schedule": "chunked(2)"}),
    "attach": (attach_call, {}),
    "functional": (functional_call, {}),
    "block": (block_call, {}),
}


def check_call(name, backend, transport, rank=0):
    """The loss and every gradient of two compiled steps are those of eager ones."""
    build, options = CALLS[name]
    eager, layer = make(transport, **options), make(transport, **options)
    plain, call = build(eager), build(layer)
    compiled = torch.compile(call, backend=backend)
    for count in (6, 9):
        results = []
        for one, function in ((eager, plain), (layer, compiled)):
            x = tokens(count + rank, rank).requires_grad_()
            loss = function(x)
            one.zero_grad()
            loss.backward()
            results.append([loss.detach(), x.grad, *(p.grad for p in one.parameters())])
        want, got = results
        for w, g in zip(want, got, strict=True):
            assert g is not None, f"{name}: a parameter without a gradient"
            close(g, w)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_one_rank(name, backend):
    check_call(name, backend, None)


@pytest.mark.parametrize("name", ["tickets", "functional"])
def test_one_rank_inductor(name):
    check_call(name, SLOW, None)


@pytest.mark.parametrize("backend", EAGER_SOAKED)
@pytest.mark.parametrize("name", CALLS)
def test_several_ranks(name, backend):
    """Virtual ranks are threads that take turns at waits, which no compilation has inside."""
    virtual_world(2).run(lambda me: check_call(name, backend, me.transport(), me.rank))


def on_gloo(name, backend):
    from moe_overlap.transport.opening import open_transport

    torch._dynamo.reset()
    transport = open_transport(torch.distributed.group.WORLD)
    try:
        check_call(name, backend, transport, transport.rank)
    finally:
        transport.close("the test is over")


@pytest.mark.parametrize("name", ["tickets", "functional", "layer"])
def test_ranks_that_are_processes(name):
    gloo_pool(2).run(on_gloo, name, "aot_eager")


# ---------------------------------------------------------------- the trial that was reported, and parts


@pytest.mark.parametrize("backend", [*BACKENDS, SLOW])
def test_weights_in_the_closure_of_a_compiled_function_are_trained(backend):
    layer = make(dtype=torch.float32)
    x = tokens(6, dtype=torch.float32)
    routing = layer.router(x)
    ids, weights = routing.topk_ids_TK.long(), routing.topk_weights_TK.detach()
    gate_up, down = layer.expert_weights
    call = torch.compile(lambda x: moe_forward(x, ids, weights, gate_up, down), backend=backend, fullgraph=True)
    call(x).square().sum().backward()
    got = gate_up.grad.clone(), down.grad.clone()
    layer.zero_grad()
    moe_forward(x, ids, weights, gate_up, down).square().sum().backward()
    for g, w in zip(got, (gate_up.grad, down.grad), strict=True):
        close(g, w.double(), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("schedule", ["auto", "chunked(2)"])
def test_options_of_the_functional_form(backend, autocast, schedule):
    layer = make(dtype=torch.float32)
    x = tokens(6, dtype=torch.float32)
    ids = layer.router(x).topk_ids_TK.long().masked_fill(torch.arange(6)[:, None] == 2, E)
    weights = layer.router(x).topk_weights_TK.detach()

    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = moe_forward(x, ids, weights, *layer.expert_weights, schedule=schedule, unused_id=E)
        return y.float().square().sum()

    got = torch.autograd.grad(torch.compile(call, backend=backend)(x), list(layer.experts.parameters()))
    want = torch.autograd.grad(call(x), list(layer.experts.parameters()))
    for g, w in zip(got, want, strict=True):
        close(g, w.double(), torch.bfloat16 if autocast else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_parts_of_a_layer(backend):
    router, experts = LinearRouter(D, E, K, dtype=torch.float64), Experts(D, F, E, dtype=torch.float64)

    def call(x):
        routing = router(x)
        _, offs, slot_to_row, _ = ops.row_map(routing.topk_ids_TK, num_experts=E)
        x_RD = ops.permute(x, slot_to_row, offs, num_rows=routing.topk_ids_TK.numel())
        return ops.combine(experts(x_RD, offs), slot_to_row, routing.topk_weights_TK).square().sum()

    parameters = [*router.parameters(), *experts.parameters()]
    x = tokens(7)
    got = torch.autograd.grad(torch.compile(call, backend=backend, fullgraph=True)(x), parameters)
    for g, w in zip(got, torch.autograd.grad(call(x), parameters), strict=True):
        close(g, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_step_does_with_gradients(backend):
    """clip_grad_norm_ and its like read gradients that are there after a compiled forward."""
    layer = make()
    compiled = torch.compile(layer, backend=backend)
    compiled(tokens(6)).square().sum().backward()
    parameters = list(layer.parameters())
    norm = torch.compile(lambda: moe_overlap.grad_norm(parameters), backend=backend)()
    close(norm.double(), torch.nn.utils.get_total_norm([p.grad for p in parameters]).double(), torch.float32)
    assert torch.compile(lambda: moe_overlap.gradients_are_finite(parameters), backend=backend)()
    torch.compile(lambda: moe_overlap.clip_grad_norm_(parameters, 0.1), backend=backend)()
    assert torch.nn.utils.get_total_norm([p.grad for p in parameters]) < 0.1001


@pytest.mark.parametrize("name", ["layer", "functional"])
def test_another_number_of_tokens_is_compiled_twice_at_most(name):
    """The second time for any number."""
    build, options = CALLS[name]
    call = build(make(**options))
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(call if name == "functional" else make(**options), backend="aot_eager", fullgraph=True)
    for count in (5, 6, 7, 8, 9):
        compiled(tokens(count))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# ---------------------------------------------------------------- torch.export


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = (nn.Parameter(w.detach()) for w in make().expert_weights)

    def forward(self, x, ids, weights):
        return moe_forward(x, ids, weights, self.gate_up, self.down, unused_id=E)


def given(count):
    routing = make().router(tokens(count))
    return tokens(count), routing.topk_ids_TK.long(), routing.topk_weights_TK.detach()


TOKENS = torch.export.Dim("tokens", min=2, max=4096)
EXPORTS = {
    "layer": (lambda: make(), lambda count: (tokens(count),)),
    "capacity": (lambda: make(capacity_factor=1.0), lambda count: (tokens(count),)),
    "all": (
        lambda: make(capacity_factor=1.25, aux_loss_coef=0.1, z_loss_coef=0.1, bad_logits="drop", shared_expert_size=F),
        lambda count: (tokens(count),),
    ),
    "functional": (Functional, given),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_saved_and_loaded(name, dynamic, strict):
    build, inputs = EXPORTS[name]
    model = build()
    shapes = tuple({0: TOKENS} for _ in inputs(2)) if dynamic else None
    program = torch.export.export(model, inputs(6), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (6, 17) if dynamic else (6,):
        close(loaded(*inputs(count)).detach(), model(*inputs(count)).detach())


def test_the_exported_layer_is_what_it_says():
    program = torch.export.export(MoELayer(D, F, E, K), (tokens(6).float(),))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"moe_overlap.row_map.default", "moe_overlap.permute.default", "moe_overlap.combine.default"} <= names
