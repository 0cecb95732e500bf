"""The figures of a link between nodes, and which ranks share a node."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from moe_overlap.agreement.loads import LOOPBACK, Nodes
from moe_overlap.errors import ConfigError
from moe_overlap.transport.base import Transport

EXPECTED = "none or RATE[:LATENCY], like 400mbit:50us, 25GB:2us (kbit mbit gbit kB MB GB per second; us ms s)"
_RATES = {"kbit": 125.0, "mbit": 125e3, "gbit": 125e6, "kb": 1e3, "mb": 1e6, "gb": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_RATE = re.compile(_NUMBER + r"\s*(kbit|mbit|gbit|kb|mb|gb)(?:/s|ps)?")
_TIME = re.compile(_NUMBER + r"\s*(us|ms|s)")


@dataclass(frozen=True, kw_only=True)
class LinkSpec:
    """What one rank can send to other nodes: `bytes_per_s`, and `latency_s` on top for every message."""

    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bytes_per_s) and 1.0 <= self.bytes_per_s <= 1e15):
            raise ConfigError("link", self.bytes_per_s, "a rate from 1 byte per second to 1e15")
        if not (math.isfinite(self.latency_s) and 0.0 <= self.latency_s <= 60.0):
            raise ConfigError("link", self.latency_s, "a latency from 0 to 60 s")

    @staticmethod
    def parse(text: str) -> LinkSpec | None:
        """The link of "RATE[:LATENCY]", None for "none". Case does not matter: `MB` is 10^6 bytes, `mbit` 10^6 bits.

        Example: "400mbit:50us" is 50e6 bytes per second and 50e-6 seconds. Raises ConfigError for any other text.
        """
        if not isinstance(text, str) or not text.isascii():
            raise ConfigError("link", text, EXPECTED)
        lower = text.strip().lower()
        if lower == "none":
            return None
        rate, colon, latency = lower.partition(":")
        rate_match, time_match = _RATE.fullmatch(rate.strip()), _TIME.fullmatch(latency.strip())
        if rate_match is None or (colon and time_match is None):
            raise ConfigError("link", text[:80], EXPECTED)
        latency_s = 0.0 if time_match is None else float(time_match[1]) * _TIMES[time_match[2]]
        return LinkSpec(bytes_per_s=float(rate_match[1]) * _RATES[rate_match[2]], latency_s=latency_s)

    def __str__(self) -> str:
        """The text that `parse` turns into this link again (12 digits)."""
        rate = _text(self.bytes_per_s, (("gbit", 125e6), ("mbit", 125e3), ("kbit", 125.0)))
        return f"{rate}:{_text(self.latency_s, (('s', 1.0), ('ms', 1e-3), ('us', 1e-6)))}"

    def seconds(self, num_bytes: int) -> float:
        """How long a message takes on a free link: latency + bytes / rate."""
        return self.latency_s + num_bytes / self.bytes_per_s


def _text(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """`value` to 12 digits, without exponent, in the largest unit in which it is at least 1 (else the smallest)."""
    rounded = float(f"{value:.12g}")
    name, unit = next((pair for pair in units if rounded >= pair[1]), units[-1])
    number = Decimal(f"{value / unit:.12g}") if value >= 1e-12 else Decimal(0)
    return f"{number.normalize():f}{name}"


@dataclass(frozen=True, kw_only=True)
class NodeTopology:
    """Which ranks share a node: ranks n * ranks_per_node .. (n + 1) * ranks_per_node - 1 are node n."""

    world_size: int
    ranks_per_node: int = 1

    def __post_init__(self) -> None:
        for field in ("world_size", "ranks_per_node"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(field, value, "an integer of at least 1")
        if self.world_size % self.ranks_per_node:
            raise ConfigError("ranks_per_node", self.ranks_per_node, f"a divisor of the {self.world_size} ranks")

    @property
    def nodes(self) -> int:
        return self.world_size // self.ranks_per_node

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def off_node(self, rank: int) -> tuple[int, ...]:
        """The ranks on other nodes than `rank`."""
        return tuple(peer for peer in range(self.world_size) if self.node_of(peer) != self.node_of(rank))


def nodes_of(transport: Transport) -> Nodes | None:
    """The node of each rank, where the transport knows; LOOPBACK where its one rank has a wire to itself."""
    if getattr(transport, "loopback", False):
        return LOOPBACK
    known = getattr(transport, "topology", None)
    return None if known is None else tuple(known.node_of(rank) for rank in range(transport.world_size))


def rows_travel(transport: Transport) -> bool:
    """Whether there is a wire: to other ranks, or of a single rank to itself."""
    return transport.world_size > 1 or nodes_of(transport) == LOOPBACK
