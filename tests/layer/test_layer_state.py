"""The state of every module of ours: where it starts, from the meta device too, and which numbers stay float32."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from moe_overlap import ConfigError, Experts, MoELayer, ShortcutBlock
from moe_overlap.layer.experts import weights_of
from moe_overlap.layer.shared_expert import SharedExpert
from moe_overlap.routing.linear import LinearRouter
from tests.layers import D, E, F, K, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import same_bits

STEPS, STEP = 1000, 0.001


def biased(dtype=torch.float32, **options):
    return LinearRouter(D, E, K, score="sigmoid", bias=True, dtype=dtype, **options)


def layer_with_bias(**options):
    return MoELayer(D, F, E, K, router=biased(), shared_expert_size=F, **options)


def block(**options):
    layer = MoELayer(D, F, E, K, router=biased())
    return ShortcutBlock([nn.Linear(D, D)], layer, tap=0, slot=0, shared_expert=SharedExpert(D, F, "swiglu"),
                         combine="gated", **options)  # fmt: skip


MODULES = {
    "router": biased,
    "experts": lambda: Experts(D, F, E),
    "some experts": lambda: Experts(D, F, E, expert_ids=(6, 1), activation="relu"),
    "layer": layer_with_bias,
    "layer of latents": lambda: MoELayer(D, F, E, K, shared_expert_size=F, latent_size=4),
    "block": block,
}

# ---------------------------------------------------------------- from the meta device


@pytest.mark.parametrize("name", MODULES)
def test_reset_parameters_starts_a_module_as_its_construction_does(name):
    torch.manual_seed(3)
    eager = MODULES[name]()
    with torch.device("meta"):
        module = MODULES[name]()
    assert all(value.is_meta for value in module.state_dict().values())
    module.to_empty(device="cpu")
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            value.fill_(float("nan"))
    if name == "block":  # the backbone and the branch are the caller's
        torch.manual_seed(3)
        block()
        for part in module.modules():
            if isinstance(part, nn.Linear):
                part.reset_parameters()
        module.reset_parameters()
        assert all(value.isfinite().all() for value in module.state_dict().values())
        assert not module.moe.router.expert_bias_E.any()
        return
    torch.manual_seed(3)
    module.reset_parameters()
    state = eager.state_dict()
    for key, value in module.state_dict().items():
        same_bits(value, state[key])


def test_the_usual_loop_over_all_modules_initialises_everything():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(D, D), layer_with_bias(), block())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.fill_(float("nan"))
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert model(tokens(5, dtype=torch.float32)).isfinite().all()


def test_a_part_that_cannot_reset_itself_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * x

    with pytest.raises(ConfigError, match="Odd = 'no reset_parameters"):
        make(shared_expert=Odd()).reset_parameters()
    make(shared_expert=nn.Sequential(nn.Linear(D, D), nn.Tanh())).reset_parameters()


# ---------------------------------------------------------------- the selection bias is float32


CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
    "double": lambda m: m.double(),
    "to float64": lambda m: m.to(torch.float64),
    "there and back": lambda m: m.bfloat16().float(),
    "twice": lambda m: m.half().bfloat16(),
    "deepcopy": lambda m: copy.deepcopy(m.bfloat16()),
    "swapped": lambda m: swapped(m),
}


def swapped(module):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return module.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", ["router", "layer", "block"])
def test_a_cast_leaves_the_bias_alone_and_small_steps_add_up(cast, kind):
    module = {"router": biased, "layer": layer_with_bias, "block": block}[kind]()
    router = {"router": lambda: module, "layer": lambda: module.router, "block": lambda: module.moe.router}[kind]()
    with torch.no_grad():
        router.expert_bias_E.fill_(1.0 + 2**-20)
    module = CASTS[cast](module)
    router = next(one for one in module.modules() if isinstance(one, LinearRouter))
    bias_E = router.expert_bias_E
    assert (
        bias_E.dtype == torch.float32
        and bias_E
        is dict(module.named_buffers())[
            {"router": "", "layer": "router.", "block": "moe.router."}[kind] + "expert_bias_E"
        ]
    )
    assert (bias_E == 1.0 + 2**-20).all(), "and not rounded on the way"
    bias_E.zero_()
    for _ in range(STEPS):
        router.expert_bias_E.add_(STEP)
    assert abs(router.expert_bias_E[0].item() - STEPS * STEP) < 1e-4
    if cast != "there and back":
        assert router.weight.dtype != torch.float32


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_a_state_dict_brings_the_bias_back_as_float32(assign, saved):
    first, second = biased(), biased(torch.bfloat16)
    first.expert_bias_E.uniform_()
    state = {name: value.to(saved) for name, value in first.state_dict().items()}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    same_bits(second.expert_bias_E, first.expert_bias_E.to(saved).float())
    assert second.state_dict()["expert_bias_E"].dtype == torch.float32


def test_the_bias_is_cast_on_the_meta_device_and_given_memory():
    with torch.device("meta"):
        layer = layer_with_bias()
    layer.bfloat16().to_empty(device="cpu")
    assert layer.router.expert_bias_E.dtype == torch.float32
    layer.reset_parameters()
    assert not layer.router.expert_bias_E.any() and layer(tokens(4).bfloat16()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_bias_decides_in_a_cast_layer(dtype):
    """A difference that half precision cannot hold beside 1 chooses the expert."""
    router = biased().to(dtype)
    with torch.no_grad():
        router.weight.zero_()
        router.expert_bias_E.fill_(1.0)
        router.expert_bias_E[5] += 1e-5
        router.expert_bias_E[2] += 2e-5
    assert router(tokens(3).to(dtype)).topk_ids_TK.tolist() == [[2, 5]] * 3


def test_a_router_without_a_bias_has_none_after_a_cast():
    router = LinearRouter(D, E, K).bfloat16()
    assert router.expert_bias_E is None and router.weight.dtype == torch.bfloat16
    decision = router(tokens(4).bfloat16())
    assert decision.topk_weights_TK.dtype == torch.float32, "computed in float32"


# ---------------------------------------------------------------- every rank draws what it holds


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_any_ids_start_as_in_the_whole_and_leave_the_generator_alike(activation):
    torch.manual_seed(5)
    whole = weights_of(Experts(D, F, E, activation=activation))
    after = torch.get_rng_state()
    for ids in ((0,), (7, 2), (), tuple(range(E))):
        torch.manual_seed(5)
        some = weights_of(Experts(D, F, E, activation=activation, expert_ids=ids))
        assert torch.equal(torch.get_rng_state(), after), "later layers start alike too"
        for part, all_of_them in zip(some, whole, strict=True):
            same_bits(part.detach(), all_of_them[list(ids)].detach())


@pytest.mark.parametrize("world", [2, 4, 8])
def test_two_layers_in_a_row_start_alike_on_any_number_of_ranks(world):
    def build(transport=None):
        torch.manual_seed(3)
        return [MoELayer(D, F, E, K, transport=transport, shared_expert_size=F) for _ in range(2)]

    def rank(me):
        return [{name: value.detach() for name, value in one.state_dict().items()} for one in build(me.transport())]

    by_rank = virtual_world(world).run(rank)
    for at, whole in enumerate(build()):
        for name, value in whole.state_dict().items():
            parts = [states[at][name] for states in by_rank]
            same_bits(torch.cat(parts) if name.startswith("experts.") else parts[-1], value)


class Drawn(torch.utils._python_dispatch.TorchDispatchMode):
    """How many normal numbers are drawn inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.normal_:
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("held", [1, 2, E])
def test_the_cost_is_that_of_the_experts_held(held):
    with Drawn() as drawn:
        Experts(D, F, E, expert_ids=range(held))
    assert drawn.count == held * 3 * F * D


def test_experts_differ_and_so_do_two_resets():
    experts = Experts(D, F, E)
    first = [weight.detach().clone() for weight in weights_of(experts)]
    for weight in first:
        assert len({one.sum().item() for one in weight}) == E
    experts.reset_parameters()
    assert not any(torch.equal(a, b) for a, b in zip(first, weights_of(experts), strict=True))


def test_construction_under_a_fake_mode():
    with torch._subclasses.FakeTensorMode():
        layer = MoELayer(D, F, E, K)
    assert layer.experts.down_proj.shape == (E, D, F)
