"""A rank that fails on its own tells its peers before it raises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.checkpoint import _StopRecomputationError

from moe_overlap.errors import MoeTransportError, TransportTimeout
from moe_overlap.transport.base import Transport


@contextmanager
def closing_on_error(transport: Transport, action: str, *, hint: str = "") -> Iterator[None]:
    """A rank that fails on its own, or is interrupted, closes its transport first, so that its peers learn at once.
    `hint`: what a timeout of this action says beside."""
    try:
        yield
    except BaseException as error:
        close_for(error, transport, action, hint=hint)
        raise


def close_for(error: BaseException, transport: Transport, action: str, *, hint: str = "") -> None:
    """What `closing_on_error` does with an error, which is raised afterwards, or here with its hint."""
    if isinstance(error, TransportTimeout) and hint:
        where = {name: getattr(error, name) for name in ("rank", "peer", "step", "chunk", "action", "seconds")}
        raise TransportTimeout(f"{error.message}; {hint}", **where) from error
    if not isinstance(error, MoeTransportError | _StopRecomputationError):
        transport.close(f"rank {transport.rank}, {action}: {type(error).__name__}: {error}")


@contextmanager
def closing_all(transports: Iterable[Transport], action: str) -> Iterator[None]:
    """For what ranks do over several groups at once: who fails, in one of them too, closes all, so that nobody waits
    in another group for a rank that has raised."""
    try:
        yield
    except BaseException as error:
        for one in transports:
            one.close(f"rank {one.rank}, {action}: {type(error).__name__}: {error}")
        raise


@contextmanager
def closing_on_interrupt(transport: Transport) -> Iterator[None]:
    """A rank that is interrupted (Ctrl-C, an exit) while it waits for others closes its transport first."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        transport.close(f"rank {transport.rank}: {type(error).__name__}")
        raise


class ClosingUnlessCalled:
    """For the engine's final callbacks, which it calls at the end of a backward and drops where one is broken off, be
    it by a hook or a function of the user, in which nothing of ours takes part. The peers learn of that at once."""

    def __init__(self, transport: Transport) -> None:
        self._transport: Transport | None = transport

    def __call__(self) -> None:
        self._transport = None

    def __del__(self) -> None:
        if self._transport is not None:
            self._transport.close(f"rank {self._transport.rank}: its backward was broken off")
