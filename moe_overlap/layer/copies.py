"""What a layer is to copies, pickles, state dicts, and to libraries that replace its experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from moe_overlap.agreement.copies import trust
from moe_overlap.errors import ConfigError
from moe_overlap.layer.experts import take_old_names
from moe_overlap.parallel.entering import adopt
from moe_overlap.parallel.ownership import Ownership
from moe_overlap.parallel.state import mark, mark_new
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.transport.base import Transport


class Copies(nn.Module):
    """The part of MoELayer that its copies and its state are made by; the layer has the attributes that stand here."""

    experts: nn.Module
    ownership: Ownership
    transport: Transport
    dispatcher: Dispatcher

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        ours = self.register_load_state_dict_pre_hook(take_old_names)  # now: after the user's own hooks
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            ours.remove()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda`, `to_empty` and the like do, the last one with new parameters."""
        super()._apply(fn, recurse)
        mark_new(self.experts, self.ownership)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The layer without what its last call left behind."""
        return self.__dict__ | {"_ticket": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Parameters of its own, the same transport: a copy of a model (an average of weights, say) on every rank."""
        memo[id(self.transport)] = self.transport
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        mark(copied.experts, copied.ownership)
        trust(copied.experts.parameters())
        return copied

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rule":
            raise ConfigError("layer.rule", type(value).__name__, "layer.dispatcher.rule = ...: nobody reads it here")
        super().__setattr__(name, value)
        if name == "experts":  # the first ones, or those that an adapter library puts in their place
            self.ownership = adopt(value, self.ownership)
