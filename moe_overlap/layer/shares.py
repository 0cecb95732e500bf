"""Where one rank's choices lie: how many ranks and nodes a token goes to, and how many of its choices stay near."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_overlap.agreement.seats import seats_of
from moe_overlap.placement.placement import Placement

SUMS = ("tokens", "choices", "on_rank", "on_node", "ranks", "nodes")


def choice_sums(ids_TK: torch.Tensor, placement: Placement, rank: int, ranks_per_node: int) -> torch.Tensor:
    """int64 [6], in the order of SUMS, on the device of the ids: tokens with a choice; choices; those of them for
    experts of this rank, and of its node; the distinct ranks, and nodes, of each token summed up, its own ones too.

    ids_TK: int32 [T, K], logical experts, -1 = unused (padding, drops). ranks_per_node: 0: every rank is a node.
    """
    seats = seats_of(placement)
    seats_TK = seats.of_ids(ids_TK, rank).long()
    used_TK = seats_TK >= 0
    rank_TK = seats_TK.clamp_min(0) // seats.width
    size = ranks_per_node or 1
    node_TK, own_node = rank_TK // size, rank // size
    return torch.stack(
        [
            used_TK.any(dim=1).sum(),
            used_TK.sum(),
            (used_TK & (rank_TK == rank)).sum(),
            (used_TK & (node_TK == own_node)).sum(),
            _distinct(rank_TK, used_TK, placement.world_size),
            _distinct(node_TK, used_TK, placement.world_size // size),
        ]
    )


def _distinct(place_TK: torch.Tensor, used_TK: torch.Tensor, places: int) -> torch.Tensor:
    """How many different places each token has among its used slots, summed over the tokens."""
    seen = torch.zeros(place_TK.shape[0], places + 1, dtype=torch.bool, device=place_TK.device)
    seen.scatter_(1, torch.where(used_TK, place_TK, places), True)
    return seen[:, :places].sum()


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Means over tokens and choices; None where there are none.

    local_share: of the choices, those for experts on the token's node (on its rank, where nodes are not known).
    rank_share: those for experts on its rank. distinct_ranks, distinct_nodes: where the experts of a token are, on
    average, its own rank and node included; distinct_nodes is None where nodes are not known.
    """

    local_share: float | None
    rank_share: float | None
    distinct_ranks: float | None
    distinct_nodes: float | None

    @classmethod
    def of(cls, sums: torch.Tensor, *, nodes_known: bool) -> Shares:
        """From sums of `choice_sums`."""
        tokens, choices, on_rank, on_node, ranks, nodes = (int(one) for one in sums.tolist())
        return cls(
            local_share=on_node / choices if choices else None,
            rank_share=on_rank / choices if choices else None,
            distinct_ranks=ranks / tokens if tokens else None,
            distinct_nodes=nodes / tokens if tokens and nodes_known else None,
        )
