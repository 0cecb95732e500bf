"""How evenly a benchmark's tokens are spread over the experts, and how many of their choices stay on their node."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_overlap.commands.bench.cases import BlockPair
from moe_overlap.launch.launch import World
from moe_overlap.layer.shares import Shares, choice_sums
from moe_overlap.routing.choice import count_choices
from moe_overlap.routing.loss_free import max_violation


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of all ranks' tokens. max_over_mean: choices of the most wanted expert over the mean. local_share: of the
    choices, those for experts on the node of the token; None where there is none."""

    max_over_mean: float
    local_share: float | None


def spread_of(world: World, model: BlockPair, ranks_per_node: int) -> Spread:
    """Of a case's routing, which is the same in every step. Collective."""
    placement, ids_TK = model.moe.dispatcher.placement, model.moe.router.ids_TK
    assert isinstance(ids_TK, torch.Tensor)
    counts_E = torch.stack(world.gather(count_choices(ids_TK, placement.num_experts).long())).sum(dim=0)
    sums = torch.stack(world.gather(choice_sums(ids_TK, placement, world.rank, ranks_per_node))).sum(dim=0)
    shares = Shares.of(sums, nodes_known=True)
    return Spread(max_over_mean=1.0 + max_violation(counts_E), local_share=shares.local_share)
