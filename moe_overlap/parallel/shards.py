"""Tensors of experts that FSDP2 has sharded over the ranks that hold the same ones: whole for a moment, and cut again.

By the transport of the replicas and not by DTensor's own collectives, so that a rank that fails leaves nobody waiting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Shard

from moe_overlap.agreement.copies import GATHERED
from moe_overlap.agreement.plan import RowLayout
from moe_overlap.errors import ConfigError
from moe_overlap.parallel.ownership import Ownership
from moe_overlap.parallel.replicas import one_row_each


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")


def check_shards(name: str, tensor: Any, ownership: Ownership) -> None:
    """Raises ConfigError for a tensor that `whole` does not know the shards of."""
    if hasattr(tensor, GATHERED):
        given = f"{name}, which fully_shard has gathered and not sharded again since"
        raise ConfigError("migrate", given, "reshard() of its unit before: experts move as shards")
    if not is_sharded(tensor):
        return
    ranks = tensor.device_mesh.mesh.reshape(-1).tolist()
    replicas = ownership.replicas
    known = ranks if replicas is None else list(replicas.transport.global_ranks)
    if len(ranks) > 1 and (replicas is None or ranks != known or tuple(tensor.placements) != (Shard(0),)):
        given = f"{name}, sharded by fully_shard as {tensor.placements} over ranks {ranks}"
        raise ConfigError("migrate", given, "experts sharded by rows over the replicas that the layer was told of")


def whole(tensor: Any, ownership: Ownership, action: str) -> torch.Tensor:
    """[n, ...] of a tensor whose shards the replicas have, each ceil(n / R) rows but for the last ones; a plain tensor
    as it is. Collective over the replicas; bounded."""
    if not is_sharded(tensor):
        return tensor.detach()
    local = tensor.detach().to_local()
    if tensor.device_mesh.size() == 1:
        return local
    assert ownership.replicas is not None
    transport, (rows, *trailing) = ownership.replicas.transport, tensor.shape
    shard = local.new_zeros(-(-rows // transport.world_size), *trailing)
    shard[: local.shape[0]] = local
    said = shard.reshape(1, -1).expand(transport.world_size, -1).contiguous()
    layout = RowLayout(width=said.shape[1], dtype=said.dtype, weights=True)
    plan = one_row_each(transport.rank, transport.world_size, 0)
    heard = transport.start(said, plan, layout, action=action).wait()
    return heard.reshape(-1, *trailing)[:rows]


def cut(values: torch.Tensor, like: Any) -> torch.Tensor:
    """What of `values` [n, ...] is this rank's shard, as `like` is sharded; all of it where that is plain."""
    if not is_sharded(like) or like.device_mesh.size() == 1:
        return values
    size = -(-values.shape[0] // like.device_mesh.size())
    first = size * like.device_mesh.get_local_rank()
    return values[first : first + size].clone()  # and the whole may go


def put_shard(into: Any, shard: torch.Tensor) -> None:
    """A shard of this rank in the place of that of `into`."""
    with torch.no_grad():
        into.to_local().copy_(shard)
