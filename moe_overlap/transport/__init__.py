"""Bytes between ranks: no routing, no arithmetic."""

from moe_overlap.agreement.header import Header
from moe_overlap.transport.accounting import CommCpu
from moe_overlap.transport.base import Transport, TransportStats, Work
from moe_overlap.transport.emulated_link import EmulatedLinkTransport
from moe_overlap.transport.link import LinkSpec, NodeTopology
from moe_overlap.transport.local import LocalTransport
from moe_overlap.transport.nocomm import NoCommTransport
from moe_overlap.transport.process_group import ProcessGroupTransport
from moe_overlap.transport.staged import StagedTransport
from moe_overlap.transport.virtual import VirtualRank, VirtualTransport, VirtualWorld

__all__ = [
    "CommCpu",
    "EmulatedLinkTransport",
    "Header",
    "LinkSpec",
    "LocalTransport",
    "NoCommTransport",
    "NodeTopology",
    "ProcessGroupTransport",
    "StagedTransport",
    "Transport",
    "TransportStats",
    "VirtualRank",
    "VirtualTransport",
    "VirtualWorld",
    "Work",
]
