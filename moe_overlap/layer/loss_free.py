"""Loss-free balance of a model's routers: who counts, over which ranks, and when the biases move."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from moe_overlap.errors import ConfigError
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.stats import LastStep
from moe_overlap.layer.tensor_parallel import TensorParallelMoE
from moe_overlap.routing.decision import as_decision
from moe_overlap.routing.loss_free import update_bias_
from moe_overlap.transport.base import Transport
from moe_overlap.transport.opening import open_transport


@dataclass(eq=False, kw_only=True)
class Counted:
    """A router, the layer that it is in (None: it stands alone), and int64 [E]: its choices since the last step."""

    router: nn.Module
    layer: MoELayer | None
    counts_E: torch.Tensor

    @torch.compiler.disable(reason="it counts calls: one graph break")
    def add(self, chosen_E: torch.Tensor) -> None:
        """The choices of one forward call, unless it is none of training."""
        if not (self.router.training and torch.is_grad_enabled()):
            return
        while torch._C._functorch.is_functorch_wrapped_tensor(chosen_E):
            chosen_E = torch._C._functorch.get_unwrapped(chosen_E)
        with temporarily_clear_interpreter_stack():
            self.counts_E = self.counts_E.to(chosen_E.device) + chosen_E

    def of_layer(self, last: LastStep) -> None:
        self.add(last.chosen_E)

    @torch.compiler.disable(reason="a recompute is told by the state of the engine: one graph break")
    def of_router(self, router: nn.Module, args: Any, decision: object) -> None:
        """A forward hook, for a router that is called by hand."""
        if torch._C._current_graph_task_id() < 0:
            self.add(as_decision(decision).tokens_per_expert_E)


class LossFreeBalancer:
    """Auxiliary-loss-free load balancing (arXiv 2408.15664; DeepSeek-V3): biases on the selection instead of a loss.

        balancer = LossFreeBalancer(model)
        ...
        optimizer.step()
        balancer.step()

    model: a module with routers that have a bias (`LinearRouter(bias=True)`; any module with a float32 buffer
    `expert_bias_E` [E] whose call returns a RoutingDecision); a router by itself too. Routers without one are left
    alone. update_rate: u, 0.001 in the paper. group: the ranks that share the routers, as a ProcessGroup; None: those
    that the layers know (expert parallel, and their replicas), and for a router outside a layer this rank alone. Under
    plain data parallel, where layers know of no other rank, it has to be given.

    Counted are the choices of forward calls in training mode with gradients enabled, each once: no recompute, no
    calibration of schedule="auto", no call of a copy. The counts are integers, so all ranks move their biases alike.
    Nothing of it is a state to save: at the end of a step the biases, buffers of the model, are all there is.

    Raises ConfigError for bad arguments and where there is no such router.
    """

    def __init__(
        self, model: nn.Module, update_rate: float = 1e-3, *, group: Any = None, recentre: bool = False
    ) -> None:
        if not isinstance(update_rate, (int, float)) or not math.isfinite(update_rate) or update_rate <= 0:
            raise ConfigError("update_rate", update_rate, "a finite number above 0")
        self.update_rate, self.recentre = float(update_rate), recentre
        self._counted: dict[nn.Module, Counted] = {}
        for layer in model.modules():
            if isinstance(layer, MoELayer) and _has_bias(layer.router):
                layer.watch(self._counts_of(layer.router, layer).of_layer)
            if isinstance(layer, TensorParallelMoE) and _has_bias(layer.router):
                # A rank counts all tokens of its group, as every other one of the group does.
                layer.router.register_forward_hook(self._counts_of(layer.router, layer.moe).of_router)
        for router in model.modules():
            if router not in self._counted and _has_bias(router):
                router.register_forward_hook(self._counts_of(router, None).of_router)
        if not self._counted:
            raise ConfigError(
                "model", type(model).__name__, "one with a router that has a bias: LinearRouter(bias=True)"
            )
        device = _bias_of(self.routers[0]).device
        self._transport = None if group is None else open_transport(group, device=device)

    @property
    def routers(self) -> list[nn.Module]:
        """Those that are balanced, in the order of the model."""
        return list(self._counted)

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by what was counted since the last time. Collective; raises MoeTransportError."""
        together: dict[object, list[Counted]] = {}
        for one in self._counted.values():
            together.setdefault(self._ranks_of(one), []).append(one)
        for found in together.values():
            flat = torch.cat([one.counts_E.to(_bias_of(one.router).device) for one in found])
            for transport in self._transports_of(found[0]):
                flat = transport.all_reduce(flat, action="bias").wait()
            for one, counts_E in zip(found, flat.split([one.counts_E.shape[0] for one in found]), strict=True):
                masked_E, bias_E = getattr(one.router, "masked_experts_E", None), _bias_of(one.router)
                update_bias_(bias_E, counts_E, self.update_rate, recentre=self.recentre, masked_E=masked_E)
                one.counts_E = torch.zeros_like(counts_E)

    def _counts_of(self, router: nn.Module, layer: MoELayer | None) -> Counted:
        """Those of `router`, which may stand in several layers."""
        counts_E = torch.zeros_like(_bias_of(router), dtype=torch.int64)
        return self._counted.setdefault(router, Counted(router=router, layer=layer, counts_E=counts_E))

    def _ranks_of(self, one: Counted) -> object:
        if self._transport is not None or one.layer is None:
            return None
        return one.layer.ownership.expert_ranks, id(one.layer.ownership.replicas)

    def _transports_of(self, one: Counted) -> list[Transport]:
        """Over whose ranks the counts of `one` are summed, one after the other."""
        if self._transport is not None:
            return [self._transport]
        if one.layer is None:
            return []
        replicas = one.layer.ownership.replicas
        return [one.layer.transport, *([] if replicas is None else [replicas.transport])]


def _has_bias(router: nn.Module) -> bool:
    return isinstance(getattr(router, "expert_bias_E", None), torch.Tensor)


def _bias_of(router: nn.Module) -> torch.Tensor:
    """The bias as it is now. Raises ConfigError where something has rounded it: steps of u would be lost in it."""
    bias_E = router.expert_bias_E
    assert isinstance(bias_E, torch.Tensor)
    if bias_E.dtype not in (torch.float32, torch.float64):
        raise ConfigError("expert_bias_E", bias_E.dtype, "torch.float32, whatever the model is cast to")
    return bias_E
