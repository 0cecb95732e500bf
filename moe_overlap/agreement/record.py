"""The record with which every rank begins a step, and what follows from its fields: no error, or one on all ranks.

Every rank reads the same fields of all ranks and comes to the same end, so nothing was sent when a step is refused.
What follows from the counts is in `agree.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from moe_overlap.agreement.common import differing
from moe_overlap.agreement.seats import Seats, StepRule
from moe_overlap.agreement.sizes import digest as digest
from moe_overlap.agreement.sizes import record_words as record_words
from moe_overlap.errors import ConfigError, PlanMismatch

PHASES = ("forward", "recompute")
# A row for every choice; one for every (token, rank) pair.
DEDUP = ("off", "on")

# Codes of the dtypes a row may have; the position is the code that travels, so only ever append.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_code(dtype: torch.dtype) -> int:
    """Position of `dtype` in the wire table. Raises ConfigError for a dtype that rows cannot have."""
    if dtype not in DTYPES:
        raise ConfigError("x.dtype", dtype, "one of " + ", ".join(str(known) for known in DTYPES))
    return DTYPES.index(dtype)


# code -> (field, what was expected). The code travels, so only ever append.
REFUSALS: dict[int, tuple[str, str]] = {
    1: ("logits", "no row with NaN or +inf, none that is all -inf, as x with NaN makes (or bad_logits='drop')"),
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
    11: ("replay.calls", "a recording with as many forward calls of the layer as are made"),
    12: ("replay.tokens", "a recording of as many tokens as the call has"),
    13: ("replay.top_k", "a recording with top_k experts for each token"),
    14: ("replay.num_experts", "a recording of a layer with as many experts"),
    15: ("replay.layers", "a recording of as many MoE layers as the model has"),
    16: ("replay.file", "a file that a RoutingLog, or moe-overlap train --save-routing, wrote"),
    17: ("replay.weights", "'recorded', beside a router that cannot weigh experts that it did not choose"),
    18: ("rule", "None, or a rule that goes with the layer (the message of the refusing rank says what is wrong)"),
}
DTYPE_REFUSAL = 3  # its value is a position in DTYPES
NOT_SENT = -(1 << 62)  # the value is no integer: only the refusing rank's message has it


@dataclass(frozen=True, kw_only=True)
class BackwardRecord:
    """What one rank says when the backward of a call begins: of which `step`, the `run`-th of it, and a digest of what
    it will exchange. retain_graph: whether another one may follow, where the schedules of later steps depend on that.
    `caller` as in StepRecord."""

    step: int
    run: int
    digest: int
    retain_graph: bool = False
    caller: int = 0

    def to_tensor(self) -> torch.Tensor:
        """int64 [4]."""
        return torch.tensor([self.step, self.run, self.digest, self.retain_graph], dtype=torch.int64)


BACKWARD_FIELDS = ("step", "run", "schedule", "retain_graph")


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one rank says at the start of a step: integers, and tables of counts on the CPU, integers too.

    counts [BLOCKS, E], by logical experts: those by slots follow from the placement, on every rank alike. dedup: a
    position in DEDUP; `first` and `last` [BLOCKS, P] (see `counts.py`) go with "on" alone. ranks_per_node: so many
    ranks in a row share a node (0: not known); `node_rows` [2, BLOCKS, nodes * e] goes with `hierarchical`
    alone (e slots of a rank).
    static_tokens: T, where all steps are to have as many (0: any number).
    router_state: a digest of what the routers of all ranks must have in common (0: nothing). caller: which of those
    that share a transport, copies of one layer for example. weight_version: of this rank's expert weights, a number
    that changes with them, where others have copies of them; weights_require_grad: whether their gradients are wanted.
    common_*: of the weights that every rank has whole, the words of `common.fingerprint` (zeros: nothing said of them).
    Not sent, but equal on all ranks: seats (None: expert i in slot i), rule (which seats
    are in their place, once the counts are known) and nodes, the node of
    each rank (None: each has its own).
    """

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
    ranks_per_node: int = 0
    hierarchical: int = 0
    router_state: int = 0
    static_tokens: int = 0
    weight_version: int = 0
    weights_require_grad: int = 0
    common_norm: int = 0
    common_sum: int = 0
    common_other_sum: int = 0
    first: torch.Tensor | None = None
    last: torch.Tensor | None = None
    node_rows: torch.Tensor | None = None
    caller: int = 0
    seats: Seats | None = None
    rule: StepRule | None = None
    nodes: tuple[int, ...] | None = None

    @property
    def tables(self) -> list[torch.Tensor]:
        """The counts, then `first` and `last`, then `node_rows`, where it has them."""
        return [one for one in (self.counts, self.first, self.last, self.node_rows) if one is not None]

    @property
    def named_fields(self) -> torch.Tensor:
        """int64 [len(RECORD_FIELDS)]: the named fields in order."""
        return torch.tensor([int(getattr(self, name)) for name in RECORD_FIELDS], dtype=torch.int64)

    def to_tensor(self) -> torch.Tensor:
        """int64 [record_words]: the named fields, then the tables in order, two int32 to a word."""
        tables = [one.reshape(-1).to(torch.int32) for one in self.tables]
        return torch.cat([self.named_fields, torch.cat(tables).view(torch.int64)])


# `caller` is in the head of the message.
RECORD_FIELDS: tuple[str, ...] = tuple(
    field.name
    for field in fields(StepRecord)
    if field.name not in ("counts", "first", "last", "node_rows", "caller", "seats", "rule", "nodes")
)
# What each rank says of itself; the other fields must be equal on all ranks, and the common ones nearly so.
COMMON_FIELDS = ("common_norm", "common_sum", "common_other_sum")
OWN_FIELDS = ("status", "status_value", "x_requires_grad", "weight_version", "weights_require_grad", *COMMON_FIELDS)
AGREED_FIELDS: tuple[str, ...] = tuple(name for name in RECORD_FIELDS if name not in OWN_FIELDS)
_AGREED = [RECORD_FIELDS.index(name) for name in AGREED_FIELDS]


ROUTER_HINT = (
    "; they replay other calls, or recordings of other lengths, or only one of them does (0), or not all of them were "
    "given a token_mask beside balance='global'"
)
DIGEST_HINT = (
    '; they have other schedules, or other ops or settings beside schedule="auto", or only one has measured already'
)

CONFIG_HINT = (
    "; their layers have other activations, widths, payload_dtype, bad_logits or placements, or one of them has a "
    "dispatcher.rule and another has none, or one with other prices or options"
)
EPOCH_HINT = "; set_placement, migrate and PlacementController.step are for all ranks alike"
COMMON_HINT = (
    "seed all ranks alike before the model is made, or load one checkpoint on all of them, average the gradients of "
    "these weights over the ranks (by DDP, FSDP2 or by hand), and let all ranks clip and skip alike: "
    'moe_overlap.clip_grad_norm_ and GradScaler, not those of torch (docs/parallel.md, "Equal routers")'
)
HINTS = {
    "schedule_digest": DIGEST_HINT,
    "router_state": ROUTER_HINT,
    "config_digest": CONFIG_HINT,
    "placement_epoch": EPOCH_HINT,
}


def _said(name: str, value: int) -> str:
    """A field's value in an error."""
    return f'{value} (schedule="auto")' if name == "chunks" and value == 0 else str(value)


def compare(records: torch.Tensor, *, rank: int) -> dict[str, np.ndarray]:
    """The named fields of all ranks, int64 [W] each, from their records [W, n] on the CPU, behind whose fields there
    may be anything.

    Every rank calls this with the same data and so comes to the same end: raises ConfigError where a rank refused the
    step, PlanMismatch where the ranks differ.
    """
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
    agreed = table[:, _AGREED]
    different = np.argwhere((agreed != agreed[0]).T)  # by field
    if len(different):
        place, other = (int(n) for n in different[0])
        name = AGREED_FIELDS[place]
        here, there = (_said(name, int(agreed[at, place])) for at in (0, other))
        raise PlanMismatch(
            f"the ranks disagree about {name}: rank 0 has {here}, rank {other} has {there}; nothing was sent"
            + HINTS.get(name, ""),
            rank=rank,
            peer=other if other != rank else 0,
            step=int(column["step"][rank]),
            action="N",
        )
    _require_common(column, rank)
    return column


def _require_common(column: dict[str, np.ndarray], rank: int) -> None:
    """Raises PlanMismatch where ranks have different weights of what every rank has whole."""
    if not column["common_norm"].any():
        return
    apart = differing(np.stack([column[name] for name in COMMON_FIELDS], axis=1))
    if apart is not None:
        one, other, share = apart
        raise PlanMismatch(
            f"ranks {one} and {other} have different weights of what each rank has whole (router, shared expert, "
            f"projections of latents), by about {share:.1g} of their norm; nothing was sent; {COMMON_HINT}",
            rank=rank,
            peer=other if other != rank else one,
            step=int(column["step"][rank]),
            action="N",
        )
