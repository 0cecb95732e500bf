"""A rank that fails on its own tells its peers before it raises."""

from __future__ import annotations

from collections.abc import Iterator
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
    except _StopRecomputationError:
        raise
    except TransportTimeout as error:
        if not hint:
            raise
        where = {name: getattr(error, name) for name in ("rank", "peer", "step", "chunk", "action", "seconds")}
        raise TransportTimeout(f"{error.message}; {hint}", **where) from error
    except MoeTransportError:
        raise
    except BaseException as error:
        transport.close(f"rank {transport.rank}, {action}: {type(error).__name__}: {error}")
        raise
