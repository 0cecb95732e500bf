"""The model's state dict: experts say which ones they are, in every wrapper and make of layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from moe_overlap import ConfigError, MoELayer
from moe_overlap.placement.placement import Placement
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.transport import EmulatedLinkTransport, LinkSpec, NodeTopology, ProcessGroupTransport
from tests.parallel.saved import EXPERTS, WRAPPERS, D, E, F, model_of, through_files, whole, wrapped
from tests.ranks import gloo_pool
from tests.tolerances import same_bits

WORLD = 2


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def inner(name: str) -> str:
    """The name that a tensor has in the model without a wrapper."""
    return name.removeprefix("module.").removeprefix("_orig_mod.")


def check_whole(model: nn.Module, want: dict[str, torch.Tensor]) -> None:
    """That the model has these weights, by its state dict and by its parameters."""
    names = {inner(name): value for name, value in whole(model.state_dict()).items() if name != "n_averaged"}
    assert names.keys() == want.keys()
    for name, value in want.items():
        same_bits(names[name], value)
    first = dist.get_rank() * E // WORLD
    for name, parameter in model.named_parameters():
        if name.endswith(EXPERTS):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            same_bits(local.detach(), want[inner(name)][first : first + E // WORLD])


def shown_and_loaded(kind: str) -> None:
    model, want = wrapped(kind), model_of(None).state_dict()
    state = model.state_dict()
    ids = tuple(range(dist.get_rank() * 6, dist.get_rank() * 6 + 6))
    for name, value in state.items():
        if name.endswith(EXPERTS):
            assert isinstance(value, DTensor) and value.placements == (Shard(0),) and value.shape[0] == E
            assert value.device_mesh.mesh.tolist() == [0, 1] and value.expert_ids == ids
    check_whole(model, want)
    names = {inner(name): name for name in state}
    if kind != "fsdp":  # its dense parameters want DTensors
        other = wrapped(kind, 8)
        if kind != "fsdp_own":
            full = {name: want.get(inner(name), value) for name, value in state.items()}
            assert str(other.load_state_dict(full)) == "<All keys matched successfully>"
            check_whole(other, want)
    for assign in (False, True):
        other = wrapped(kind, 9)
        assert str(other.load_state_dict(through_files(state), assign=assign)) == "<All keys matched successfully>"
        check_whole(other, want)
    other = wrapped(kind, 10)
    other.load_state_dict({names[name]: state[names[name]] for name in EXPERTS}, strict=False)
    for name in EXPERTS:
        same_bits(whole(other.state_dict())[names[name]], want[name])


@pytest.mark.parametrize("kind", WRAPPERS)
def test_experts_are_shown_whole_and_loaded_in_part(kind):
    gloo_pool(WORLD).run(shown_and_loaded, kind)


def by_torchs_functions(kind: str, broadcast: bool) -> None:
    want = model_of(None).state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    got = get_model_state_dict(wrapped(kind), options=StateDictOptions(full_state_dict=True))
    assert got.keys() == want.keys()
    for name, value in want.items():
        same_bits(got[name], value)
    other = wrapped(kind, 8)
    set_model_state_dict(other, {} if broadcast and dist.get_rank() else dict(want), options=options)
    check_whole(other, want)


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("kind", ["bare", "ddp", "compiled", "checkpointed", "fsdp"])
def test_full_state_dicts_of_torch(kind, broadcast):
    gloo_pool(WORLD).run(by_torchs_functions, kind, broadcast)


def test_full_state_dicts_where_all_are_dtensors():
    gloo_pool(WORLD).run(by_torchs_functions, "fsdp_own", False)


def broadcast_to_experts_on_their_own_mesh() -> None:
    want = model_of(None).state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    with pytest.raises((ConfigError, RuntimeError)):
        set_model_state_dict(wrapped("fsdp_own", 8), dict(want) if dist.get_rank() == 0 else {}, options=options)


def test_what_torch_cannot_broadcast_is_an_error():
    """It writes slices of whole tensors into the very parameters, of whose other experts it knows nothing."""
    gloo_pool(WORLD).run(broadcast_to_experts_on_their_own_mesh)


# ---------------------------------------------------------------- other makes of layers


def parametrized() -> None:
    def build(seed: int, group: Any) -> nn.Module:
        model = model_of(group, seed)
        parametrize.register_parametrization(model[1].experts, "down_proj", Twice())
        return model

    model, other = build(3, dist.group.WORLD), build(8, dist.group.WORLD)
    name = "1.experts.parametrizations.down_proj.original"
    assert model.state_dict()[name].expert_ids
    for state in (model.state_dict(), build(3, None).state_dict(), copy.deepcopy(model).state_dict()):
        other.load_state_dict(state)
        same_bits(other[1].experts.down_proj, model[1].experts.down_proj)
    twin = copy.deepcopy(model)
    copied, original = (one[1].experts.parametrizations.down_proj.original for one in (twin, model))
    assert copied is not original


def test_parametrized_experts():
    gloo_pool(WORLD).run(parametrized)


class Adapted(nn.Module):
    """As an adapter library does it: other weights beside those of the module in whose place it stands."""

    activation = "swiglu"

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Parameter(torch.randn(2 * base.down_proj.shape[0], F, dtype=torch.float64))

    @property
    def gate_up_proj(self) -> torch.Tensor:
        return self.base_layer.gate_up_proj

    @property
    def down_proj(self) -> torch.Tensor:
        return self.base_layer.down_proj


def adapted() -> None:
    model = model_of(dist.group.WORLD)
    model[1].experts = Adapted(model[1].experts)
    state = model.state_dict()
    assert state["1.experts.lora_A"].shape == (2 * E, F) and state["1.experts.base_layer.down_proj"].shape[0] == E
    other = model_of(dist.group.WORLD, 8)
    other[1].experts = Adapted(other[1].experts)
    other.load_state_dict(through_files(state))
    same_bits(other[1].experts.lora_A, model[1].experts.lora_A)
    same_bits(other[1].experts.down_proj, model[1].experts.down_proj)
    model[1].experts.register_buffer("scale", torch.zeros(()))
    with pytest.raises(ConfigError, match=r"1.experts.scale.*stack"):
        model.state_dict()


def test_what_an_adapter_library_puts_in_place():
    gloo_pool(WORLD).run(adapted)


def emulated_link() -> None:
    inner_transport = ProcessGroupTransport(dist.group.WORLD)
    transport = EmulatedLinkTransport(inner_transport, LinkSpec.parse("1gbit"), NodeTopology(world_size=WORLD))
    layer = MoELayer(D, F, E, 2, transport=transport)
    assert layer.state_dict()["experts.down_proj"].shape[0] == E


def test_a_wrapped_transport():
    gloo_pool(WORLD).run(emulated_link)


def placed(slots: tuple[int, ...]) -> MoELayer:
    torch.manual_seed(3)
    placement = Placement(4, 4, WORLD, slots)
    dispatcher = Dispatcher(transport=ProcessGroupTransport(dist.group.WORLD), placement=placement, bad_logits="raise",
                            hidden=D, ffn_hidden=F, top_k=2, activation="swiglu", dtype=torch.float32)  # fmt: skip
    return MoELayer(D, F, 4, 2, dispatcher=dispatcher)


def other_orders() -> None:
    torch.manual_seed(3)
    want = MoELayer(D, F, 4, 2).state_dict()
    turned = placed((1, 0, 3, 2))
    got = whole(turned.state_dict())
    for name, value in want.items():
        same_bits(got[name], value)
    before = turned.experts.down_proj.detach().clone()
    turned.load_state_dict(through_files(turned.state_dict()))
    same_bits(turned.experts.down_proj.detach(), before)
    turned.load_state_dict(want)
    same_bits(turned.experts.down_proj.detach(), before)
    mixed = placed((0, 2, 1, 3))
    mixed.load_state_dict(want)
    state = mixed.state_dict()
    same_bits(state["experts.down_proj"], want["experts.down_proj"][[0, 2] if dist.get_rank() == 0 else [1, 3]])
    mixed.load_state_dict(through_files(state))
    with pytest.raises(dcp.CheckpointException, match="a part of the experts"):
        dcp.save(state, storage_writer=dcp.FileSystemWriter("unused"))


def test_experts_in_another_order():
    """Whole tensors are in the order of the experts; where ranks have no runs of them, the tensors stay plain."""
    gloo_pool(WORLD).run(other_orders)


def kept_variables() -> None:
    layer = model_of(dist.group.WORLD)[1]
    value = layer.state_dict(keep_vars=True)["experts.down_proj"]
    value.to_local().square().sum().backward()
    same_bits(layer.experts.down_proj.grad, 2 * layer.experts.down_proj.detach())
    assert not layer.state_dict()["experts.down_proj"].requires_grad


def test_keep_vars_keeps_the_graph():
    gloo_pool(WORLD).run(kept_variables)


def the_experts_alone() -> None:
    layer = model_of(dist.group.WORLD)[1]
    for module in (layer.experts, copy.deepcopy(layer.experts)):
        assert module.state_dict()["down_proj"].shape[0] == E


def test_a_state_dict_of_the_experts_alone():
    gloo_pool(WORLD).run(the_experts_alone)


# ---------------------------------------------------------------- averages


def averaged(folder: str) -> None:
    model = model_of(dist.group.WORLD)
    ema = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ema.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update_parameters(model)
    dcp.save(ema.state_dict(), checkpoint_id=folder)


def averages_loaded(folder: str) -> dict[str, torch.Tensor]:
    ema = AveragedModel(model_of(dist.group.WORLD if dist.get_world_size() > 1 else None, 8))
    state = ema.state_dict()
    dcp.load(state, checkpoint_id=folder)
    ema.load_state_dict(state)
    return whole(ema.state_dict())


@pytest.mark.parametrize("m", [1, 3])
def test_averages_of_weights_on_another_number_of_ranks(m, tmp_path):
    gloo_pool(WORLD).run(averaged, str(tmp_path))
    for got in gloo_pool(m).run(averages_loaded, str(tmp_path)):
        assert int(got["n_averaged"]) == 2
        for name, value in model_of(None).state_dict().items():
            torch.testing.assert_close(got[f"module.{name}"], value + 0.5, rtol=0, atol=1e-12)
