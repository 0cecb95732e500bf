"""The record with which every rank begins a step, and what follows from all of them: a plan, or the same error.

One record of fixed length per rank and step is gathered. Every rank reads the same table and comes to the same end, so
nothing has been sent when a step is refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import numpy as np
import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.errors import ConfigError, PlanMismatch

PHASES = ("forward", "recompute")
# A row for every choice; one for every (token, rank) pair; every token of every rank on every rank.
DEDUP = ("off", "on", "all")

# Codes of the dtypes a row may have; the position is the code that travels, so only ever append.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_code(dtype: torch.dtype) -> int:
    """Position of `dtype` in the wire table. Raises ConfigError for a dtype that rows cannot have."""
    if dtype not in DTYPES:
        raise ConfigError("x.dtype", dtype, "one of " + ", ".join(str(known) for known in DTYPES))
    return DTYPES.index(dtype)


def digest(*parts: object) -> int:
    """A 63-bit digest of the printed form of `parts`, equal on all ranks that hold equal values."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


# code -> (field, what was expected). The code travels, so only ever append.
REFUSALS: dict[int, tuple[str, str]] = {
    1: ("logits", "no row with NaN or +inf, none that is all -inf (value: the router's status; or bad_logits='drop')"),
    2: ("x.shape[-1]", "the hidden_size of the layer"),
    3: ("x.dtype", "the dtype of the layer's expert weights"),
    4: ("x.device", "the device of the layer's expert weights"),
    5: (
        "topk_ids",
        "integers [T, K], experts from -1 (unused) to num_experts - 1; deduplicated: none twice in a token",
    ),
    6: ("x", "a call that no rank refuses (the message of the refusing rank says what is wrong)"),
    7: ("topk_weights", "floats of the shape of topk_ids"),
    8: ("gate_up_proj", "[e, 2F, D], or [e, F, D] without a gate, beside down_proj [e, D, F]"),
    9: ("down_proj", "[e, D, F] in the dtype and on the device of gate_up_proj"),
    10: ("checkpoint", "use_reentrant=False"),
}
DTYPE_REFUSAL = 3  # its value is a position in DTYPES
NOT_SENT = -(1 << 62)  # the value is no integer: only the refusing rank's message has it


@dataclass(frozen=True, kw_only=True)
class BackwardRecord:
    """What one rank says when the backward of a call begins: of which `step`, the `run`-th of it, and a digest of what
    it will exchange. `caller` as in StepRecord."""

    step: int
    run: int
    digest: int
    caller: int = 0

    def to_tensor(self) -> torch.Tensor:
        """int64 [3]."""
        return torch.tensor([self.step, self.run, self.digest], dtype=torch.int64)


BACKWARD_FIELDS = ("step", "run", "schedule")


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one rank says at the start of a step. Integers only; `counts` is int64 [BLOCKS, P] on the CPU. `dedup`: a
    position in DEDUP; `first` and `last` [BLOCKS, P] (see `counts.py`) go with "on" alone. `caller`: which of those
    that share a transport, copies of one layer for example."""

    step: int
    phase: int
    status: int
    status_value: int
    grad_enabled: int
    x_requires_grad: int
    chunks: int
    chunk_by: int
    dtype: int
    hidden: int
    top_k: int
    placement_epoch: int
    config_digest: int
    schedule_digest: int
    counts: torch.Tensor
    dedup: int = 0
    first: torch.Tensor | None = None
    last: torch.Tensor | None = None
    caller: int = 0

    @property
    def tables(self) -> list[torch.Tensor]:
        """What is sent beside the named fields, [BLOCKS, P] each."""
        return [one for one in (self.counts, self.first, self.last) if one is not None]

    def to_tensor(self) -> torch.Tensor:
        """int64 [record_words(P, tables)]: the named fields in order, then the counts, then `first` and `last`."""
        head = torch.tensor([int(getattr(self, name)) for name in RECORD_FIELDS], dtype=torch.int64)
        return torch.cat([head, *(one.reshape(-1).to(torch.int64) for one in self.tables)])


# `caller` is in the head of the message.
RECORD_FIELDS: tuple[str, ...] = tuple(
    field.name for field in fields(StepRecord) if field.name not in ("counts", "first", "last", "caller")
)
# The fields that must be equal on all ranks. `status` and `x_requires_grad` may differ.
AGREED_FIELDS: tuple[str, ...] = tuple(
    name for name in RECORD_FIELDS if name not in ("status", "status_value", "x_requires_grad")
)


def record_words(num_slots: int, tables: int) -> int:
    """Words of a record: `tables` is 3 with deduplication, else 1."""
    return len(RECORD_FIELDS) + tables * BLOCKS * num_slots


DIGEST_HINT = (
    '; they have other schedules, or other ops or settings beside schedule="auto", or only one has measured already'
)


def _said(name: str, value: int) -> str:
    """A field's value in an error."""
    return f'{value} (schedule="auto")' if name == "chunks" and value == 0 else str(value)


def agree_on(records: torch.Tensor, *, rank: int, num_slots: int) -> ExchangePlan:
    """The plan that follows from the gathered records, int64 [W, n] on the CPU: words of `StepRecord.to_tensor`, behind
    which there may be anything.

    Every rank calls this with the same data and so comes to the same end: the plan, or the same error. Raises
    ConfigError where a rank refused the step, PlanMismatch where the ranks differ or a count cannot be.
    """
    world_size = records.shape[0]
    table = records.numpy()
    column = {name: table[:, i] for i, name in enumerate(RECORD_FIELDS)}
    refusing = np.nonzero(column["status"])[0]
    if len(refusing):
        first = int(refusing[0])
        code, sent = int(column["status"][first]), int(column["status_value"][first])
        field, expected = REFUSALS.get(code, ("status", "a known status code"))
        value: object = "what rank " + str(first) + " was given" if sent == NOT_SENT else sent
        if code == DTYPE_REFUSAL and 0 <= sent < len(DTYPES):
            value = DTYPES[sent]
        raise ConfigError(field, value, f"{expected}; refused on rank {first}")
    step = int(column["step"][rank])
    for name in AGREED_FIELDS:
        values = column[name]
        if (values != values[0]).any():
            other = int(np.nonzero(values != values[0])[0][0])
            here, there = (_said(name, int(values[at])) for at in (0, other))
            raise PlanMismatch(
                f"the ranks disagree about {name}: rank 0 has {here}, rank {other} has {there}; nothing was sent"
                + (DIGEST_HINT if name == "schedule_digest" else ""),
                rank=rank,
                peer=other if other != rank else 0,
                step=step,
                action="N",
            )
    dedup = int(column["dedup"][0])
    tables = table[:, len(RECORD_FIELDS) : record_words(num_slots, 3 if dedup == 1 else 1)]
    counts, *ends = np.split(tables.reshape(world_size, -1, num_slots), tables.shape[1] // (BLOCKS * num_slots), axis=1)
    bad = _impossible(counts, *ends)
    if not 0 <= dedup < len(DEDUP):
        bad[:] = True
    if bad.any():
        peer = int(np.nonzero(bad)[0][0])
        raise PlanMismatch(f"rank {peer} announced an impossible row count; nothing was sent", rank=rank, peer=peer,
                           step=step, action="N")  # fmt: skip
    return ExchangePlan(
        rank=rank,
        world_size=world_size,
        step=step,
        phase=PHASES[int(column["phase"][0])] if 0 <= column["phase"][0] < len(PHASES) else "unknown",
        grad_enabled=bool(column["grad_enabled"][0]),
        x_requires_grad=bool(column["x_requires_grad"].any()),
        counts=counts,
        dedup=dedup,
        first=ends[0] if ends else None,
        last=ends[1] if ends else None,
    )


def _impossible(counts: np.ndarray, first: np.ndarray | None = None, last: np.ndarray | None = None) -> np.ndarray:
    """bool [W]: the ranks whose counts no routing can have; int64 [W, BLOCKS, P] each."""
    # A row count past 2^40 cannot be a real batch; refusing it keeps every sum below 2^63.
    bad = np.asarray(((counts < 0) | (counts > 1 << 40)).any(axis=(1, 2)))
    if first is None or last is None:
        return bad
    bad |= ((first < 0) | (last < 0) | (first > counts) | (last > counts)).any(axis=(1, 2))
    world_size, _, num_slots = counts.shape
    local = num_slots // world_size
    choices, begun, ended = (
        one.reshape(world_size, BLOCKS, world_size, local).cumsum(axis=3) for one in (counts, first, last)
    )
    rows, chosen = begun[..., -1], choices[..., -1]
    # No row is over before it began, each is over in the end, and it stands for 1 to `local` choices.
    bad |= (ended > begun).any(axis=(1, 2, 3))
    bad |= ((ended[..., -1] != rows) | (rows > chosen) | (chosen > rows * local)).any(axis=(1, 2))
    return bad
