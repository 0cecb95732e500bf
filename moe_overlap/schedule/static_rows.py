"""Where the rows of a step of fixed shapes lie: from each choice to its row, on the device, with nothing read back.

Groups are the (segment, slot) pairs of `StaticLayout`. A choice has the row of its place in its group; from the
group's capacity on it has none (-1), and is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe_overlap import ops
from moe_overlap.agreement.static_plan import StaticChunks, StaticLayout
from moe_overlap.ops import maps

WORD = 3
MILLI = 1000


@dataclass(frozen=True, eq=False, kw_only=True)
class Placed:
    """Of one rank's choices, on their device. key_TK, place_TK: see `StaticExchange`. word: int32 [WORD]: choices that
    have no row; the capacity factor that would have held all, in thousandths, rounded up; whether an id was none."""

    key_TK: torch.Tensor
    place_TK: torch.Tensor
    word: torch.Tensor


def place(layout: StaticLayout, slots_TK: torch.Tensor) -> Placed:
    """slots_TK: int32 [T, K] physical slots, -1 unused; other ids than slots are unused too, and said in the word."""
    slots, device = layout.num_slots, slots_TK.device
    groups = len(layout.segments) * slots
    bad = (slots_TK < -1) | (slots_TK >= slots)
    used = (slots_TK >= 0) & ~bad
    segment_T = _kept(layout, "token_segments", layout.token_segments, device)
    key_TK = torch.where(used, slots_TK + segment_T[:, None] * slots, -1)
    counts_G, ends_G, row_TK, _ = ops.row_map(key_TK, num_experts=groups)
    place_TK = row_TK - (ends_G - counts_G)[key_TK.clamp_min(0).long()]
    capacity_G = _kept(layout, "capacities", np.repeat(layout.capacities, slots), device)
    choices_G = _kept(layout, "choices", np.repeat(layout.segment_tokens * layout.top_k, slots).clip(1), device)
    over = (counts_G - capacity_G).clamp_min(0).sum()
    # A group's share is choices / slots.
    factor = (counts_G.long() * (MILLI * slots) + choices_G - 1).div(choices_G, rounding_mode="floor").amax()
    word = torch.stack([over, factor, bad.any().long()]).to(torch.int32)
    return Placed(key_TK=key_TK, place_TK=place_TK, word=word)


def static_order(plan: StaticChunks) -> tuple[torch.Tensor, torch.Tensor]:
    """(slot_to_row int32 [T, K], ends int32 [S * P] of the groups' rows): as `send_order`, for a `StaticExchange`."""
    exchange, layout = plan.exchange, plan.layout
    key_TK, place_TK = exchange.key_TK, exchange.place_TK  # type: ignore[attr-defined]
    device, cut = key_TK.device, (plan.chunks, plan.by)
    first_SP = plan.first_rows() if (cut, device) not in layout.kept else None
    first_G = _kept(layout, cut, first_SP, device)
    capacity_G = _kept(layout, "capacities", np.repeat(layout.capacities, layout.num_slots), device)
    group_TK = key_TK.clamp_min(0).long()
    fits = (key_TK >= 0) & (place_TK < capacity_G[group_TK])
    return torch.where(fits, first_G[group_TK] + place_TK, -1), first_G + capacity_G


def _kept(layout: StaticLayout, name: object, values: np.ndarray | None, device: torch.device) -> torch.Tensor:
    """int32, flat, on `device`: brought there once. A graph that is captured may hold it."""
    if (name, device) not in layout.kept:
        assert values is not None
        flat = torch.from_numpy(np.ascontiguousarray(values.reshape(-1).astype(np.int32)))
        layout.kept[name, device] = maps.to_device(flat, device)
    kept: torch.Tensor = layout.kept[name, device]
    return kept
