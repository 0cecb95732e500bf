"""What it costs to leave rows where they are, to send them, and to send an expert's weights to them instead.

All is of one call of a layer: integers (rows, experts) in, seconds out. `replication.py` decides with it.

Break-even. A copy of an expert on another rank spares m of that rank's rows two crossings in forward and two more in
backward; it costs the weights one crossing, and with gradients, which come home in float32, one back. For SwiGLU (3
matrices of D x F, b bytes a number, rows of D numbers) the bytes are equal at

    forward    3 D F b = 2 m D b                   m = 1.5 F
    training   3 D F b + 3 D F 4 = 4 m D b         m = 0.75 F (1 + 4 / b): 2.25 F in bfloat16, 1.5 F in float32

rows. Seconds say more than bytes: rows that a copy takes off the busiest rank shorten the step by their time of compute
as well, and a copy under other work costs nothing until that work is used up.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from moe_overlap.errors import ConfigError
from moe_overlap.planning.cost_model import WIRES, AlphaBeta, CostModel
from moe_overlap.schedule.actions import Phase

GRADIENT_BYTES = 4  # of a number of a weight gradient on its way home (float32)
FREE = AlphaBeta(alpha_s=0.0, beta_s=0.0)


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What the ranks compute in a step, [W] each: rows; those of them at copies of other ranks' experts; experts that
    have rows."""

    rows: Sequence[int]
    copied: Sequence[int]
    experts: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class PhaseCosts:
    """One phase of a layer call, in seconds.

    `row_s`: of a row of the busiest rank's experts; `wgrad_row_s`: of that, its weight gradients (0: a forward);
    `expert_s`: of each expert that has rows. `exchange`: by wire (inter, intra) over the rows that leave or enter the
    busiest rank, of one of the two exchanges. `copy`: by wire over the experts that leave or enter the busiest rank as
    copies (in backward: their gradients). `beside_s`: other work of the same window. `chunks`, `joined`: of the
    schedule. `exposed_copies`: copies are waited for where they start, whatever else the schedule overlaps. `relays`:
    copies of this phase may go from rank to rank, in two exchanges (`agreement/relays.py`): those of weights, as
    gradients go home directly.
    """

    row_s: float
    wgrad_row_s: float = 0.0
    expert_s: float = 0.0
    exchange: tuple[AlphaBeta, AlphaBeta]
    copy: tuple[AlphaBeta, AlphaBeta]
    beside_s: float = 0.0
    chunks: int = 1
    joined: bool = False
    exposed_copies: bool = False
    relays: bool = False

    def __post_init__(self) -> None:
        for name in ("row_s", "wgrad_row_s", "expert_s", "beside_s"):
            _check_number(name, getattr(self, name), "a finite number of seconds, at least 0", least=0.0)
        if self.wgrad_row_s > self.row_s:
            raise ConfigError("wgrad_row_s", self.wgrad_row_s, f"at most row_s = {self.row_s}, of which it is a part")
        _check_counts(chunks=self.chunks)
        for name in ("exchange", "copy"):
            lines = getattr(self, name)
            if not isinstance(lines, tuple) or [type(one) for one in lines] != [AlphaBeta] * len(WIRES):
                raise ConfigError(name, lines, f"an AlphaBeta for each wire, ({', '.join(WIRES)})")

    @property
    def waits_in_turn(self) -> bool:
        """Whether all ranks of a backward wait for the weight gradients of copies, then for those of homes."""
        return self.wgrad_row_s > 0 and (self.joined or self.exposed_copies)

    def window_s(self, computed: Computed, rows: Sequence[int], *copies: Sequence[int]) -> float:
        """Of a step whose busiest rank moves so many rows and experts by wire (inter, intra); copies: of each exchange
        of them.

        With r chunks, from `measure/overlap.py`'s closed forms: a chunk of the wire stands before the first experts and
        after the last, unless other work fills it, and one of compute within the wire's time. Copies of weights travel
        before the rows, and all experts wait for them: beside them is other work alone. Their gradients come last, and
        travel beside other work and the weight gradients of the experts that are at home; where they are waited for at
        once, ranks wait for each other before and after.
        """
        busy_s = max(self.row_s * n + self.expert_s * e for n, e in zip(computed.rows, computed.experts, strict=True))
        wire_s, copy_s = 0.0, 0.0
        for lane in range(len(WIRES)):
            sent = self.exchange[lane]
            if rows[lane]:
                wire_s = max(wire_s, 2.0 * (self.chunks * sent.alpha_s + sent.beta_s * rows[lane]))
        for group in copies:
            lines = zip(self.copy, group, strict=True)
            copy_s += max((line.alpha_s + line.beta_s * count for line, count in lines if count), default=0.0)
        through_s = busy_s
        if self.waits_in_turn and any(computed.copied):
            through_s = self._in_turn_s(computed)
        if self.joined:
            return through_s + wire_s + self.beside_s + copy_s
        exposed_s = copy_s if self.exposed_copies else 0.0
        copy_s -= exposed_s
        moved_s, chunk_s = wire_s + copy_s, wire_s / (2 * self.chunks)
        if not self.wgrad_row_s:
            before_s = max(self.beside_s, copy_s + 2 * chunk_s)
            return max(busy_s + before_s, moved_s + busy_s / self.chunks) + exposed_s
        dgrad_s = busy_s * (1 - self.wgrad_row_s / self.row_s)
        total_s = max(through_s + max(self.beside_s, chunk_s), moved_s + dgrad_s / self.chunks)
        if copy_s:
            total_s = max(total_s, self._last_gradients_s(computed, copy_s) + max(chunk_s - self.beside_s, 0.0))
        return total_s + exposed_s

    def _in_turn_s(self, computed: Computed) -> float:
        """Of a backward in which all ranks wait for the input gradients, for the weight gradients of copies, and for
        those of homes: each time for the slowest."""
        ranks = range(len(computed.rows))
        dgrad_row_s = self.row_s - self.wgrad_row_s
        inputs_s = max(dgrad_row_s * computed.rows[r] + self.expert_s * computed.experts[r] for r in ranks)
        copies_s = max(self.wgrad_row_s * computed.copied[r] for r in ranks)
        homes_s = max(self.wgrad_row_s * (computed.rows[r] - computed.copied[r]) for r in ranks)
        return inputs_s + copies_s + homes_s

    def _last_gradients_s(self, computed: Computed, copy_s: float) -> float:
        """Until the gradients of copies are home, from the first of a rank's rows on."""
        return max(
            (self.row_s - self.wgrad_row_s) * n + self.expert_s * e + self.wgrad_row_s * copied
            + max(self.wgrad_row_s * (n - copied) + self.beside_s, copy_s)
            for n, copied, e in zip(computed.rows, computed.copied, computed.experts, strict=True)
        )  # fmt: skip

    @property
    def numbers(self) -> tuple[float, ...]:
        """In the order in which the compiled decision takes them."""
        lines = (x for line in (*self.exchange, *self.copy) for x in (line.alpha_s, line.beta_s))
        words = (self.joined, self.exposed_copies, self.relays)
        return (
            self.row_s,
            self.wgrad_row_s,
            self.expert_s,
            *lines,
            self.beside_s,
            float(self.chunks),
            *map(float, words),
        )


def costs_of(
    model: CostModel,
    phases: Sequence[Phase],
    *,
    row_bytes: int,
    expert_params: int,
    param_bytes: int,
    chunks: int = 1,
    joined: bool = False,
    beside: bool = True,
    exposed_copies: bool = False,
    relays: bool = True,
) -> tuple[PhaseCosts, ...]:
    """The costs of a layer call from a calibrated model.

    expert_params: numbers of one expert's weights, each of param_bytes; its gradients travel in float32. `beside`: the
    model's backbone ops and shared expert run in the window. `relays`: weights may go from rank to rank where that is
    faster; gradients never do. Where a transport does not know the nodes, one wire was measured for all ranks, and
    prices the other one too: who knows them would take that for free. A model without wires is one rank's.
    """
    _check_counts(row_bytes=row_bytes, expert_params=expert_params, param_bytes=param_bytes, chunks=chunks)
    found = []
    for phase in phases:
        forward = phase == "forward"
        expert_bytes = expert_params * (param_bytes if forward else GRADIENT_BYTES)
        wires = [model.exchange.get(lane, next(iter(model.exchange.values()), FREE)) for lane in WIRES]
        experts = model.experts if forward else model.experts_dgrad
        ops_s = (model.backbone_s, model.shared_s) if forward else (model.backbone_backward_s, model.shared_backward_s)
        found.append(
            PhaseCosts(
                row_s=experts.beta_s + (0.0 if forward else model.experts_wgrad.beta_s),
                wgrad_row_s=0.0 if forward else model.experts_wgrad.beta_s,
                expert_s=model.expert_s if forward else model.expert_dgrad_s,
                exchange=(_per(wires[0], row_bytes), _per(wires[1], row_bytes)),
                copy=(_per(wires[0], expert_bytes), _per(wires[1], expert_bytes)),
                beside_s=sum(ops_s[0]) + ops_s[1] if beside else 0.0,
                chunks=chunks,
                joined=joined,
                exposed_copies=exposed_copies,
                relays=relays and forward,
            )
        )
    return tuple(found)


def nominal_costs(
    *,
    hidden: int,
    ffn: int,
    flop_per_s: float,
    inter_bytes_per_s: float,
    intra_bytes_per_s: float,
    dtype_bytes: int = 2,
    matrices: int = 3,
    chunks: int = 1,
    training: bool = True,
) -> tuple[PhaseCosts, ...]:
    """The costs of a layer call from a machine's figures, where none were measured: forward, and in training backward.

    Experts of `matrices` matrices [hidden, ffn] (3: SwiGLU) take two operations a number and row, twice as many in
    backward; rows of `hidden` numbers and weights have dtype_bytes each, gradients of copies four. Rates are those of
    one rank, to other nodes and inside its node. Weights may go from rank to rank, as with `costs_of`.
    """
    _check_counts(hidden=hidden, ffn=ffn, dtype_bytes=dtype_bytes, matrices=matrices, chunks=chunks)
    rates = {"inter_bytes_per_s": inter_bytes_per_s, "intra_bytes_per_s": intra_bytes_per_s}
    for name, rate in {"flop_per_s": flop_per_s, **rates}.items():
        _check_number(name, rate, "a finite number above 0")

    def over(size: int) -> tuple[AlphaBeta, AlphaBeta]:
        inter, intra = (AlphaBeta(alpha_s=0.0, beta_s=size / rate) for rate in rates.values())
        return inter, intra

    numbers, row = matrices * hidden * ffn, over(dtype_bytes * hidden)
    row_s = 2 * numbers / flop_per_s
    forward = PhaseCosts(row_s=row_s, exchange=row, copy=over(dtype_bytes * numbers), chunks=chunks, relays=True)
    backward = PhaseCosts(row_s=2 * row_s, wgrad_row_s=row_s, exchange=row, copy=over(GRADIENT_BYTES * numbers),
                          chunks=chunks)  # fmt: skip
    return (forward, backward) if training else (forward,)


def _check_counts(**counts: object) -> None:
    """Raises ConfigError for what is no integer of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(name, value, "an integer of at least 1")


def _check_number(name: str, value: object, expected: str, *, least: float = sys.float_info.min) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= float(value) < math.inf:
        raise ConfigError(name, value, expected)


def _per(line: AlphaBeta, size: int) -> AlphaBeta:
    """A model over things of `size` bytes each."""
    return AlphaBeta.measured(line.alpha_s, line.beta_s * size)


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """From how many rows of one rank a copy of their expert pays, over one wire ("inter", "intra").

    `bytes_rows`: as many bytes travel either way. `seconds_rows`: the copy, exposed, takes as long as the rows' compute
    on the busiest rank and their crossings; None where rows cost nothing. `copy_s`: of one copy, all phases.
    """

    wire: str
    bytes_rows: float
    seconds_rows: float | None
    copy_s: float


def break_even(costs: Sequence[PhaseCosts], *, row_bytes: int, expert_params: int, param_bytes: int) -> list[BreakEven]:
    """For each wire that costs something. `costs`: forward, or forward and backward."""
    training = len(costs) > 1
    expert_bytes = expert_params * (param_bytes + (GRADIENT_BYTES if training else 0))
    found = []
    for lane, wire in enumerate(WIRES):
        copy_s = sum(cost.copy[lane](1) for cost in costs)
        row_s = sum(cost.row_s + 2 * cost.exchange[lane].beta_s for cost in costs)
        if copy_s:
            found.append(
                BreakEven(
                    wire=wire,
                    bytes_rows=expert_bytes / (2 * len(costs) * row_bytes),
                    seconds_rows=copy_s / row_s if row_s else None,
                    copy_s=copy_s,
                )
            )
    return found


def break_even_text(found: Sequence[BreakEven]) -> list[str]:
    """One line for each wire, for `explain()` and `moe-overlap plan`."""
    lines = []
    for one in found:
        seconds = "" if one.seconds_rows is None else f"; exposed, it takes as long as {one.seconds_rows:.0f} rows"
        lines.append(
            f"copy of an expert over {one.wire}: {1e3 * one.copy_s:.3g} ms; as many bytes as {one.bytes_rows:.0f} rows "
            f"of one rank{seconds} of compute and crossings"
        )
    return lines
