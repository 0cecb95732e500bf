"""Models of transformers (5.24 or later) on this library: an experts implementation, and an expert parallelism.

`register()` makes two names known to transformers. `experts_implementation="moe_overlap"` computes the experts of one
rank here instead of in its own loops; routing, shared experts and all else stay the model's. And
`distributed_config=expert_parallel()` spreads the experts over ranks: each loads its own experts only, tokens travel to
them by this library's schedules, what is not experts is sharded by FSDP2, and `save_pretrained` writes the file of one
process. docs/transformers.md has programs, families and what is refused.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_overlap.errors import ConfigError
from moe_overlap.integrations.recipe import FLAGS, Recipe, recipe_of, refusal
from moe_overlap.layer.arguments import check_dedup
from moe_overlap.layer.functional import moe_forward
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.check import layer_schedule
from moe_overlap.transport.base import Transport
from moe_overlap.transport.opening import open_transport

NAME = "moe_overlap"


@dataclass(frozen=True, kw_only=True)
class _Options:
    schedule: str | SchedulePair = "auto"
    overlap: bool = True
    dedup: str = "off"
    timeout_s: float | None = None


_options = _Options()
_recipes: weakref.WeakKeyDictionary[nn.Module, Recipe] = weakref.WeakKeyDictionary()


def register(
    *, schedule: str | SchedulePair = "auto", overlap: bool = True, dedup: str = "off", timeout_s: float | None = None
) -> None:
    """Make `moe_overlap` known to transformers, as an experts implementation and as an `ep_implementation`.

    The arguments are those of MoELayer, for models that are spread over ranks after this call; the same on all ranks.
    May be called again. Raises ConfigError.
    """
    global _options
    check_dedup(dedup)
    if schedule != "auto":
        layer_schedule(schedule, shared=False)
    _options = _Options(schedule=schedule, overlap=overlap, dedup=dedup, timeout_s=timeout_s)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    EPImplementationInterface.register(NAME, TokenDispatch)


def expert_parallel(ranks: int | None = None, **options: Any) -> DistributedConfig:
    """The distributed_config for `from_pretrained`: experts over `ranks` ranks (None: all), the rest sharded over all.

    Each rank has a batch of its own, and gradients are means over the ranks, as FSDP2 makes them. options: other fields
    of transformers' DistributedConfig. Raises ConfigError without a process group and before `register()`.
    """
    if NAME not in EPImplementationInterface():
        raise ConfigError("register", "not called", "moe_overlap.integrations.transformers.register() first")
    if not dist.is_initialized():
        raise ConfigError("group", None, "an initialised torch.distributed: one rank needs no distributed_config")
    world = dist.get_world_size()
    ranks = world if ranks is None else ranks
    if not isinstance(ranks, int) or ranks < 1 or world % ranks:
        raise ConfigError("ranks", ranks, f"a divisor of {world}, all ranks")
    given = {"fsdp_size": world, "ep_size": ranks, "ep_implementation": NAME} | options
    return DistributedConfig(**given)


def check(model: nn.Module) -> dict[str, Recipe]:
    """How each experts module of a model runs here, by its name. Raises ConfigError naming the family and the reason
    where one of them cannot; the model is not touched."""
    found = {}
    for name, module in model.named_modules():
        if all(hasattr(module, flag) for flag in FLAGS):
            found[name] = _recipe(module)
        elif _has_experts(module):
            raise refusal(module, "experts with transformers' experts interface (@use_experts_implementation)")
    if not found:
        raise refusal(model, "a model with experts that have transformers' experts interface")
    return found


def _has_experts(module: nn.Module) -> bool:
    """By the name of its class: routed experts that cannot be switched. Shared ones are dense."""
    name = type(module).__name__
    return name.endswith("Experts") and "Shared" not in name and next(module.parameters(), None) is not None


def use(model: Any) -> Any:
    """Have a model that exists compute its experts here: `check` first, then transformers' own switch. -> the model."""
    check(model)
    register_if_new()
    model.set_experts_implementation(NAME)
    return model


def register_if_new() -> None:
    """`register()`, where nobody has called it."""
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        register()


def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls instead of an experts module's forward: hidden_states [T, D], top_k_index [T, K] (as many
    as there are experts = unused), top_k_weights [T, K] -> [T, D] in the dtype of hidden_states."""
    recipe = _recipe(self)
    return _forward(recipe, self, hidden_states, top_k_index, top_k_weights, unused_id=self.num_experts)


def _forward(
    recipe: Recipe, experts: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, **options: Any
) -> torch.Tensor:
    x_in, w_in, w_out, activation = recipe.arguments(experts, x_TD)
    y_TD = moe_forward(x_in, ids_TK, weights_TK, w_in, w_out, activation=activation, **options)
    if y_TD.shape[1] != x_TD.shape[1]:
        y_TD = y_TD[:, : x_TD.shape[1]].contiguous()  # FSDP2 warns of views that a module returns
    return y_TD.to(x_TD.dtype)


def _recipe(experts: nn.Module) -> Recipe:
    """Found once for a module."""
    recipe = _recipes.get(experts)
    if recipe is None:
        recipe = _recipes[experts] = recipe_of(experts)
    return recipe


class TokenDispatch(EPImplementation):
    """How the experts of a module get the tokens of all ranks of its group: transformers makes one for each module.

    Called with the tokens of this rank, their experts of the whole group, and their weights; returns the sums for
    these tokens. An expert's gradient is that of the sum of the ranks' losses, as of transformers' own.
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        self.recipe = recipe_of(experts)
        if tp_mesh.size() > 1:
            raise NotImplementedError("expert parallelism of moe_overlap beside tensor parallelism (tp_size > 1)")
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.options = _options
        self.transport: Transport = open_transport(ep_mesh.get_group(), timeout_s=_options.timeout_s)

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        given = self.options
        return _forward(self.recipe, self.experts, hidden_states, top_k_index, top_k_weights,
                        schedule=given.schedule, overlap=given.overlap, dedup=given.dedup,
                        transport=self.transport)  # fmt: skip
