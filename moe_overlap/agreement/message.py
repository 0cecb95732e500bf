"""What a rank says on the control group: always a message of one length, whose head says what it is about.

Ranks that are in different places of a program say different things at the same time. Equal lengths let these messages
meet, and the heads show it: a typed error on all ranks, where a network would have mixed them up or waited.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_overlap.agreement.sizes import HEAD_WORDS as HEAD_WORDS

KINDS = ("open", "forward", "backward", "gather", "all_reduce")
MAGIC = 0x6D6F655F6D736731  # "moe_msg1"


def message(kind: str, words: torch.Tensor, *, layer: int, caller: int, step: int, capacity: int) -> torch.Tensor:
    """int64 [HEAD_WORDS + capacity]: the head, `words`, zeros. `layer`: the number of the transport in its group;
    `caller`: which of those that share it."""
    assert words.numel() <= capacity, (kind, words.numel(), capacity)
    said = torch.zeros(HEAD_WORDS + capacity, dtype=torch.int64)
    said[:HEAD_WORDS] = torch.tensor([MAGIC, KINDS.index(kind), layer, caller, step])
    said[HEAD_WORDS : HEAD_WORDS + words.numel()] = words.reshape(-1)
    return said


def odd_one(table: torch.Tensor) -> int | None:
    """The first rank whose message [W, n] is about something else than rank 0's; None where there is none. Steps are
    the business of the records."""
    heads = table[:, : HEAD_WORDS - 1].numpy()
    different = (heads != heads[0]).any(axis=1)
    return int(different.argmax()) if different.any() else None


def described(row: torch.Tensor, name_of: Callable[[int, int], str]) -> str:
    """What the rank is doing that sent this message; `name_of(layer, caller)`."""
    magic, kind, layer, caller, step = row[:HEAD_WORDS].tolist()
    if magic != MAGIC or not 0 <= kind < len(KINDS):
        return "in something that is no message of this version"
    doing = {"open": "opening", "forward": "in a forward call of", "backward": "in a backward of",
             "gather": "agreeing about", "all_reduce": "in a sum over ranks of"}[KINDS[kind]]  # fmt: skip
    return f"{doing} {name_of(layer, caller)}" + (f" (step {step})" if step >= 0 else "")
