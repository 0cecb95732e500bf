"""The user's ops beside the exchanges: what they may return, and when it is said that one returned something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_overlap.errors import ConfigError, MoeTransportError
from moe_overlap.schedule.actions import Action
from moe_overlap.transport.base import Transport
from moe_overlap.transport.closing import closing_on_error


def check_result(field: str, result: object, like: torch.Tensor) -> None:
    """Raises ConfigError unless the result of a user's op is a tensor as `like` is, whatever its dtype: one of another
    shape would be broadcast."""
    if not isinstance(result, torch.Tensor):
        raise ConfigError(field, type(result).__name__, f"a tensor {tuple(like.shape)}, as its input is")
    if result.shape != like.shape:
        expected = f"the shape of its input, {tuple(like.shape)}"
        raise ConfigError(field, f"a result of shape {tuple(result.shape)}", expected)
    if result.device != like.device:
        raise ConfigError(field, f"a result on {result.device}", f"the device of its input, {like.device}")


class Mistakes:
    """The first mistake (ConfigError, or a result that does not fit) of the ops of one walk, raised at its end.

    Until then the exchanges go on: ranks that all have the same mistake all raise it, and not one of them that another
    gave up. After it the transport is closed, as a rank may be alone with its mistake.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._first: ConfigError | None = None

    def result_of(self, action: Action, op: Callable[[Any], torch.Tensor], hidden: torch.Tensor | None) -> Any:
        """op(hidden), or None where that was a mistake. What else the op raises closes the transport at once."""
        with closing_on_error(self._transport, action.text):
            try:
                result = op(hidden)
                if action.verb == "B":
                    assert hidden is not None
                    check_result(f"backbone op {action.index}", result, hidden)
                return result
            except ConfigError as error:
                self._first = self._first or error
                return None

    def raise_first(self) -> None:
        """At the end of the walk, where there was one."""
        if self._first is not None:
            with closing_on_error(self._transport, "the ops beside the exchanges"):
                raise self._first

    def replace(self, error: BaseException) -> None:
        """Raise it instead of `error` where that only says that a peer gave up, which has made the same mistake."""
        if self._first is not None and isinstance(error, MoeTransportError):
            raise self._first from error
