"""Machines that people have: figures of their data sheets, and what share of these figures is reached.

A data sheet says peaks. How much of them a step gets is six numbers, the same for every GPU here (`Reached`), fitted to
published measurements; docs/validation.md has the forecasts that follow beside what was published, and what becomes of
a paper's rows where the numbers are fitted to the other papers alone. The host of `cpu` was measured as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_overlap.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The free numbers. `matmul`, `memory`, `wire`: shares of the peaks of matmuls, of memory and of both wires.
    `spine`: share of a NIC's rate that is left to bytes for nodes beyond the first switch. `launch_s`: what the experts
    of a chunk, P and U cost beside their rows. `beside`: by what factor both lanes are slower beside each other."""

    matmul: float
    memory: float
    wire: float
    spine: float
    launch_s: float
    beside: float


# Fitted by `python tests/planning/validation.py --fit` to all papers of docs/validation.md.
REACHED = Reached(matmul=0.5, memory=0.6, wire=0.8, spine=0.757, launch_s=72.1e-6, beside=1.36)
AS_MEASURED = Reached(matmul=1.0, memory=1.0, wire=1.0, spine=1.0, launch_s=0.0, beside=1.05)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One rank's figures, peaks unless `reached` says otherwise: FLOPs a second by dtype of rows, bytes a second of its
    memory, to its node and to other nodes; `nic_per_node`: that one is the whole node's. `memory_bytes`: of its card.
    `latency_s`, `message_s`: of an exchange, and of each of its messages. `weights_added`: an expert's weights are read
    before its matmuls and not beside them. `leaf_nodes`: nodes at one switch of the first level."""

    name: str
    source: str
    flops: Mapping[str, float]
    memory_bytes_per_s: float
    memory_bytes: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    ranks_per_node: int
    nic_per_node: bool = False
    latency_s: float = 10e-6
    message_s: float = 1e-6
    weights_added: bool = False
    leaf_nodes: int = 16
    reached: Reached = REACHED


def _flops(bf16: float, fp32: float, fp64: float, fp8: float | None = None) -> dict[str, float]:
    """TFLOP/s, dense; fp32 is TF32 where the card has it; without fp8 units its matmuls are those of bf16."""
    return {"bf16": bf16 * 1e12, "fp16": bf16 * 1e12, "fp32": fp32 * 1e12, "fp64": fp64 * 1e12,
            "fp8": (bf16 if fp8 is None else fp8) * 1e12}  # fmt: skip


_HOPPER = _flops(989.4, 494.7, 66.9, 1978.9)
_A100 = _flops(312, 156, 19.5)
_MACHINES = (
    Machine(name="h100x8", source="NVIDIA H100 SXM5 data sheet; DGX H100: a 400 Gb/s NIC for each GPU", flops=_HOPPER,
            memory_bytes_per_s=3.35e12, memory_bytes=80e9, intra_bytes_per_s=450e9, inter_bytes_per_s=50e9,
            ranks_per_node=8),
    Machine(name="h200x8", source="NVIDIA H200 SXM5 data sheet; DGX H200: a 400 Gb/s NIC for each GPU", flops=_HOPPER,
            memory_bytes_per_s=4.8e12, memory_bytes=141e9, intra_bytes_per_s=450e9, inter_bytes_per_s=50e9,
            ranks_per_node=8),
    Machine(name="h800x8", source="H100 SXM5 with NVLink of 400 GB/s both ways (arXiv 2412.19437, 3.1); 400 Gb/s NICs",
            flops=_HOPPER, memory_bytes_per_s=3.35e12, memory_bytes=80e9, intra_bytes_per_s=200e9,
            inter_bytes_per_s=50e9, ranks_per_node=8),
    Machine(name="gb200-nvl72", source="NVIDIA GB200 NVL72 data sheet, a 72th of the rack; a 400 Gb/s NIC for each GPU",
            flops=_flops(2500, 1250, 40, 5000), memory_bytes_per_s=8e12, memory_bytes=186e9, intra_bytes_per_s=900e9,
            inter_bytes_per_s=50e9, ranks_per_node=72),
    Machine(name="a100x8", source="NVIDIA A100 SXM4 80 GB data sheet; Azure NDv4: a 200 Gb/s NIC for each GPU",
            flops=_A100, memory_bytes_per_s=2.039e12, memory_bytes=80e9, intra_bytes_per_s=300e9,
            inter_bytes_per_s=25e9, ranks_per_node=8),
    Machine(name="a800x8", source="A100 SXM4 with NVLink of 400 GB/s both ways; a 200 Gb/s NIC for each GPU",
            flops=_A100, memory_bytes_per_s=2.039e12, memory_bytes=80e9, intra_bytes_per_s=200e9,
            inter_bytes_per_s=25e9, ranks_per_node=8),
    Machine(name="a100-pcie", source="NVIDIA A100 PCIe 80 GB data sheet; PCIe 4.0 x16; one 200 Gb/s NIC for a node",
            flops=_A100, memory_bytes_per_s=1.935e12, memory_bytes=80e9, intra_bytes_per_s=31.5e9,
            inter_bytes_per_s=25e9, ranks_per_node=8, nic_per_node=True),
    Machine(name="a30-pcie", source="NVIDIA A30 data sheet; PCIe 4.0 x16; one 100 Gb/s NIC for a node",
            flops=_flops(165, 82, 10.3), memory_bytes_per_s=0.933e12, memory_bytes=24e9, intra_bytes_per_s=31.5e9,
            inter_bytes_per_s=12.5e9, ranks_per_node=8, nic_per_node=True),
    Machine(name="4090x4", source="NVIDIA Ada GPU architecture, RTX 4090 (float32 sums); PCIe 4.0 x16 by way of the "
            "host, so half of it; one 25 Gb/s NIC for a node", flops=_flops(165.2, 82.6, 1.3, 330.3),
            memory_bytes_per_s=1.008e12, memory_bytes=24e9, intra_bytes_per_s=15.8e9, inter_bytes_per_s=3.125e9,
            ranks_per_node=4, nic_per_node=True),
    Machine(name="cpu", source="two cores with AVX-512, gloo over loopback; docs/notes/2026-11-22-planner.md",
            flops=_flops(0.085, 0.085, 0.04), memory_bytes_per_s=10e9, memory_bytes=12e9, intra_bytes_per_s=4.5e9,
            inter_bytes_per_s=0.125e9, ranks_per_node=2, nic_per_node=True, latency_s=153e-6, message_s=0.0,
            weights_added=True, reached=AS_MEASURED),
)  # fmt: skip
MACHINES = {machine.name: machine for machine in _MACHINES}


def machine_of(name: str, *, field: str = "machine") -> Machine:
    """ConfigError for a name that nobody has."""
    if name not in MACHINES:
        raise ConfigError(field, name, "one of " + ", ".join(MACHINES))
    return MACHINES[name]
