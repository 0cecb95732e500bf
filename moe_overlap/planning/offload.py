"""Experts in host memory: from how many rows an expert on their copies hide, and in how many chunks.

An expert of P parameters takes 2 P n operations for n rows in each of E, Ed and Ew, and P times s bytes are copied
beside each of them: its weights up, up again, and its gradients down, on a link of `bytes_per_s` in each direction. So
all three hide from n = s * flops / (2 * bytes_per_s) on, whatever the size of the expert: 8000 rows for bfloat16 at 400
TFLOP/s and 50 GB/s. Of G groups of experts the first weights and the last gradients stay bare, which is 1 / G of a copy
each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_overlap.schedule.builders import chunked
from moe_overlap.schedule.check import makespan_s
from moe_overlap.schedule.offload import held_experts, with_host_experts


@dataclass(frozen=True, kw_only=True)
class OffloadShape:
    """One rank's experts, `bytes_per_expert` of weights each, and a link of `bytes_per_s` in each direction. `row_s`:
    seconds of one row in one expert (E; Ed and Ew take as long each), `expert_s`: of an expert beside its rows, such as
    reading its weights. `exchange_s`: of all rows there (D), and back;
    `rows_s`: of permuting all rows, and of summing them up."""

    experts: int
    bytes_per_expert: int
    bytes_per_s: float
    rows_per_expert: float
    row_s: float
    expert_s: float = 0.0
    exchange_s: float = 0.0
    rows_s: float = 0.0

    @property
    def crossover_rows(self) -> float:
        """Rows an expert from which on its copy takes no longer than its computation; infinity where rows take no time
        and their experts less than a copy."""
        bare_s = max(0.0, self.bytes_per_expert / self.bytes_per_s - self.expert_s)
        return bare_s / self.row_s if self.row_s else math.inf if bare_s else 0.0


@dataclass(frozen=True, kw_only=True)
class OffloadPlan:
    """What `chunks` groups of experts are predicted to take: seconds of a forward and a backward, of the same without
    any copy, and bytes of the device."""

    chunks: int
    step_s: float
    resident_s: float
    device_bytes: int

    @property
    def text(self) -> str:
        """The word for MoELayer(schedule=)."""
        return "serial" if self.chunks == 1 else f"chunked({self.chunks},experts)"


def plan_offload(shape: OffloadShape, *, device_bytes: int | None = None) -> list[OffloadPlan]:
    """Every cut into 1 to 16 groups of experts, by exact event simulation, fastest first, the fewer chunks where they
    tie. device_bytes: the most bytes of experts on the device; those that take more are left out."""
    found = []
    for chunks in range(1, min(16, shape.experts) + 1):
        held = held_experts(shape.experts, chunks) * shape.bytes_per_expert
        if device_bytes is None or held <= device_bytes:
            step_s, resident_s = _step_s(shape, chunks, copies=True), _step_s(shape, chunks, copies=False)
            found.append(OffloadPlan(chunks=chunks, step_s=step_s, resident_s=resident_s, device_bytes=held))
    return sorted(found, key=lambda one: (one.step_s, one.chunks))


def _step_s(shape: OffloadShape, chunks: int, *, copies: bool) -> float:
    """Seconds of both phases; the weight gradients are made in groups with copies and without."""
    pair = with_host_experts(chunked(chunks, "experts"))
    shares = [shape.experts * (c + 1) // chunks - shape.experts * c // chunks for c in range(chunks)]
    times: dict[str, float] = dict.fromkeys(("P", "U", "Ut", "Pt"), shape.rows_s)
    for c, experts in enumerate(shares):
        compute = experts * (shape.expert_s + shape.rows_per_expert * shape.row_s)
        copy = experts * shape.bytes_per_expert / shape.bytes_per_s if copies else 0.0
        times |= {f"{verb}{c}": compute for verb in ("E", "Ed", "Ew")}
        times |= {f"{verb}{c}": copy for verb in ("Hf", "Hb", "Hg")}
        times |= {f"{verb}{c}": shape.exchange_s * experts / shape.experts for verb in ("D", "C", "Ct", "Dt")}
    joined = chunks == 1  # "serial"
    return sum(makespan_s(schedule, times, joined=joined) for schedule in (pair.forward, pair.backward))
