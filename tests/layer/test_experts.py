"""`Experts`: alone against the oracle, how they start, and how a layer uses them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from moe_overlap import ConfigError, Experts, MoELayer, ShortcutBlock, ops
from moe_overlap.layer.experts import old_name, weights_of
from tests import oracle
from tests.layers import D, E, F, K, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

KINDS = ("swiglu", "gelu", "relu")


@pytest.mark.parametrize("activation", KINDS)
def test_alone_they_compute_sorted_rows_as_the_oracle(activation):
    experts = Experts(D, F, E, activation=activation, dtype=torch.float64)
    x_RD = tokens(20).requires_grad_()
    counts = torch.tensor([3, 0, 5, 1, 0, 4, 2, 3])  # two of the rows belong to nobody
    y_RD = experts(x_RD, counts.cumsum(0).to(torch.int32))
    w_in, w_out = weights_of(experts)
    groups = x_RD[:18].split(counts.tolist())
    want = torch.cat([oracle.mlp(rows, w_in[i], w_out[i], activation) for i, rows in enumerate(groups)])
    close(y_RD[:18], want)
    assert not y_RD[18:].any()
    seed = torch.randn_like(want)
    inputs = [x_RD, w_in, w_out]
    got = torch.autograd.grad(y_RD[:18], inputs, seed)
    for mine, expected in zip(got, torch.autograd.grad(want, inputs, seed), strict=True):
        close(mine, expected)


def test_a_layer_written_with_them_is_the_layer():
    layer = make()
    x = tokens(13)
    routing = layer.router(x)
    _, offs, slot_to_row, _ = ops.row_map(routing.topk_ids_TK, num_experts=E)
    x_RD = ops.permute(x, slot_to_row, offs, num_rows=routing.topk_ids_TK.numel())
    y = ops.combine(layer.experts(x_RD, offs), slot_to_row, routing.topk_weights_TK)
    same_bits(y, layer(x))


@pytest.mark.parametrize("activation", KINDS)
def test_names_and_shapes_are_hugging_faces(activation):
    layer = make(activation=activation, shared_expert_size=5)
    first = "gate_up_proj" if activation == "swiglu" else "up_proj"
    rows = 2 * F if activation == "swiglu" else F
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "router.weight": (E, D),
        "shared_expert.up.weight": (10 if activation == "swiglu" else 5, D),
        "shared_expert.down.weight": (D, 5),
        f"experts.{first}": (E, rows, D),
        "experts.down_proj": (E, D, F),
    }


# ---------------------------------------------------------------- how they start


def drawn(activation):
    return [weight.detach() for weight in make(activation=activation).expert_weights]


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_starts_alike(world, activation):
    def rank(me):
        # Virtual ranks share one generator, so each one builds its layer without a switch to another.
        return [weight.detach() for weight in make(me.transport(), activation=activation).expert_weights]

    by_rank = virtual_world(world).run(rank)
    for whole, *parts in zip(drawn(activation), *by_rank, strict=True):
        same_bits(torch.cat(parts), whole)
        assert abs(whole.std().item() * whole.shape[2] ** 0.5 - 1) < 0.1, "std fan_in ** -0.5"


def test_from_the_meta_device():
    eager = make(shared_expert_size=F)
    torch.manual_seed(3)
    with torch.device("meta"):
        layer = MoELayer(D, F, E, K, dtype=torch.float64, shared_expert_size=F)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(3)
    for part in (layer.router, layer.shared_expert, layer.experts):  # in the order in which they are built
        for module in part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    for (name, parameter), (other, expected) in zip(layer.named_parameters(), eager.named_parameters(), strict=True):
        assert name == other
        same_bits(parameter, expected)
    assert layer(tokens(5)).isfinite().all()


def test_experts_of_some_ids_are_those_of_the_whole():
    torch.manual_seed(5)
    whole = Experts(D, F, E)
    torch.manual_seed(5)
    some = Experts(D, F, E, expert_ids=(6, 1))
    for part, all_of_them in zip(weights_of(some), weights_of(whole), strict=True):
        same_bits(part, all_of_them[[6, 1]])
    assert "2 of 8" in repr(some)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("hidden_size", {"hidden_size": 0}),
        ("ffn_hidden_size", {"ffn_hidden_size": True}),
        ("num_experts", {"num_experts": 2.0}),
        ("activation", {"activation": "tanh"}),
        ("expert_ids", {"expert_ids": (0, 0)}),
        ("expert_ids", {"expert_ids": (0, E)}),
        ("expert_ids", {"expert_ids": 3}),
        ("expert_ids", {"expert_ids": (0.0, 1.0)}),
        ("expert_ids", {"expert_ids": (True, False)}),
    ],
)
def test_bad_construction_names_the_field(field, options):
    with pytest.raises(ConfigError) as caught:
        Experts(**{"hidden_size": D, "ffn_hidden_size": F, "num_experts": E, **options})
    assert caught.value.field == field


def test_weights_are_drawn_expert_by_expert_after_router_and_shared_expert():
    """What a seed stands for: one number of the CPU's generator for all experts, one generator for each weight."""
    layer = make(shared_expert_size=F)
    torch.manual_seed(3)
    for part in (layer.router, layer.shared_expert.up, layer.shared_expert.down):
        part.reset_parameters()
    seed = int(torch.randint(1 << 62, ()))
    for i in range(E):
        for number, weight in enumerate(layer.expert_weights):
            generator = torch.Generator().manual_seed(seed + 2 * i + number)
            drawn = torch.empty_like(weight[i]).normal_(std=weight.shape[2] ** -0.5, generator=generator)
            same_bits(drawn, weight[i].detach())


def test_parametrized_weights_are_not_reset_silently():
    layer = make()
    parametrize.register_parametrization(layer.experts, "down_proj", nn.Identity())
    with pytest.raises(ConfigError, match="parametrized"):
        layer.experts.reset_parameters()


# ---------------------------------------------------------------- read once, as attributes


class Counted(nn.Module):
    """A parametrization: scaled, and counted."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return 3 * weight


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_parametrization_acts_and_is_computed_once_in_a_call(world, schedule):
    def rank(me):
        torch.manual_seed(3)
        plain, changed = (make(me.transport() if world > 1 else None, schedule=schedule) for _ in range(2))
        counts = []
        for name in ("gate_up_proj", "down_proj"):
            with torch.no_grad():
                getattr(plain.experts, name).mul_(3)
            parametrize.register_parametrization(changed.experts, name, Counted())
            counts.append(changed.experts.parametrizations[name][0])
        for part in counts:
            part.calls = 0
        x = tokens(9, me.rank)
        y = changed(x)
        assert [part.calls for part in counts] == [1, 1]
        changed.stats(), changed.explain()
        assert [part.calls for part in counts] == [1, 1], "what is said about a call computes no weight"
        same_bits(y, plain(x))
        y.square().sum().backward()
        plain(x).square().sum().backward()
        for name in ("gate_up_proj", "down_proj"):
            close(changed.experts.parametrizations[name].original.grad, 3 * getattr(plain.experts, name).grad)
        return y

    virtual_world(world).run(rank)


class LowRank(nn.Module):
    """An adapter as a parametrization: weight + left @ right."""

    def __init__(self):
        super().__init__()
        self.left = nn.Parameter(torch.randn(E, D, 2, dtype=torch.float64))
        self.right = nn.Parameter(torch.randn(E, 2, F, dtype=torch.float64))

    def forward(self, weight):
        return weight + self.left @ self.right


def test_adapters_on_frozen_weights_act_and_learn():
    layer = make()
    layer.experts.requires_grad_(False)
    adapter = LowRank()
    parametrize.register_parametrization(layer.experts, "down_proj", adapter)
    x = tokens(11)
    routing = layer.router(x)
    w_in, w_out = (
        layer.experts.gate_up_proj,
        layer.experts.parametrizations.down_proj.original + adapter.left @ adapter.right,
    )
    want = oracle.moe(x, routing.topk_ids_TK, routing.topk_weights_TK, w_in, w_out)
    y = layer(x)
    close(y, want)
    inputs = [adapter.left, adapter.right]
    for got, expected in zip(
        torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True
    ):
        close(got, expected)


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_hooks_that_a_layer_never_calls_are_told_of(schedule):
    layer = make(schedule=schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(tokens(3))
    prune.l1_unstructured(layer.experts, "down_proj", 0.5)
    with pytest.warns(UserWarning, match="never calls"):
        layer(tokens(3))


def change_shape(layer):
    layer.experts.down_proj = nn.Parameter(torch.zeros(E // 2, D, F + 1, dtype=torch.float64))


def change_dtype(layer):
    layer.experts.gate_up_proj = nn.Parameter(layer.experts.gate_up_proj.detach().float())


def change_activation(layer):
    layer.experts.activation = "relu"


def lose_a_weight(layer):
    del layer.experts.down_proj


CHANGES = [change_shape, change_dtype, change_activation, lose_a_weight]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_experts_that_no_longer_fit_are_refused_on_all_ranks_before_anything_is_sent(change):
    def rank(me):
        layer = make(me.transport(), schedule="chunked(2)")
        right = layer.experts
        layer(tokens(5, me.rank))
        exchanges = layer.transport.stats.exchanges
        if me.rank == 1:
            layer.experts = copy.deepcopy(right)
            change(layer)
        with pytest.raises((ConfigError, AttributeError)) as caught:
            layer(tokens(5, me.rank))
        assert me.rank == 1 or isinstance(caught.value, ConfigError)
        assert layer.transport.stats.exchanges == exchanges
        layer.experts = right
        layer(tokens(5, me.rank))

    virtual_world(2).run(rank)


# ---------------------------------------------------------------- state dicts


def old_names(state):
    return {name.replace("experts.", ""): value for name, value in state.items()}


@pytest.mark.parametrize("kind", ["layer", "in_a_model", "block"])
def test_checkpoints_with_the_old_names_load(kind):
    def build():
        layer = make(activation="relu" if kind == "layer" else "swiglu")
        if kind == "block":
            return ShortcutBlock([nn.Linear(D, D, dtype=torch.float64)], layer, tap=0, slot=0)
        return layer if kind == "layer" else nn.Sequential(nn.Linear(D, D, dtype=torch.float64), layer)

    saved, loaded = build(), build()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(1)
    state = old_names(saved.state_dict())
    assert not any("experts." in name for name in state)
    before = dict(state)
    assert str(loaded.load_state_dict(state)) == "<All keys matched successfully>"
    assert state == before, "the caller's dict is left alone"
    for got, want in zip(loaded.parameters(), saved.parameters(), strict=True):
        same_bits(got, want)


def test_the_order_of_the_parameters_is_what_it_was():
    """States of optimizers go by position."""
    names = [name for name, _ in make(shared_expert_size=F).named_parameters()]
    assert names == ["experts.gate_up_proj", "experts.down_proj", "router.weight", "shared_expert.up.weight",
                     "shared_expert.down.weight"]  # fmt: skip


def test_an_old_name_beside_the_new_one_is_not_taken():
    layer, other = make(), make()
    state = {**other.state_dict(), "down_proj": torch.zeros_like(other.experts.down_proj)}
    with pytest.raises(RuntimeError, match="Unexpected.*down_proj"):
        layer.load_state_dict(state)
    layer.load_state_dict(state, strict=False)
    same_bits(layer.experts.down_proj, other.experts.down_proj)


def test_a_subclass_may_have_a_weight_of_an_old_name():
    class Projected(MoELayer):
        def __init__(self):
            super().__init__(D, F, E, K, dtype=torch.float64)
            self.down_proj = nn.Parameter(torch.randn(3))

    saved, loaded = Projected(), Projected()
    loaded.load_state_dict(saved.state_dict())
    same_bits(loaded.down_proj, saved.down_proj)
    same_bits(loaded.experts.down_proj, saved.experts.down_proj)


def test_hooks_of_the_user_that_give_old_names_come_first():
    saved, loaded = make(), make()
    state = {f"their.{name}": value for name, value in old_names(saved.state_dict()).items()}

    def rename(_, state_dict, prefix, *rest):
        for name in list(state_dict):
            state_dict[name.removeprefix("their.")] = state_dict.pop(name)

    loaded.register_load_state_dict_pre_hook(rename)
    for _ in range(2):
        loaded.load_state_dict(state)
    same_bits(loaded.experts.down_proj, saved.experts.down_proj)
    assert len(loaded._load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("experts.down_proj", "down_proj"),
        ("blocks.0.moe.experts.gate_up_proj/exp_avg", "blocks.0.moe.gate_up_proj/exp_avg"),
        ("model.experts.0.moe.experts.up_proj", "model.experts.0.moe.up_proj"),
        ("model.experts.0.weight", "model.experts.0.weight"),
        ("my_experts.down_proj", "my_experts.down_proj"),
    ],
)
def test_old_name(name, old):
    assert old_name(name) == old


def test_a_missing_or_a_foreign_name_is_still_refused():
    layer = make()
    state = layer.state_dict()
    lost = {name: value for name, value in state.items() if name != "experts.down_proj"}
    with pytest.raises(RuntimeError, match="Missing.*experts.down_proj"):
        layer.load_state_dict(lost)
    with pytest.raises(RuntimeError, match="Unexpected.*other"):
        layer.load_state_dict({**state, "other": torch.zeros(1)})


def test_a_deep_copy_has_experts_of_its_own():
    layer = make()
    twin = copy.deepcopy(layer)
    assert twin.experts is not layer.experts and twin.experts.expert_ids == layer.experts.expert_ids
    with torch.no_grad():
        twin.experts.down_proj.zero_()
    assert layer.experts.down_proj.any()
