"""A machine of `planning/machines.py` as figures of the command line."""

from __future__ import annotations

from typing import Any

from moe_overlap.errors import ConfigError
from moe_overlap.planning.machines import Machine, machine_of


def machine_figures(name: str, *, dtype: str) -> dict[str, Any]:
    """Fields of `PlanOptions`, by name. ConfigError for an unknown machine, or a dtype that it has no rate for."""
    return figures_of(machine_of(name, field="--machine"), dtype)


def figures_of(machine: Machine, dtype: str) -> dict[str, Any]:
    """Peaks times what is reached of them."""
    reached = machine.reached
    if dtype not in machine.flops:
        raise ConfigError("--dtype", dtype, f"one of {', '.join(machine.flops)}")
    launch_s = reached.launch_s
    return {
        "ranks_per_node": machine.ranks_per_node,
        "bandwidth": machine.inter_bytes_per_s * reached.wire,
        "intra_bandwidth": machine.intra_bytes_per_s * reached.wire,
        "latency": machine.latency_s,
        "message": machine.message_s,
        "memory": machine.memory_bytes,
        "flops": machine.flops[dtype] * reached.matmul,
        "memory_bandwidth": machine.memory_bytes_per_s * reached.memory,
        "launch": launch_s,
        "nic": "node" if machine.nic_per_node else "rank",
        "spine": reached.spine,
        "leaf": machine.leaf_nodes,
        "weights": "added" if machine.weights_added else "beside",
        "compute_slowdown": reached.beside,
        "wire_slowdown": reached.beside,
    }
