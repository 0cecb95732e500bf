"""What of a layer's routing is recorded or replayed, and what a recompute of a replayed call is to find again."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from moe_overlap.agreement.record import digest
from moe_overlap.errors import ConfigError
from moe_overlap.routing.decision import RoutingDecision, as_decision
from moe_overlap.routing.replayed import Recorded, recorded_decision
from moe_overlap.schedule.dispatch import current_phase

WEIGHTS = ("current", "recorded")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class Script:
    """The calls that a layer is to replay, in order. `done`: how many of its forward calls have ended. `error`: what is
    wrong with the recording as a whole, which the layer's next call says, since all ranks learn of it there."""

    calls: tuple[Recorded, ...]
    num_experts: int
    weights: str
    error: ConfigError | None = None
    done: int = 0

    def next(self, x_TD: torch.Tensor, router: nn.Module) -> Recorded:
        """The record for the coming call. Raises ConfigError where there is none for such a call."""
        if self.error is not None:
            raise self.error
        if self.done >= len(self.calls):
            expected = f"at most {len(self.calls)}, the calls that were recorded"
            raise ConfigError("replay.calls", self.done + 1, expected)
        call = self.calls[self.done]
        experts, top_k = getattr(router, "num_experts", self.num_experts), getattr(router, "top_k", call.top_k)
        for name, value, here in (("num_experts", self.num_experts, experts), ("tokens", call.tokens, x_TD.shape[0]),
                                  ("top_k", call.top_k, top_k)):  # fmt: skip
            if value != here:
                raise ConfigError(f"replay.{name}", value, f"{here}, as call {self.done} of this layer has")
        return call

    def cue(self, x_TD: torch.Tensor, router: nn.Module) -> Cue:
        """What the coming call is told, and what all ranks have to have in common: which call of how many it is."""
        call = self.next(x_TD, router).to(x_TD.device)
        agreed = digest("replay", self.done, len(self.calls), self.weights)
        return Cue(call=call, num_experts=self.num_experts, weights=self.weights, agreed=agreed)


@dataclass(eq=False, kw_only=True)
class Cue:
    """A replayed call, and, where it may be computed again, a number that tells its tokens from those of other calls.
    used: whether a recompute has found it."""

    call: Recorded
    num_experts: int
    weights: str
    agreed: int
    mark: torch.Tensor | None = None
    used: bool = False

    def decide(self, router: nn.Module, x_TD: torch.Tensor, told: dict[str, Any]) -> RoutingDecision:
        """The recorded decision, with weights of now or of then. Raises ConfigError for a router that cannot."""
        kind = type(router).__name__
        if self.weights == "current":
            if not getattr(router, "replays", False):
                expected = f"'recorded': {kind} cannot weigh what it did not choose"
                raise ConfigError("replay.weights", self.weights, expected)
            decision = as_decision(router(x_TD, replay=self.call, **told))
        elif hasattr(router, "cell"):
            raise ConfigError("replay.weights", self.weights, f"'current': {kind} has a state to hand on")
        else:
            zero = getattr(router, "zero_experts", 0)
            decision = recorded_decision(
                self.call, x_TD, told.get("token_mask"), num_logits=self.num_experts + zero, zero_experts=zero
            )
        return replace(decision, agreed=self.agreed)

    def is_for(self, x_TD: torch.Tensor, mark: torch.Tensor) -> bool:
        return self.call.tokens == x_TD.shape[0] and self.mark is not None and torch.equal(self.mark, mark)


@dataclass(eq=False)
class Tape:
    """Of one layer. A copy begins with an empty one.

    decided: the router's last decision, while something records. Of replayed calls that may be computed again it knows
    those whose graphs still are there.
    """

    script: Script | None = None
    recorders: int = 0
    device: torch.device | str | None = None
    decided: Recorded | None = None
    _held: Cue | None = None
    _replayed: list[weakref.ref[Cue]] = field(default_factory=list)

    def __reduce__(self) -> tuple[type[Tape], tuple[()]]:
        return Tape, ()

    @property
    def runs(self) -> bool:
        """Whether a call has to ask for its decision here."""
        return self.script is not None or self.recorders > 0 or bool(self._replayed)

    def take_held(self) -> Cue | None:
        """What the graph of the call that ends is to hold."""
        held, self._held = self._held, None
        return held

    @torch.compiler.disable(reason="routing is recorded or replayed: one graph break")
    def decide(self, router: nn.Module, x_TD: torch.Tensor, told: dict[str, Any]) -> RoutingDecision:
        """The decision of a call: the router's, or the one to be replayed. Raises ConfigError."""
        self._replayed = [ref for ref in self._replayed if ref() is not None]
        if torch._C._functorch.is_functorch_wrapped_tensor(x_TD) and self.runs:
            raise ConfigError("replay", "a transform of torch.func", "no such transform while routing is recorded")
        if current_phase() > 0:
            found = self._found(x_TD)
            return as_decision(router(x_TD, **told)) if found is None else found.decide(router, x_TD, told)
        self._held = None
        if self.script is None:
            decision = as_decision(router(x_TD, **told))
        else:
            cue = self.script.cue(x_TD, router)
            decision = cue.decide(router, x_TD, told)
            if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                cue.mark = mark_of(x_TD)
                self._held = cue
                self._replayed.append(weakref.ref(cue))
        self.decided = Recorded.of(decision, self.device) if self.recorders else None
        return decision

    def _found(self, x_TD: torch.Tensor) -> Cue | None:
        """The replayed call that is computed again: of those alive the last one with the same tokens, bit for bit, and
        rather one that was not found before. None: the call was not replayed. A layer checks that a recompute routes
        as its forward did."""
        alive = [cue for ref in reversed(self._replayed) if (cue := ref()) is not None]
        if not alive:
            return None
        mark = mark_of(x_TD)
        same = sorted((cue for cue in alive if cue.is_for(x_TD, mark)), key=lambda cue: cue.used)
        if not same:
            return None
        same[0].used = True
        return same[0]


def mark_of(x_TD: torch.Tensor) -> torch.Tensor:
    """int64 [2], on the device of x: equal for equal bits; of other tokens, in all likelihood another one."""
    sums_T = x_TD.detach().contiguous().view(_INTEGERS[x_TD.dtype.itemsize]).sum(dim=1, dtype=torch.int64)
    place_T = torch.arange(1, sums_T.shape[0] + 1, device=x_TD.device)
    return torch.stack([sums_T.sum(), (sums_T * (place_T * 2654435761 + 1)).sum()])
