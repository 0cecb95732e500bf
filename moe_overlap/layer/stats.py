"""What a layer says about its last forward call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_overlap.agreement.plan import ChunkPlan
from moe_overlap.placement.placement import Placement
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.builders import SchedulePair, Schedules
from moe_overlap.schedule.lanes import Lanes
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.schedule.run import Step


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """The last forward call of a layer.

    tokens_per_expert: int64 [E] on the CPU, (token, k) slots that the experts computed, over all ranks.
    dropped_tokens: (token, k) slots this rank's router dropped. payload_bytes: bytes of rows this rank sent to other
    ranks, dispatch and combine. overload: rows of the busiest rank over the mean (1.0 = balanced). schedule: the
    forward schedule's text. implementation: what computed, and why, one line per op; and the width of latent rows.
    """

    tokens_per_expert: torch.Tensor
    dropped_tokens: int
    payload_bytes: int
    overload: float
    schedule: str
    implementation: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class LastStep:
    """What a layer remembers of its last forward call. `plan` and `lanes` are None where one rank ran its ops in a
    row. chosen_E: int64 [E], what this rank's router chose. Nothing here leads into the graph of the call."""

    topk_ids_TK: torch.Tensor
    chosen_E: torch.Tensor
    dropped_tokens: torch.Tensor
    plan: ChunkPlan | None
    payload_bytes: int
    schedule: Schedules
    pair: SchedulePair
    lanes: Lanes | None

    @classmethod
    def of(cls, step: Step, routing: RoutingDecision) -> LastStep:
        """At the end of a step's forward."""
        plan, rows = step.plan, 0
        for chunk in range(plan.chunks):
            for reverse in (False, True):
                sent, _ = plan.counts(chunk, reverse=reverse)
                rows += sum(sent) - sent[plan.rank]
        return cls(topk_ids_TK=routing.topk_ids_TK, chosen_E=routing.tokens_per_expert_E,
                   dropped_tokens=routing.dropped_tokens, plan=step.plan, schedule=step.schedule, pair=step.pair,
                   payload_bytes=rows * step.layout.row_bytes, lanes=step.lanes)  # fmt: skip

    @classmethod
    def of_one_rank(
        cls, pair: SchedulePair, ids_TK: torch.Tensor, chosen_E: torch.Tensor, dropped: torch.Tensor
    ) -> LastStep:
        """Of a call whose ops ran in a row; `pair`: what that stands for."""
        return cls(topk_ids_TK=ids_TK, chosen_E=chosen_E, dropped_tokens=dropped, plan=None, payload_bytes=0,
                   schedule=pair, pair=pair, lanes=None)  # fmt: skip

    @property
    def events(self) -> list[TimelineEvent]:
        """The executed actions, those of its backward too once it has run. On CUDA this waits for them."""
        return [] if self.lanes is None else self.lanes.events


def layer_stats(last: LastStep, placement: Placement, computes: Sequence[str]) -> LayerStats:
    """The statistics of one call. `computes`: the registry's lines."""
    if last.plan is None:
        ids = last.topk_ids_TK.reshape(-1).cpu()
        counts_E = torch.bincount(ids[ids >= 0].long(), minlength=placement.num_experts)
        overload = 1.0
    else:
        counts_E = torch.zeros(placement.num_experts, dtype=torch.int64)
        per_slot = torch.from_numpy(last.plan.exchange.counts.totals)
        counts_E.index_add_(0, torch.tensor(placement.slot_to_expert), per_slot)
        rows = last.plan.exchange.rows_per_rank
        overload = max(rows) * len(rows) / sum(rows) if sum(rows) else 1.0
    return LayerStats(
        tokens_per_expert=counts_E,
        dropped_tokens=int(last.dropped_tokens),
        payload_bytes=last.payload_bytes,
        overload=overload,
        schedule=last.pair.forward.text,
        implementation=tuple(computes),
    )
