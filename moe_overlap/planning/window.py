"""The problem that the planner solves: one window, which is one phase of one layer call.

Two lanes, compute and wire. Both phases have the same structure:

    forward    P    D_c    E_c    C_c    U     beside B_i, or S
    backward   Ut   Ct_c   Ed_c   Dt_c   Pt    beside Bt_i, or St, and Ew_g after the last Ed
               head first  experts second tail
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_overlap.plan import ChunkBy
from moe_overlap.schedule.actions import Phase

OpVerb = Literal["B", "S"]


@dataclass(frozen=True, kw_only=True)
class Slowdown:
    """By what factor (>= 1) work on a lane takes longer while the other lane is busy too."""

    compute: float = 1.0
    wire: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """The durations for one way of cutting the exchange, in seconds, one per chunk.

    `deferred_s`: one per weight-gradient group (backward only). `chunk_bytes`: what one exchange of each chunk holds
    in buffers.
    """

    chunks: int
    by: ChunkBy
    first_s: tuple[float, ...]
    experts_s: tuple[float, ...]
    second_s: tuple[float, ...]
    deferred_s: tuple[float, ...] = ()
    chunk_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Window:
    """A phase with the ways in which its exchange can be cut.

    `op_verb`: whether `ops_s` are backbone ops (B, backward Bt) or the shared expert (S, St), in execution order.
    `issue_s`: compute-lane time of starting an exchange, and again of waiting for it.
    """

    phase: Phase
    op_verb: OpVerb = "B"
    head_s: float
    tail_s: float
    ops_s: tuple[float, ...] = ()
    issue_s: float = 0.0
    slowdown: Slowdown = Slowdown()
    chunkings: tuple[Chunking, ...]
