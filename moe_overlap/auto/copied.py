"""The copies of experts in a step, as its schedules are planned from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_overlap.agreement.loads import LANES, Nodes, moves
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.schedule.actions import Phase

ExpertBytes = tuple[int, int]  # of one expert: its weights, and their gradients on the way home


@dataclass(frozen=True, kw_only=True)
class CopiesKind:
    """`by_lane`: copies that leave or enter the busiest rank, on each wire. `fetched`: their weights travel;
    `returned`: their gradients do."""

    by_lane: tuple[tuple[str, int], ...]
    fetched: bool
    returned: bool

    def wire_s(self, model: CostModel, phase: Phase, expert_bytes: ExpertBytes) -> float | None:
        """Seconds of Wf, or of Wg; None where a phase has none."""
        forward = phase == "forward"
        if not (self.fetched if forward else self.returned):
            return None
        size = expert_bytes[0 if forward else 1]
        return model.exchange_s({lane: count * size for lane, count in self.by_lane})


def copies_kind(exchange: ExchangePlan, nodes: Nodes | None) -> CopiesKind | None:
    """Of a step; None where it has no copies. A step with gradients is taken for one after an optimizer's, in which all
    kept copies are fetched anew; in others they are valid. Copies of one step always travel."""
    seats, world = exchange.seats, exchange.world_size
    if seats is None or not seats.has_copies:
        return None
    copies = np.zeros((world, world), dtype=np.int64)
    for rank, own in enumerate(seats.copies):
        for one in own:
            copies[one.home, rank] += 1
    lanes = []
    for lane, pairs in zip(LANES, moves(world, nodes), strict=True):
        if pairs.any():
            taken = copies * pairs
            lanes.append((lane, int(max(taken.sum(axis=0).max(), taken.sum(axis=1).max()))))
    grad = exchange.grad_enabled
    return CopiesKind(
        by_lane=tuple(lanes),
        fetched=grad or not exchange.copies_kept,
        returned=grad and exchange.weights_require_grad,
    )
