"""Bytes between ranks: no routing, no arithmetic."""

from moe_overlap.transport.base import Header, Transport, TransportStats, Work
from moe_overlap.transport.local import LocalTransport
from moe_overlap.transport.process_group import ProcessGroupTransport
from moe_overlap.transport.virtual import VirtualRank, VirtualTransport, VirtualWorld

__all__ = [
    "Header",
    "LocalTransport",
    "ProcessGroupTransport",
    "Transport",
    "TransportStats",
    "VirtualRank",
    "VirtualTransport",
    "VirtualWorld",
    "Work",
]
