"""A checkpoint is the model: experts in state dicts say which experts they are.

Parameters are plain tensors [e, ...] with the same names and shapes on every rank, and hold other experts on each: who
saves one rank's saves a part, and nothing tells. So the state dict of a marked module shows them as DTensors of the
whole [E, ...], Shard(0) over the ranks that share them out: torch.distributed.checkpoint saves all of them once and
loads them on any number of ranks. Each tensor shown also says itself which experts it holds (`expert_ids`, and the name
of its mesh), which torch.save keeps: another rank's file is refused. Loading takes DTensors, whole tensors [E, ...] and
marked parts.

Where no DTensor can be shown (virtual ranks, experts in an order of their own, a group that is destroyed) the tensors
stay plain, say which experts they are, and are refused by torch.distributed.checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn
from torch.distributed import get_process_group_ranks, is_initialized
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from moe_overlap.agreement.copies import COUNTED, count_steps, trust
from moe_overlap.errors import ConfigError
from moe_overlap.parallel import ownership as marks
from moe_overlap.parallel.ownership import Ownership

State = TypeVar("State", torch.Tensor, dict[str, Any])

IDS = "expert_ids"  # what a shown tensor says of itself
# Copies and casts of a DTensor lose that, and keep the mesh, equal ones for one another: so its name says it too.
MESH, MESH_NAME = "experts_{}_to_{}", re.compile(r"experts_(\d+)_to_(\d+)")
WRITE, READ = "__create_write_items__", "__create_chunk_list__"  # torch.distributed.checkpoint asks tensors for these
MARK = "moe_overlap.mark_experts(state, expert_ids), which says which experts they are"


# ---------------------------------------------------------------- modules


class Loaded:
    """A hook after a marked module was loaded, which with assign=True puts other parameters in the place of its own."""

    def __init__(self, ownership: Ownership) -> None:
        self.ownership = ownership

    def __call__(self, module: nn.Module, _: object) -> None:
        mark_new(module, self.ownership)


class Saving:
    """A hook after the state dict of a marked module: its tensors as `shown`."""

    def __init__(self, ownership: Ownership) -> None:
        self.ownership = ownership

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        # Shards may be written through what is shown of them, which no counter tells: copies of them are out of date.
        count_steps(one for one in module.parameters() if hasattr(one, "device_mesh"))
        for name, value in state_dict.items():
            if self.ownership.others and name.startswith(prefix) and isinstance(value, torch.Tensor):
                state_dict[name] = shown(name, value, self.ownership)


class Loading:
    """A hook before a marked module is loaded: the tensors of its state dict as its parameters want them."""

    def __init__(self, ownership: Ownership) -> None:
        self.ownership = ownership

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any
    ) -> None:
        assign = bool(metadata.get("assign_to_params_buffers"))
        for name, target in tensors_of(module, prefix).items():
            value = state_dict.get(name)
            if isinstance(value, torch.Tensor) and (self.ownership.others or _held_by(value) is not None):
                part = taken(name, value, target, self.ownership)
                if part is not value:
                    state_dict[name] = part = alone(part) if assign else part
                    setattr(part, IDS, self.ownership.expert_ids)  # for a marked module within this one


def mark(module: nn.Module, ownership: Ownership) -> None:
    """All that `module` has is experts of this rank, and its state dicts say which ones. Its parameters as they are do
    not, and torch.distributed.checkpoint is kept away from them."""
    marks.mark(module, ownership)
    for parameter in module.parameters() if ownership.others else ():
        _keep_away(parameter)
    if not any(isinstance(hook, Saving) for hook in module._state_dict_hooks.values()):
        module.register_state_dict_post_hook(Saving(ownership))
        module.register_load_state_dict_pre_hook(Loading(ownership))
        module.register_load_state_dict_post_hook(Loaded(ownership))


def mark_new(module: nn.Module, ownership: Ownership) -> None:
    """Parameters that have come in the place of those of a marked module, by loading or `to_empty`, are what those
    were. They are ordinary ones, of which torch tells every change; what FSDP2 puts there comes otherwise."""
    for parameter in module.parameters():
        if not hasattr(parameter, COUNTED):
            trust([parameter])
            if ownership.others:
                _keep_away(parameter)


def tensors_of(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters and buffers of `module` by name, shared ones by each of their names."""
    start = prefix.removesuffix(".")
    return dict(module.named_buffers(start, remove_duplicate=False)) | dict(
        module.named_parameters(start, remove_duplicate=False)
    )


# ---------------------------------------------------------------- one tensor


def shown(name: str, tensor: Any, ownership: Ownership) -> torch.Tensor:
    """`tensor` of this rank's experts, [e * k, ...], as a state dict has it: a DTensor [E * k, ...] with `expert_ids`.

    A tensor that fully_shard has spread over the replicas is shown on both kinds of ranks, with its own placement
    second. Raises ConfigError for one that is no stack over the experts, and for one that fully_shard has spread over
    replicas of which the layer has not been told by a two-dimensional mesh.
    """
    ids = ownership.expert_ids
    if hasattr(tensor, IDS):  # by a marked module within this one
        return tensor
    if not _is_stack(tensor, ids):
        expected = f"a stack over the {len(ids)} experts of this rank: what else they have cannot be put together"
        raise ConfigError(name, f"a tensor {tuple(tensor.shape)} in a state dict", expected)
    replicas = getattr(tensor, "device_mesh", None)
    if replicas is not None and replicas.size() == 1:
        tensor, replicas = tensor.to_local(), None
    mesh = _mesh(name, ownership, tensor.device.type, replicas)
    if mesh is None:
        return refused(tensor.view_as(tensor), ids)
    placements: list[Placement] = [Shard(0)]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    if replicas is not None:
        placements += tensor.placements
        whole = torch.Size((tensor.shape[0] * ownership.transport.world_size, *tensor.shape[1:]))
        local = tensor.to_local()
        found = DTensor.from_local(local, mesh, placements, run_check=False, shape=whole, stride=tensor.stride())
    else:
        found = DTensor.from_local(_rows(tensor, len(ids), order), mesh, placements, run_check=False)
    setattr(found, IDS, tuple(sorted(ids)))
    return found


def taken(name: str, value: Any, target: Any, ownership: Ownership) -> torch.Tensor:
    """What of `value`, from a state dict, is this rank's: like `target` [e * k, ...], sharded as it is.

    value: as `shown`, a whole tensor [E * k, ...], another DTensor of it, or a part that is marked with the experts it
    holds. One whose shape fits nothing is returned as it is, for torch to complain of. Raises ConfigError for a part
    that is not marked, and for one that lacks experts of this rank.
    """
    ours, held, sharded = ownership.expert_ids, _held_by(value), hasattr(value, "device_mesh")
    each, left = divmod(target.shape[0], max(1, len(ours))) if target.dim() else (0, 0)
    if held is not None and not set(ours) <= set(held):
        raise ConfigError(name, f"experts {held}", f"{ours}, which this rank has: another rank's file")
    if sharded and held is not None:
        if value.device_mesh == getattr(target, "device_mesh", None) and value.shape == target.shape:
            return value  # by a marked module around this one
        if value.device_mesh.ndim == 2:
            return _on_replicas(name, value, target, ownership)
        if value.shape[0] != each * ownership.num_experts:
            return value
        value = value.to_local()
    elif sharded and value.shape != target.shape:
        value = value.full_tensor()
    value = value.detach()
    if held is None:
        if value.shape == target.shape and len(ours) < ownership.num_experts:
            raise _partial(name, value, ours)
        held = tuple(range(ownership.num_experts))
    if left or (each * len(held), *target.shape[1:]) != tuple(value.shape):
        return value
    own = _rows(value, len(held), [held.index(expert) for expert in ours])
    if not hasattr(target, "device_mesh"):
        return own
    return distribute_tensor(own, target.device_mesh, target.placements, src_data_rank=None)


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied where it is a view that would keep a larger one in memory."""
    view = not hasattr(tensor, "device_mesh") and not tensor.is_meta
    return tensor.clone() if view and tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def mark_experts(state: State, experts: object) -> State:
    """Say of a tensor [n * k, ...], or of all in a state dict, that they hold these experts: for files of single ranks
    that do not say it themselves. Returns it.

    experts: their numbers in the order of the rows, or a layer: those that it has here. In a state dict with other
    parameters as well, give the experts' part of it: whatever is marked has to lie on experts.
    """
    found = getattr(experts, "ownership", None)
    ids = experts if found is None else found.expert_ids
    if not isinstance(ids, Iterable):
        raise ConfigError("experts", experts, "numbers of experts, or a MoELayer")
    numbers = tuple(int(one) for one in ids)
    for value in [state] if isinstance(state, torch.Tensor) else _tensors_in(state):
        if not _is_stack(value, numbers):
            raise ConfigError("state", tuple(value.shape), f"tensors with rows for {len(numbers)} experts")
        setattr(value, IDS, numbers)
    return state


def _tensors_in(state: Mapping[str, Any]) -> list[torch.Tensor]:
    return [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]


def _is_stack(tensor: torch.Tensor, ids: tuple[int, ...]) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] % max(1, len(ids)) == 0


def _rows(tensor: torch.Tensor, count: int, places: list[int]) -> torch.Tensor:
    """The rows of experts at `places` of a tensor [count * k, ...]; a view where they lie side by side."""
    each = tensor.shape[0] // max(1, count)
    if places and places == list(range(places[0], places[0] + len(places))):
        return tensor[places[0] * each : (places[-1] + 1) * each]
    rows = torch.tensor([row for place in places for row in range(place * each, (place + 1) * each)], dtype=torch.int64)
    return tensor[rows.to(tensor.device)]


def _partial(name: str, value: torch.Tensor, ours: tuple[int, ...]) -> ConfigError:
    given = f"a tensor {tuple(value.shape)} of {len(ours)} experts, of whatever rank"
    return ConfigError(name, given, f"all experts, the DTensor of a state dict, or {MARK}")


# ---------------------------------------------------------------- on which ranks


def _mesh(name: str, ownership: Ownership, device: str, replicas: Any) -> Any:
    """The mesh on which tensors are shown; None where there is none, on all ranks alike where experts have moved."""
    group: Any = getattr(ownership.transport, "group", None)
    rank, count = ownership.transport.rank, len(ownership.expert_ids)
    if not ownership.in_order or not _is_alive(group):
        return None
    if device == "meta":
        device = getattr(ownership.transport, "device", torch.device("cpu")).type
    grid, key = ownership.mesh, (device, replicas is not None)
    says = MESH.format(rank * count, (rank + 1) * count - 1)
    if replicas is None:
        make = partial(DeviceMesh.from_group, group, device, mesh_dim_names=(says,))
    # By ranks: torch may give back an equal mesh that is older, with another group.
    elif grid is None or get_process_group_ranks(grid.get_group(0)) != replicas.mesh.tolist():
        given = "sharded by fully_shard over ranks that the layer was not told of"
        raise ConfigError(name, given, "group=mesh with dimensions (replicas, experts), and fully_shard over its first")
    else:
        groups, ranks = [group, grid.get_group(0)], grid.mesh.T.contiguous()
        names = (says, f"replica_{replicas.get_local_rank()}")
        make = partial(DeviceMesh.from_group, groups, device, ranks, mesh_dim_names=names)
    if key not in ownership.shown_on:
        ownership.shown_on[key] = make()
    return ownership.shown_on[key]


def _is_alive(group: Any) -> bool:
    if group is None or not is_initialized():
        return False
    try:
        return bool(get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):
        return False


def _held_by(value: Any) -> tuple[int, ...] | None:
    """The experts that a tensor says it holds, by itself or by its mesh; None where it says nothing."""
    held = getattr(value, IDS, None)
    if held is not None:
        return tuple(held)
    if not isinstance(value, DTensor) or value.placements[0] != Shard(0):
        return None
    found = MESH_NAME.fullmatch((value.device_mesh.mesh_dim_names or ("",))[0])
    return None if found is None else tuple(range(int(found[1]), int(found[2]) + 1))


def _on_replicas(name: str, value: Any, target: Any, ownership: Ownership) -> torch.Tensor:
    """A tensor shown on experts and replicas, for the replica that it is of."""
    example: Any = shown(name, target.detach(), ownership)
    for what in ("shape", "device_mesh", "placements"):
        if getattr(value, what) != getattr(example, what, None):
            expected = f"{getattr(example, what, None)}, that of this rank"
            raise ConfigError(f"{name}.{what}", getattr(value, what), expected)
    local = value.to_local().detach()
    mesh, placements = target.device_mesh, target.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=target.shape, stride=target.stride())


# ---------------------------------------------------------------- refused by torch.distributed.checkpoint


def refused(tensor: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    """`tensor`, which from now on says which experts it holds and keeps away torch.distributed.checkpoint."""
    setattr(tensor, IDS, tuple(ids))
    return _keep_away(tensor)


def _keep_away(tensor: torch.Tensor) -> torch.Tensor:
    setattr(tensor, WRITE, refuse_to_write)
    setattr(tensor, READ, refuse_to_read)
    return tensor


def refuse_to_write(name: str, *_: object) -> NoReturn:
    """Raises ConfigError."""
    given = "a part of the experts, of one rank, that does not stand for the whole"
    expected = (
        "what state_dict() has of experts in order, equally many on all ranks of torch.distributed (where a placement "
        "has moved them: inside of moe_overlap.experts_in_order(model, optimizers)), or a file a rank by torch.save"
    )
    raise ConfigError(name, given, expected)


def refuse_to_read() -> NoReturn:
    """Raises ConfigError."""
    refuse_to_write("state_dict")


torch.serialization.add_safe_globals([refuse_to_write, refuse_to_read])  # torch.save keeps them by name
