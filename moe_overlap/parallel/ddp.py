"""DistributedDataParallel: what it is told to leave alone, and whether it does. The one file that uses what is private.

Torch 2.13.0. DDP takes the names of what it is to ignore from an attribute of the module that it is given, once, in its
constructor, which has by then sent the first rank's weights over those of all others. `_module_parameters` and
`modules_buffers` are what it took after all; the class knows the module whose forward is under way.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_overlap.errors import ConfigError
from moe_overlap.parallel.ownership import Ownership

_IGNORED = "_ddp_params_and_buffers_to_ignore"
# What each DDP module averages or copies, by identity: it does not change after the constructor.
_taken: weakref.WeakKeyDictionary[DistributedDataParallel, frozenset[int]] = weakref.WeakKeyDictionary()

RECIPE = (
    "moe_overlap.prepare(model) on the very module that DistributedDataParallel is given, as the last step before it"
)
RELOAD = "its constructor has overwritten the experts of all ranks but one: load the weights again"


def ignore(model: nn.Module, tensors: Iterable[torch.Tensor]) -> list[str]:
    """Have DDP leave `tensors` alone when it is given `model`; their names, as `named_parameters` has them.

    DDP looks them up by two kinds of names, which differ where a wrapper hides its own.
    """
    wanted = {id(tensor) for tensor in tensors}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    shown = [name for name, tensor in named if id(tensor) in wanted]
    paths = [
        f"{path}.{name}"
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if id(tensor) in wanted
    ]
    names = list(dict.fromkeys([*getattr(model, _IGNORED, []), *shown, *paths]))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return shown


def check(ownership: Ownership, experts: nn.Module) -> None:
    """In a forward call of a layer: that the DDP module around it, if there is one, leaves other ranks' experts alone.

    Replicas follow its `no_sync`. Raises ConfigError.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None:
        return
    taken = _taken.get(ddp)
    if taken is None:
        taken = _taken[ddp] = frozenset(id(t) for t in (*ddp._module_parameters, *ddp.modules_buffers))
    ranks = dist.get_process_group_ranks(ddp.process_group)
    mine = dict((*experts.named_parameters(), *experts.named_buffers()))
    averaged = sorted(name for name, tensor in mine.items() if id(tensor) in taken)
    mixed = sorted(ownership.others & set(ranks))
    if mixed and averaged:
        held = f"averages experts ({', '.join(averaged)}) with ranks {mixed}, which hold other ones"
        raise ConfigError("DistributedDataParallel", held, f"{RECIPE}; {RELOAD}")
    sums_itself = ownership.prepared and ddp._comm_hooks
    if mixed and not ownership.mean and not sums_itself:
        held = "makes means over ranks, and the experts' gradients are sums"
        raise ConfigError("DistributedDataParallel", held, RECIPE)
    if len(ranks) > ownership.ranks_reached and (mixed or ownership.replicas is not None):
        held = f"makes means over {len(ranks)} ranks, and those of experts are made over {ownership.ranks_reached}"
        expected = "replicate_group= (or a two-dimensional group=) with all ranks that hold the same experts"
        raise ConfigError("DistributedDataParallel", held, expected)
    if averaged and ownership.replicas is not None:
        held = f"averages experts ({', '.join(averaged)}), as the layer does by its replicas"
        raise ConfigError("DistributedDataParallel", held, RECIPE)
    if not mixed and len(ranks) > 1 and ownership.replicas is None:
        left = [name for name, t in experts.named_parameters() if t.requires_grad and id(t) not in taken]
        if left:
            held = f"ignores experts ({', '.join(left)}) that all its ranks {ranks} hold alike: they would drift apart"
            raise ConfigError("DistributedDataParallel", held, "a list of ignored parameters from moe_overlap.prepare")
    if ownership.replicas is not None and torch.is_grad_enabled():
        ownership.replicas.synchronise(experts.parameters(), bool(ddp.require_backward_grad_sync))
