"""The copies of experts in a step, as its schedules are planned from them."""

from __future__ import annotations

from dataclasses import dataclass

from moe_overlap.agreement.copies import CopyPlan, copy_plan
from moe_overlap.agreement.loads import LANES, Nodes, moves
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.schedule.actions import Phase

ExpertBytes = tuple[int, int]  # of one expert: its weights, and their gradients on the way home
ByLane = tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class CopiesKind:
    """`by_lane`: copies that leave or enter the busiest rank, on each wire. `fetched`: their weights travel;
    `returned`: their gradients do. `relayed`: as `by_lane`, of each of two groups of Wf, where copies can go from rank
    to rank with less to do at the busiest port."""

    by_lane: ByLane
    fetched: bool
    returned: bool
    relayed: tuple[ByLane, ...] = ()

    def wires_s(self, model: CostModel, phase: Phase, expert_bytes: ExpertBytes) -> list[list[float]]:
        """For each form of Wf, or of Wg, the seconds of its groups; nothing where a phase has none."""
        forward = phase == "forward"
        if not (self.fetched if forward else self.returned):
            return []
        size = expert_bytes[0 if forward else 1]
        forms = [[self.by_lane], [*self.relayed]] if forward and self.relayed else [[self.by_lane]]
        return [[model.exchange_s({lane: count * size for lane, count in one}) for one in form] for form in forms]


def copies_kind(exchange: ExchangePlan, nodes: Nodes | None) -> CopiesKind | None:
    """Of a step; None where it has no copies. A step with gradients is taken for one after an optimizer's, in which all
    kept copies are fetched anew; in others they are valid. Copies of one step always travel."""
    seats = exchange.seats
    if seats is None or not seats.has_copies:
        return None
    grad = exchange.grad_enabled
    direct, relayed = (copy_plan(exchange, seats.copies, relayed=relayed) for relayed in (False, True))
    return CopiesKind(
        by_lane=_busiest(direct, 0, nodes),
        fetched=grad or not exchange.copies_kept,
        returned=grad and exchange.weights_require_grad,
        relayed=tuple(_busiest(relayed, group, nodes) for group in range(relayed.chunks)) if relayed.chunks > 1 else (),
    )


def _busiest(plan: CopyPlan, group: int, nodes: Nodes | None) -> ByLane:
    lanes = []
    for lane, pairs in zip(LANES, moves(plan.world_size, nodes), strict=True):
        if pairs.any():
            taken = plan.rows(group) * pairs
            lanes.append((lane, int(max(taken.sum(axis=0).max(), taken.sum(axis=1).max()))))
    return tuple(lanes)
