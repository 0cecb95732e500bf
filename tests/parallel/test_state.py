"""The model's state dict: experts say which ones they are, and what would lose or mix them is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from moe_overlap import ConfigError, MoELayer, mark_experts, prepare
from moe_overlap.placement.placement import Placement
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.transport import EmulatedLinkTransport, LinkSpec, NodeTopology, ProcessGroupTransport
from tests.parallel.saved import EXPERTS, D, E, F, model_of, whole
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import same_bits

WORLD = 2
WRAPPERS = ("bare", "ddp", "compiled", "checkpointed", "fsdp", "fsdp_own", "averaged", "deepcopied")


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def wrapped(kind: str, seed: int = 3) -> nn.Module:
    """The model in one of the wrappers, with its experts spread over all ranks."""
    model = model_of(dist.group.WORLD, seed)
    prepare(model)
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("own", "data"))
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "compiled":
        return torch.compile(model, backend="eager")
    if kind == "checkpointed":
        model[1] = checkpoint_wrapper(model[1])
    if kind == "fsdp":
        return fully_shard(model, mesh=mesh["data"], ignored_params=set(model[1].experts.parameters()))
    if kind == "fsdp_own":
        for child in (model[1].router, model[1].shared_expert):
            fully_shard(child, mesh=mesh["data"])
        fully_shard(model[1], mesh=mesh["own"])
        return fully_shard(model, mesh=mesh["data"])
    if kind == "averaged":
        return AveragedModel(model)
    return copy.deepcopy(model) if kind == "deepcopied" else model


def inner(name: str) -> str:
    """The name that a tensor has in the model without a wrapper."""
    return name.removeprefix("module.").removeprefix("_orig_mod.")


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """What torch.load makes of what torch.save writes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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


# ---------------------------------------------------------------- what is refused


def file_of_one_rank(path: str, kind: str) -> None:
    """torch.save on rank 0, loaded everywhere."""
    model = wrapped(kind)
    state = model.state_dict()
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.barrier()
    read = torch.load(path, weights_only=True)
    if dist.get_rank() == 0:
        model.load_state_dict(read)
        return
    with pytest.raises(ConfigError, match=r"experts \(0, 1, 2, 3, 4, 5\).*\(6, 7, 8, 9, 10, 11\)"):
        model.load_state_dict(read)


@pytest.mark.parametrize("kind", ["bare", "ddp", "compiled", "averaged"])
def test_the_file_of_rank_0_is_refused_on_rank_1(kind, tmp_path):
    gloo_pool(WORLD).run(file_of_one_rank, str(tmp_path / "file"), kind)


def plain_parts() -> None:
    """State dicts of experts as they were before they said who they are."""
    model = model_of(dist.group.WORLD)
    state = model.state_dict()
    old = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in state.items()}
    other = model_of(dist.group.WORLD, 8)
    with pytest.raises(ConfigError, match="mark_experts"):
        other.load_state_dict(old)
    renamed = {name.replace("experts.", ""): value for name, value in old.items()}
    with pytest.raises(ConfigError, match="mark_experts"):
        other.load_state_dict(renamed)
    for state in (old, renamed):
        experts = [value for name, value in state.items() if "_proj" in name]
        for ids in ((0, 1, 2, 3, 4, 5), other[1]):
            marked = {n: mark_experts(v.clone(), ids) if "_proj" in n else v for n, v in state.items()}
            other = model_of(dist.group.WORLD, 8)
            if dist.get_rank() == 0 or isinstance(ids, MoELayer):
                other.load_state_dict(marked)
                same_bits(other[1].experts.down_proj, model[1].experts.down_proj)
            else:
                with pytest.raises(ConfigError, match="another rank's file"):
                    other.load_state_dict(marked)
        assert len(experts) == 2
    with pytest.raises(ConfigError, match="rows for 5 experts"):
        mark_experts(old["1.experts.down_proj"], range(5))
    with pytest.raises(ConfigError, match="numbers of experts"):
        mark_experts(old, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({**model.state_dict(), "1.experts.down_proj": torch.zeros(E, D, F + 1)})


def test_a_part_is_refused_unless_it_is_marked():
    gloo_pool(WORLD).run(plain_parts)


def one_rank(path: str) -> None:
    state = model_of(dist.group.WORLD).state_dict()
    if dist.get_rank() == 0:
        torch.save(state, path)


def test_the_file_of_one_rank_is_refused_by_a_layer_of_all_experts(tmp_path):
    """In a process that knows nothing of ranks."""
    gloo_pool(WORLD).run(one_rank, str(tmp_path / "file"))
    model = model_of(None)
    with pytest.raises(ConfigError, match="experts"):
        model.load_state_dict(torch.load(tmp_path / "file", weights_only=True))


def mixed_ranks(folder: str) -> None:
    """The plain parameters, as they were saved before: torch.distributed.checkpoint keeps one of each name."""
    model = model_of(dist.group.WORLD)
    dcp.save({name: parameter.detach() for name, parameter in model.named_parameters()}, checkpoint_id=folder)
    state = model_of(dist.group.WORLD, 8).state_dict()
    with pytest.raises(dcp.CheckpointException, match=r"[Ss]ize|shape"):
        dcp.load(state, checkpoint_id=folder)


def test_old_checkpoints_of_mixed_ranks_are_refused(tmp_path):
    gloo_pool(WORLD).run(mixed_ranks, str(tmp_path))


def raw_parameters(folder: str) -> None:
    for model in (model_of(dist.group.WORLD), copy.deepcopy(model_of(dist.group.WORLD))):
        with pytest.raises(dcp.CheckpointException, match="a part of the experts"):
            dcp.save(dict(model.named_parameters()), checkpoint_id=folder)
    file = io.BytesIO()
    torch.save(dict(model.named_parameters()), file)
    file.seek(0)
    with pytest.raises(ConfigError, match="mark_experts"):
        model.load_state_dict(torch.load(file, weights_only=True))


def test_parameters_instead_of_a_state_dict(tmp_path):
    gloo_pool(WORLD).run(raw_parameters, str(tmp_path))


def pickled() -> None:
    layer = model_of(dist.group.WORLD)[1]
    for part in (layer, nn.Sequential(layer), layer.experts, AveragedModel(layer)):
        with pytest.raises(ConfigError, match=r"torch.distributed.checkpoint"):
            torch.save(part, io.BytesIO())


def test_a_layer_of_several_ranks_is_not_pickled():
    gloo_pool(WORLD).run(pickled)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.save(model, io.BytesIO())
    return model.state_dict()


def test_a_layer_of_one_rank_is_pickled():
    """And goes to another process so."""
    model = model_of(None)
    (got,) = gloo_pool(1).run(state_of, model)
    for name, value in model.state_dict().items():
        assert type(value) is torch.Tensor
        same_bits(got[name], value)


def test_virtual_ranks_are_plain_and_refused(tmp_path):
    def rank(me: Any) -> None:
        torch.manual_seed(3)
        layer = MoELayer(D, F, E, 2, transport=me.transport())
        state = through_files(layer.state_dict())
        assert all(type(value) is torch.Tensor for value in state.values())
        layer.load_state_dict(state)
        for name in ("experts.down_proj", "experts.gate_up_proj"):
            assert state[name].expert_ids == layer.ownership.expert_ids
        states.append((layer, layer.state_dict()))

    states: list[Any] = []
    virtual_world(WORLD).run(rank)
    (first, _), (_, other) = states
    with pytest.raises(ConfigError, match="another rank's file"):
        first.load_state_dict(other)
    for state in (other, through_files(other), copy.deepcopy(other)):
        with pytest.raises(dcp.CheckpointException, match="a part of the experts"):
            dcp.save(state, checkpoint_id=str(tmp_path / "new"))
    with pytest.raises(dcp.CheckpointException, match="a part of the experts"):
        dcp.async_save(other, checkpoint_id=str(tmp_path / "new")).result()
    dcp.save(MoELayer(D, F, E, 2).state_dict(), checkpoint_id=str(tmp_path / "whole"))
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        dcp.load(other, checkpoint_id=str(tmp_path / "whole"))


def after_the_group() -> Any:
    """A job that ends torch.distributed before it saves."""
    model = model_of(dist.new_group([0, 1]))
    dist.destroy_process_group(model[1].transport.group)
    state = model.state_dict()
    assert type(state["1.experts.down_proj"]) is torch.Tensor
    model.load_state_dict(through_files(state))
    return state["1.experts.down_proj"].expert_ids


def test_a_group_that_is_destroyed():
    assert gloo_pool(WORLD).run(after_the_group) == [(0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11)]


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
