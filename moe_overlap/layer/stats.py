"""What a layer says about its last forward call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_overlap.agreement.node_plan import NodePlan
from moe_overlap.agreement.plan import ChunkPlan
from moe_overlap.agreement.static_plan import StaticExchange
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.layer.shares import Shares, choice_sums
from moe_overlap.placement.placement import Placement
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.routing.loss_free import max_violation
from moe_overlap.schedule.builders import SchedulePair, Schedules
from moe_overlap.schedule.lanes import Lanes
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.schedule.run import Step


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """The last forward call of a layer.

    tokens_per_expert: int64 [E] on the CPU, (token, k) slots that the experts computed, over all ranks.
    dropped_tokens: (token, k) slots this rank's router dropped. payload_bytes: bytes of rows this rank sent to other
    ranks, dispatch and combine; bytes_to_ranks: to each of them; inter_node_bytes: to other nodes (0 where nodes are
    not known). overload: rows of the busiest rank over the mean (1.0 = balanced). max_over_mean: the same of experts;
    MaxVio is this minus 1. shares: of this rank's choices. schedule: the forward schedule's text. implementation: what
    computed, a line for each implementation; and the width of latent rows. hit_rate: the share of the steps so
    far that schedule="auto" did not search for (None with another one). As text: a sentence first, then all of it.
    """

    tokens_per_expert: torch.Tensor
    dropped_tokens: int
    payload_bytes: int
    bytes_to_ranks: tuple[int, ...]
    inter_node_bytes: int
    overload: float
    max_over_mean: float
    shares: Shares
    schedule: str
    implementation: tuple[str, ...]
    hit_rate: float | None = None

    def __str__(self) -> str:
        """The answer in one sentence, then what the figures are."""
        routed, unused = int(self.tokens_per_expert.sum()), int((self.tokens_per_expert == 0).sum())
        lines = [
            f"{routed} rows went to {self.tokens_per_expert.numel()} experts, the busiest rank has {self.overload:.2f}x"
            f" and the busiest expert {self.max_over_mean:.2f}x the mean; {self.payload_bytes / 1e6:.3g} MB left this "
            "rank.",
            f"  rows of each expert: {self.tokens_per_expert.tolist()}; {unused} got none",
            f"  dropped on this rank: {self.dropped_tokens}",
            f"  bytes to each rank: {list(self.bytes_to_ranks)}, to other nodes: {self.inter_node_bytes}",
            f"  {self.shares}",
            f"  schedule: {self.schedule} (letters: explain())"
            + ("" if self.hit_rate is None else f", {self.hit_rate:.1%} of the steps not searched for"),
            *(f"  {line}" for line in self.implementation),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False, kw_only=True)
class LastStep:
    """What a layer remembers of its last forward call. `plan` and `lanes` are None where one rank ran its ops in a
    row. chosen_E: int64 [E], what this rank's router chose. bytes_to_ranks: of rows sent to each rank, 0 to itself.
    Nothing here leads into the graph of the call."""

    topk_ids_TK: torch.Tensor
    chosen_E: torch.Tensor
    dropped_tokens: torch.Tensor
    plan: ChunkPlan | None
    bytes_to_ranks: tuple[int, ...]
    schedule: Schedules
    pair: SchedulePair
    lanes: Lanes | None

    @classmethod
    def of(cls, step: Step, routing: RoutingDecision) -> LastStep:
        """At the end of a step's forward."""
        to_ranks = tuple(rows * step.layout.row_bytes for rows in rows_to_ranks(step.plan))
        return cls(topk_ids_TK=routing.topk_ids_TK, chosen_E=routing.tokens_per_expert_E,
                   dropped_tokens=routing.dropped_tokens, plan=step.plan, schedule=step.schedule, pair=step.pair,
                   bytes_to_ranks=to_ranks, lanes=step.lanes)  # fmt: skip

    @classmethod
    def of_one_rank(
        cls, pair: SchedulePair, ids_TK: torch.Tensor, chosen_E: torch.Tensor, dropped: torch.Tensor
    ) -> LastStep:
        """Of a call whose ops ran in a row; `pair`: what that stands for."""
        return cls(topk_ids_TK=ids_TK, chosen_E=chosen_E, dropped_tokens=dropped, plan=None, bytes_to_ranks=(0,),
                   schedule=pair, pair=pair, lanes=None)  # fmt: skip

    @property
    def payload_bytes(self) -> int:
        """Bytes of rows that this rank sent to others."""
        return sum(self.bytes_to_ranks)

    @property
    def inter_node_bytes(self) -> int:
        """Those of them that went to other nodes; 0 where nodes are not known."""
        return 0 if self.plan is None else self.plan.exchange.off_node(self.bytes_to_ranks)

    @property
    def place(self) -> tuple[int, int]:
        """(rank, ranks of a node); 0 where nodes are not known."""
        return (0, 0) if self.plan is None else (self.plan.rank, self.plan.exchange.ranks_per_node)

    def tokens_per_expert(self, placement: Placement) -> torch.Tensor:
        """int64 [E], choices that the experts computed, over all ranks; with `mode="static"` this rank's choices, as
        no rank hears those of others. On the device there and where one rank ran its ops in a row, else on the CPU."""
        experts = placement.num_experts
        if self.plan is None or isinstance(self.plan.exchange, StaticExchange):
            ids_S = self.topk_ids_TK.reshape(-1).long() + 1
            return torch.zeros(experts + 1, dtype=torch.int64, device=ids_S.device).index_add_(
                0, ids_S, torch.ones_like(ids_S)
            )[1:]
        return self.plan.exchange.tokens_per_expert

    @property
    def events(self) -> list[TimelineEvent]:
        """The executed actions, those of its backward too once it has run. On CUDA this waits for them."""
        return [] if self.lanes is None else self.lanes.events


def rows_to_ranks(plan: ChunkPlan) -> tuple[int, ...]:
    """Rows that this rank sends to each rank in a forward, dispatch and combine, those that it passes on inside its
    node too; 0 to itself."""
    to_ranks = [0] * plan.world_size
    for one in (plan, plan.inside) if isinstance(plan, NodePlan) else (plan,):
        for chunk in range(one.chunks):
            for reverse in (False, True):
                sent, _ = one.counts(chunk, reverse=reverse)
                to_ranks = [a + b for a, b in zip(to_ranks, sent, strict=True)]
    to_ranks[plan.rank] = 0
    return tuple(to_ranks)


def layer_stats(last: LastStep, placement: Placement, computes: Sequence[str]) -> LayerStats:
    """The statistics of one call. `computes`: the registry's lines."""
    counts_E, overload = last.tokens_per_expert(placement).cpu(), 1.0
    if last.plan is not None:
        rows = last.plan.exchange.rows_per_rank
        overload = max(rows) * len(rows) / sum(rows) if sum(rows) else 1.0
    rank, per_node = last.place
    return LayerStats(
        tokens_per_expert=counts_E,
        dropped_tokens=int(last.dropped_tokens),
        payload_bytes=last.payload_bytes,
        bytes_to_ranks=last.bytes_to_ranks,
        inter_node_bytes=last.inter_node_bytes,
        overload=overload,
        max_over_mean=1.0 + max_violation(counts_E),
        shares=Shares.of(choice_sums(last.topk_ids_TK, placement, rank, per_node), nodes_known=per_node > 0),
        schedule=last.pair.forward.text,
        implementation=tuple(computes),
        hit_rate=last.schedule.hit_rate if isinstance(last.schedule, PlannedSchedule) else None,
    )
