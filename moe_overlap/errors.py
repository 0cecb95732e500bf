"""The errors a user of this library can meet.

A mistake in an argument is a `ConfigError` (a `ValueError`). Everything that goes wrong between ranks is a
`MoeTransportError` (a `RuntimeError`) whose attributes say where: rank, peer, step, chunk, action, seconds. Ranks are
those of the group; where that is a part of the job, a note on the error says which ones of the job they are.
"""

from __future__ import annotations

LONGEST_VALUE = 500  # characters of a value in an error


class ConfigError(ValueError):
    """An argument that cannot be used: names the field, the value given and what was expected."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field = field
        self.value = value
        self.expected = expected
        super().__init__(f"{field} = {_shown(value)}: expected {expected}")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.field, self.value, self.expected)


def _shown(value: object) -> str:
    """repr of a value, not endless; of a number that has too many digits to write out, how many bits it has."""
    if isinstance(value, int) and value.bit_length() > 4096:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text)} characters)"


class MoeTransportError(RuntimeError):
    """Something between ranks failed. Attributes that are not known are None; `seconds` is how long was waited."""

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        peer: int | None = None,
        step: int | None = None,
        chunk: int | None = None,
        action: str | None = None,
        seconds: float | None = None,
    ) -> None:
        self.message = message
        self.rank = rank
        self.peer = peer
        self.step = step
        self.chunk = chunk
        self.action = action
        self.seconds = seconds
        where = ", ".join(
            f"{name} {value:.3f}" if name == "seconds" else f"{name} {value}"
            for name, value in (
                ("rank", rank),
                ("peer", peer),
                ("step", step),
                ("chunk", chunk),
                ("action", action),
                ("seconds", seconds),
            )
            if value is not None
        )
        super().__init__(f"{message} [{where}]" if where else message)


class PeerFailed(MoeTransportError):
    """A peer is gone: its process died or its connection closed."""


class TransportTimeout(MoeTransportError):
    """A wait reached its limit; `peer` names the rank that was waited for where that is known."""


class RemoteAbort(MoeTransportError):
    """A peer closed the transport on purpose, after an error of its own."""


class PlanMismatch(MoeTransportError):
    """The ranks do not agree about this step. Raised alike on every rank before any payload moves."""


class CapacityExceeded(MoeTransportError):
    """More rows than a fixed buffer holds."""


class TransportClosed(MoeTransportError):
    """The transport was used after it failed or was closed; the first cause is in `__cause__`."""
