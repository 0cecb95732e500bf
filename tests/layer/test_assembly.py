"""The parts of a layer given instead of built: used as they are, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_overlap import ConfigError, Experts, MoELayer
from moe_overlap.auto.auto import ONE_RANK, AutoSchedule
from moe_overlap.layer.experts import weights_of
from moe_overlap.placement.placement import Placement
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.builders import chunked
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.transport.local import LocalTransport
from tests import oracle
from tests.auto.planted import cost_model, planted
from tests.layers import D, E, F, K, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

DOUBLE = torch.float64


def dispatcher(transport=None, placement=None, **options):
    transport = transport or LocalTransport()
    given = {"hidden": D, "ffn_hidden": F, "top_k": K, "activation": "swiglu", "dtype": DOUBLE, **options}
    placement = placement or Placement.identity(E, transport.world_size)
    return Dispatcher(transport=transport, placement=placement, **given)


def test_all_parts_given_make_the_layer_that_is_built():
    built = make(shared_expert_size=F, schedule="shared_expert")
    parts = {"router": built.router, "experts": built.experts, "shared_expert": built.shared_expert,
             "dispatcher": dispatcher(), "schedule": built.schedule}  # fmt: skip
    layer = MoELayer(D, F, E, K, **parts)
    for name in ("router", "experts", "shared_expert", "dispatcher", "schedule"):
        assert getattr(layer, name) is parts[name]
    assert layer.transport is parts["dispatcher"].transport
    x = tokens(17)
    same_bits(layer(x), built(x))


class Foreign(nn.Module):
    """Weights and an activation, as other libraries hold them; a forward that must not be called."""

    def __init__(self, count=E, ffn=F, hidden=D, kind="gelu", dtype=DOUBLE):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        rows = 2 * ffn if kind == "swiglu" else ffn
        first = torch.randn(count, rows, hidden, generator=generator, dtype=DOUBLE).to(dtype)
        setattr(self, "gate_up_proj" if kind == "swiglu" else "up_proj", nn.Parameter(first))
        self.down_proj = nn.Parameter(torch.randn(count, hidden, ffn, generator=generator, dtype=DOUBLE).to(dtype))
        self.activation = kind

    def forward(self, *_):
        raise AssertionError("the layer reads the weights")


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("world", [1, 2])
def test_experts_of_another_class_bring_weights_activation_and_dtype(world, kind):
    def rank(me):
        experts = Foreign(E // world, kind=kind)
        layer = MoELayer(D, F, E, K, transport=me.transport(), experts=experts)
        assert layer.router.weight.dtype == DOUBLE and layer.dispatcher.activation == kind
        x = tokens(9, me.rank)
        y = layer(x)
        y.sum().backward()
        routing = layer.router(x)
        weights = [torch.cat([weight] * world) for weight in weights_of(experts)]
        close(y, oracle.moe(x, routing.topk_ids_TK, routing.topk_weights_TK, *weights, kind))
        assert experts.down_proj.grad.any()

    virtual_world(world).run(rank)


def test_a_shared_expert_of_another_class_is_called():
    class Doubled(nn.Module):
        def forward(self, x_TD):
            return 2 * x_TD

    plain, layer = make(), make(shared_expert=Doubled())
    x = tokens(8)
    close(layer(x), plain(x) + 2 * x)


def test_experts_in_other_slots_give_the_same_function():
    """A dispatcher with a placement of its own: the experts have to be those of its slots."""
    order = (3, 0, 7, 5, 1, 2, 6, 4)
    identity = make()

    def rank(me):
        placement = Placement(E, E, 2, order)
        layer = MoELayer(D, F, E, K, router=identity.router, dispatcher=dispatcher(me.transport(), placement),
                         dtype=DOUBLE)  # fmt: skip
        mine = [order[slot] for slot in placement.slots_of_rank(me.rank)]
        assert layer.experts.expert_ids == tuple(mine)
        with torch.no_grad():
            for weight, whole in zip(layer.expert_weights, identity.expert_weights, strict=True):
                weight.copy_(whole[mine])
        x = tokens(11, me.rank)
        close(layer(x), identity(x).detach())

    virtual_world(2).run(rank)


def test_a_shared_expert_whose_result_would_be_broadcast_is_refused():
    layer = make(shared_expert=nn.Linear(D, 1, dtype=DOUBLE))
    with pytest.raises(ConfigError, match="shared_expert = "):
        layer(tokens(8))


class Pair(nn.Module):
    """A router that returns no RoutingDecision."""

    def forward(self, x_TD):
        return torch.ones(len(x_TD), K), torch.zeros(len(x_TD), K, dtype=torch.int32)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("schedule", ["serial", "auto"])
def test_a_router_that_returns_something_else_is_named(world, schedule):
    def rank(me):
        layer = make(me.transport() if world > 1 else None, router=Pair(), schedule=schedule)
        with pytest.raises(ConfigError, match="tuple.*RoutingDecision"):
            layer(tokens(4))

    virtual_world(world).run(rank)


def test_a_forward_that_is_never_called_is_told_of():
    class Scaled(Experts):
        def forward(self, x_RD, offs):
            return 2 * super().forward(x_RD, offs)

    with pytest.warns(UserWarning, match="Scaled has a forward of its own"):
        make(experts=Scaled(D, F, E, dtype=DOUBLE))


def test_router_and_dispatcher_may_both_drop_bad_logits():
    router = LinearRouter(D, E, K, bad_logits="drop", dtype=DOUBLE)
    layer = MoELayer(D, F, E, K, router=router, dispatcher=dispatcher(bad_logits="drop"), dtype=DOUBLE)
    x = tokens(4)
    x[1] = float("nan")
    assert layer(x).shape == x.shape and layer.stats().dropped_tokens == K


def test_an_auto_schedule_belongs_to_one_layer():
    """It keeps what was measured for it: costs and budget of another layer are not this one's."""
    auto = AutoSchedule(op_verb="B", num_ops=0, overlap=False)
    assert make(schedule=auto).schedule.joined
    with pytest.raises(ConfigError, match="another layer"):
        make(schedule=auto)


def test_an_auto_schedule_that_is_given_is_used():
    auto = [AutoSchedule(op_verb="B", num_ops=0) for _ in range(2)]

    def rank(me):
        layer = make(me.transport(), schedule=auto[me.rank])
        layer(tokens(6, me.rank))
        assert layer.schedule is auto[me.rank] and auto[me.rank].found

    with planted(cost_model()):
        virtual_world(2).run(rank)
    assert make(schedule=AutoSchedule(op_verb="B", num_ops=0)).schedule.name == ONE_RANK


class Weightless(nn.Module):
    activation = "relu"


class TwoDtypes(Foreign):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(self.up_proj.detach().float())


class Biased(Foreign):
    def __init__(self):
        super().__init__()
        self.down_proj_bias = nn.Parameter(torch.zeros(E, D, dtype=DOUBLE))


OTHER_IDS = Experts(D, F, E, expert_ids=range(E - 1, -1, -1), dtype=DOUBLE)
FEWER = Placement.identity(E // 2, 1)
REFUSED = {
    "no module": ("experts", {"experts": "mine"}),
    "no weights": ("experts", {"experts": Weightless()}),
    "no activation": ("experts.activation", {"experts": nn.Linear(D, D)}),
    "another activation": ("activation", {"experts": Foreign(kind="gelu"), "activation": "relu"}),
    "another dtype": ("dtype", {"experts": Foreign(), "dtype": torch.float32}),
    "too few": ("up_proj", {"experts": Foreign(count=E - 1)}),
    "another width": ("up_proj", {"experts": Foreign(hidden=D + 1)}),
    "another hidden width": ("up_proj", {"experts": Foreign(ffn=F + 1)}),
    "another device": ("device", {"experts": Foreign(), "device": "meta"}),
    "numbers that rows cannot be": ("experts.down_proj", {"experts": Foreign(dtype=torch.complex64)}),
    "two dtypes": ("down_proj", {"experts": TwoDtypes()}),
    "swiglu asked for": ("activation", {"experts": Foreign(kind="gelu"), "activation": "swiglu"}),
    "no transport": ("transport", {"transport": "gloo"}),
    "no dispatcher": ("dispatcher", {"dispatcher": "mine"}),
    "a group beside a transport": ("transport", {"group": "world", "transport": LocalTransport()}),
    "a group beside a dispatcher": ("dispatcher", {"group": "world", "dispatcher": dispatcher()}),
    "hidden width of the dispatcher": ("dispatcher.ffn_hidden", {"dispatcher": dispatcher(ffn_hidden=F + 1)}),
    "activation of the dispatcher": ("dispatcher.activation", {"dispatcher": dispatcher(activation="relu")}),
    "ranks of the dispatcher": ("dispatcher.placement", {"dispatcher": dispatcher(placement=Placement.identity(E, 2))}),
    "a function": ("router", {"router": lambda x: x}),
    "biases": ("experts", {"experts": Biased()}),
    "other ids": ("experts.expert_ids", {"experts": OTHER_IDS}),
    "shared twice": ("shared_expert_size", {"shared_expert": nn.Identity(), "shared_expert_size": F}),
    "shared function": ("shared_expert", {"shared_expert": torch.tanh}),
    "transport twice": ("dispatcher", {"dispatcher": dispatcher(), "transport": LocalTransport()}),
    "width of the dispatcher": ("dispatcher.hidden", {"dispatcher": dispatcher(hidden=D + 1)}),
    "top_k of the dispatcher": ("dispatcher.top_k", {"dispatcher": dispatcher(top_k=K + 1)}),
    "experts of the dispatcher": ("dispatcher.placement", {"dispatcher": dispatcher(placement=FEWER)}),
    "dtype of the dispatcher": ("dispatcher.dtype", {"dispatcher": dispatcher(dtype=torch.float32)}),
    "auto for a shared expert": ("schedule", {"schedule": AutoSchedule(op_verb="S", num_ops=0)}),
    "auto for a block": ("schedule", {"schedule": AutoSchedule(op_verb="B", num_ops=2)}),
    "auto joined": ("overlap", {"schedule": AutoSchedule(op_verb="B", num_ops=0), "overlap": False}),
    "a budget beside auto": ("max_in_flight_bytes", {"schedule": AutoSchedule(op_verb="B", num_ops=0),
                                                     "max_in_flight_bytes": 8}),
    "a schedule with a shared expert": ("schedule", {"schedule": chunked(2, shared=True)}),
    "a router of another size": ("top_k", {"router": LinearRouter(D, E, K + 1)}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_fit_are_refused_by_name(case):
    field, options = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        MoELayer(D, F, E, K, **({"dtype": DOUBLE} if "experts" not in options else {}) | options)
    assert caught.value.field == field


def test_an_argument_that_nobody_has_is_named_as_the_layers():
    with pytest.raises(TypeError, match=r"MoELayer\(\) got an unexpected keyword argument 'aux_loss'"):
        make(aux_loss=0.1)
