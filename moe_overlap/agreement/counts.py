"""The counts that a rank announces: rows of each block of its tokens for each slot.

Block b of a rank's T tokens is [b*T//16, (b+1)*T//16): from counts of this granularity any chunk count from 1 to 16
follows without asking the ranks again.

With deduplication a token has one row on a rank, whatever number of that rank's slots it chose. How many rows a chunk
then has does not follow from counts of choices. It does from two more histograms: a row is dispatched with the first
chunk that needs it, so it counts at the token's lowest slot on that rank, and returned with the last one, so it counts
once more at the highest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

from moe_overlap.agreement.sizes import BLOCKS
from moe_overlap.errors import ConfigError
from moe_overlap.placement.lookup import block_of_tokens

MOST = 2**31 - 1  # counts travel as int32


@dataclass
class Said:
    """Further integers that the host wants to know of a step: `words` [n]; `values` once they were read."""

    words: torch.Tensor
    values: tuple[int, ...] = ()


def block_counts(slots_TK: torch.Tensor, num_slots: int, said: Said | None = None) -> torch.Tensor:
    """int64 [BLOCKS, P] on the CPU: rows of each token block for each slot; ids of -1 do not count.

    Raises ConfigError("topk_ids") for an id outside -1..P-1. One device-to-host read, which `said` is part of.
    """
    # By block: ids that are too small, -1, the slots, ids that are too large.
    width = num_slots + 3
    places = _blocks(slots_TK)[:, None] * width + (slots_TK.clamp(-2, num_slots) + 2)
    found = _count(places.reshape(-1), BLOCKS * width, said).reshape(BLOCKS, width)
    if bool(found[:, [0, -1]].any()):
        raise _outside(slots_TK[(slots_TK < -1) | (slots_TK >= num_slots)], num_slots)
    return found[:, 2:-1].contiguous()


def block_counts_of_rows(
    slots_TK: torch.Tensor, num_slots: int, world_size: int, nodes: int = 0, said: Said | None = None
) -> tuple[torch.Tensor, ...]:
    """(counts, first, last), each int64 [BLOCKS, P] on the CPU: `block_counts`, and of the (token, rank) pairs of each
    block how many have slot p as their lowest and as their highest on that rank. With `nodes`, of which each has as
    many slots, a fourth, int64 [2, BLOCKS, nodes * e]: how many (token, node) pairs have place j as their lowest, and
    as their highest, among the e places of slots on a rank, at node * e + j.

    Raises ConfigError("topk_ids") for an id outside -1..P-1, and for one that stands twice in a token. One
    device-to-host read, which `said` is part of.
    """
    ids = slots_TK.to(torch.int64).sort(dim=1).values
    outside = (ids < -1) | (ids >= num_slots)
    used = (ids >= 0) & ~outside
    again, starts = torch.zeros_like(used), torch.ones_like(used)
    again[:, 1:] = used[:, 1:] & (ids[:, 1:] == ids[:, :-1])
    rank = torch.div(ids, num_slots // world_size, rounding_mode="floor")  # of the unused: -1
    starts[:, 1:] = rank[:, 1:] != rank[:, :-1]
    ends = starts.roll(-1, dims=1)
    ends[:, -1:] = True
    parts = [(ids, used), (ids, used & starts), (ids, used & ends)]
    if nodes:
        parts += _of_nodes(ids, used, num_slots, num_slots // world_size, nodes)
    histograms, bad = _histograms(parts, outside | again, num_slots, said)
    if bad and bool(outside.any()):
        raise _outside(ids[outside], num_slots)
    if bad:
        raise ConfigError("topk_ids", int(ids[again][0]), "no id twice in a token where rows are deduplicated")
    return (*histograms[:3], *([histograms[3:, :, : nodes * num_slots // world_size]] if nodes else []))


def _of_nodes(
    ids_TK: torch.Tensor, used_TK: torch.Tensor, num_slots: int, local: int, nodes: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For `_histograms`: the lowest and the highest place of each (token, node) pair, at node * local + place."""
    slots = num_slots // nodes  # of a node
    node, rest = torch.div(ids_TK, slots, rounding_mode="floor"), ids_TK % slots
    places = torch.where(used_TK, node * local + rest % local, -1).sort(dim=1).values
    node, counts = torch.div(places, local, rounding_mode="floor"), places >= 0
    enters, leaves = torch.ones_like(counts), torch.ones_like(counts)
    enters[:, 1:] = leaves[:, :-1] = node[:, 1:] != node[:, :-1]
    return [(places, counts & enters), (places, counts & leaves)]


def check_counts(*tables: torch.Tensor) -> None:
    """Raises ConfigError for a count that cannot travel."""
    for table in tables:
        if table.numel() and int(table.max()) > MOST:
            expected = f"fewer tokens: at most {MOST} rows of one block for one expert"
            raise ConfigError("x.shape[0]", int(table.max()), expected)


def _histograms(
    parts: list[tuple[torch.Tensor, torch.Tensor]], wrong_TK: torch.Tensor, num_slots: int, said: Said | None
) -> tuple[torch.Tensor, int]:
    """(int64 [len(parts), BLOCKS, P], how many are wrong) on the CPU, of (ids_TK, which of them count) each."""
    block_T, size = _blocks(wrong_TK), BLOCKS * num_slots
    nowhere = len(parts) * size
    flat = []
    for index, (ids_TK, counts_TK) in enumerate(parts):
        flat.append(torch.where(counts_TK, index * size + block_T[:, None] * num_slots + ids_TK, nowhere))
    flat[0] = torch.where(wrong_TK, nowhere + 1, flat[0])
    found = _count(torch.cat(flat).reshape(-1), nowhere + 2, said)
    return found[:nowhere].reshape(len(parts), BLOCKS, num_slots), int(found[-1])


def _blocks(of_TK: torch.Tensor) -> torch.Tensor:
    """int64 [T]: the block of each token."""
    return block_of_tokens(of_TK.shape[0], BLOCKS, of_TK.device)


def _count(places: torch.Tensor, size: int, said: Said | None) -> torch.Tensor:
    """int64 [size] on the CPU: how often each number from 0 to size - 1 is in `places`, and what `said` waits for."""
    if places.device.type == "cpu":
        if said is not None:
            said.values = tuple(said.words.tolist())
        return torch.bincount(places, minlength=size)
    # Elsewhere bincount reads the least and the most before it counts. Sums of integers are the same in any order.
    found = torch.zeros(size, dtype=torch.int64, device=places.device).index_add_(0, places, torch.ones_like(places))
    if said is not None:
        with _disable_current_modes():  # what a call wants to know, its recompute may not
            found = torch.cat([found, said.words.to(torch.int64)])
    found = found.cpu()
    if said is not None:
        said.values = tuple(found[size:].tolist())
    return found[:size]


def _outside(ids: torch.Tensor, num_slots: int) -> ConfigError:
    return ConfigError("topk_ids", int(ids[0]), f"expert ids from -1 to {num_slots - 1}")
