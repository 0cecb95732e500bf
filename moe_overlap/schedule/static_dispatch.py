"""A dispatcher whose plan is a constant: steps of fixed shapes, without an agreement and without a read of the device.

The ranks agree once, in the first step after the transport was opened: on the tokens, the capacity, the schedule and
all else that a step's record names. From then on each rank takes the plan from its `StaticLayout`. What an agreement
would have refused (more rows than fit, an id that is none, bad logits) is said in a word and raised, on all ranks alike
and before anything is sent, at the start of the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.agreement.record import PHASES, digest, dtype_code
from moe_overlap.agreement.static_plan import Capacity, StaticExchange, StaticLayout, segments_of
from moe_overlap.errors import CapacityExceeded, ConfigError
from moe_overlap.ops.activation_kinds import is_gated
from moe_overlap.schedule.builders import SchedulePair, Schedules
from moe_overlap.schedule.dispatch import Dispatcher, Weights, with_marks
from moe_overlap.schedule.static_rows import MILLI, WORD, place
from moe_overlap.schedule.static_word import Watch
from moe_overlap.transport.base import Agreement
from moe_overlap.transport.closing import closing_on_error, closing_on_interrupt


@dataclass(frozen=True, kw_only=True)
class Known:
    """An agreement that needs nobody."""

    exchange: ExchangePlan

    def wait(self) -> ExchangePlan:
        return self.exchange

    def interval(self) -> tuple[float, float] | None:
        return None


@dataclass
class StaticDispatcher(Dispatcher):
    """capacity: see `StaticLayout`. most_bytes: the most that the row buffers of a forward may take; None: no limit."""

    capacity: Capacity = 1.0
    most_bytes: int | None = None
    layout: StaticLayout | None = field(default=None, init=False)  # of the last step
    _layouts: dict[object, StaticLayout] = field(default_factory=dict, init=False, repr=False)
    _agreed_in: int = field(default=0, init=False)
    _tokens: int = field(default=0, init=False)
    _watch: Watch | None = field(default=None, init=False, repr=False)
    _watched_in: int = field(default=0, init=False)
    _late: Exception | None = field(default=None, init=False, repr=False)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all buffers of a forward: sent, received, pre-activation, computed, returned."""
        return (4 * self.hidden + self.ffn_hidden * (2 if is_gated(self.activation) else 1)) * self.dtype.itemsize

    @property
    def says(self) -> str:
        """What the shapes of the last step were, in a line."""
        text = f"rows: fixed shapes (static), capacity {self.capacity}"
        if self.layout is None:
            return f"{text}: no step yet, or one rank and one chunk, whose rows always fit"
        rows = self.layout.send_rows
        return (f"{text}: {rows} rows for {self.layout.tokens * self.layout.top_k} choices, "
                f"{rows * self.row_bytes} bytes in the buffers of a forward")  # fmt: skip

    def begin(
        self,
        ids_TK: torch.Tensor,
        x_TD: torch.Tensor,
        schedule: Schedules,
        *,
        status: torch.Tensor | None = None,
        router_state: int = 0,
        common: Weights | None = None,
    ) -> Agreement:
        """As the base's, but that the host reads no value of ids_TK and status, and nothing is said but in the first
        step. Raises ConfigError for another number of tokens than in the first step."""
        phase = int(torch._C._current_graph_task_id() >= 0)
        self.open()
        first = self._agreed_in != self.openings
        try:
            marks = self._marks(common, ids_TK.device) if first else None
            layout = self._layout(ids_TK, schedule, first=first)
            if router_state and self.transport.world_size > 1:
                raise ConfigError("mode", "static", "'host' beside a router whose state the ranks agree on (replay)")
        except Exception as error:
            self.refuse(error, schedule)
        if first:
            self._agree(x_TD, schedule, layout, marks)
        else:
            self.steps += phase == 0
        grad = torch.is_grad_enabled()
        with closing_on_error(self.transport, "N"):
            placed = place(layout, self.placement.to_physical(ids_TK))
            if phase == 0:
                self._begin_word(placed.word, status)
        return Known(exchange=StaticExchange(
            rank=self.transport.rank, world_size=self.transport.world_size, step=self.steps, phase=PHASES[phase],
            grad_enabled=grad, x_requires_grad=grad, counts=layout.counts, ranks_per_node=self.ranks_per_node,
            layout=layout, key_TK=placed.key_TK, place_TK=placed.place_TK,
        ))  # fmt: skip

    def check_rule(self, rule: object) -> None:
        """Raises ConfigError: counts of a step are not known on the host, so nothing could be decided by them."""
        raise ConfigError("rule", type(rule).__name__, 'None beside mode="static", where no rank hears the counts')

    def refuse(self, error: BaseException, schedule: Schedules) -> NoReturn:
        """Raise `error`. In the first step all ranks hear of it, as ever; later there is no record that it could stand
        in, and the transport is closed. What came out of the last step all ranks know."""
        late, self._late = self._late, None
        if error is late:
            raise error
        if self._agreed_in == self.transport.openings and self.transport.world_size > 1:
            self.transport.close(f"rank {self.transport.rank}: {type(error).__name__}: {error}")
            raise error
        super().refuse(error, schedule)

    def note_choice(self, ids_TK: torch.Tensor, status: torch.Tensor) -> None:
        """The word of a step of one rank whose ops run in a row: every choice has a row."""
        bad = ((ids_TK < -1) | (ids_TK >= self.placement.num_experts)).any()
        self._begin_word(torch.stack([torch.zeros_like(bad)] * (WORD - 1) + [bad]).to(torch.int32), status)
        self.end_step()

    def end_step(self) -> None:
        """At the end of a forward that is no recompute."""
        if self._watch is not None:
            with closing_on_interrupt(self.transport):
                self._watch.end()

    def look_back(self) -> None:
        """Raises, on all ranks alike, what the steps before have left to be said: CapacityExceeded, or ConfigError.
        Does nothing in a backward and while a CUDA graph is captured. With several ranks collective after a failure."""
        if torch._C._current_graph_task_id() >= 0 or _capturing():
            return
        self.open()
        if self._watch is None:
            return
        self._watch_anew(self._watch)
        words = self._watch.read()
        if any(rows or bad or status for rows, _, bad, status in words):
            self._watch.clear()
            self._late = self._error(words)
            raise self._late

    def _error(self, words: list[list[int]]) -> Exception:
        """What was wrong before rows were counted comes first."""
        for rank, (_, _, bad, status) in enumerate(words):
            if bad:
                return ConfigError("topk_ids", f"an id out of range on rank {rank}", "expert ids from -1 to "
                                   f"{self.placement.num_experts - 1} (found after the step)")  # fmt: skip
            if status:
                return ConfigError("logits", status, "no row with NaN or +inf, none that is all -inf (or "
                                   f"bad_logits='drop'); found after the step, on rank {rank}")  # fmt: skip
        worst = max(range(len(words)), key=lambda rank: words[rank][1])
        rows = sum(word[0] for word in words)
        assert self.layout is not None
        held = sorted(set(self.layout.capacities.tolist()))
        return CapacityExceeded(
            f"{rows} choices found no row in a step before this one and were left out of its result: static_capacity = "
            f"{self.layout.capacity} has {' or '.join(map(str, held))} rows for the choices of one rank's segment of "
            f"tokens for one expert; static_capacity = {words[worst][1] / MILLI} would do",
            rank=self.transport.rank, peer=worst, step=self.steps,
        )  # fmt: skip

    def _watch_anew(self, watch: Watch) -> None:
        """After an opening. Of words of before it not all of several ranks may know. They stay in their place, to
        which the replays of CUDA graphs go on adding."""
        if self._watched_in != self.openings and self.transport.world_size > 1:
            watch.clear()
        self._watched_in = self.openings

    def _begin_word(self, word: torch.Tensor, status: torch.Tensor | None) -> None:
        if self._watch is None:
            self._watch, self._watched_in = Watch(self.transport), self.openings
        flag = word.new_zeros(1) if status is None else status.reshape(1).to(torch.int32)
        self._watch.begin(torch.cat([word, flag]), self.steps)

    def _agree(self, x_TD: torch.Tensor, schedule: Schedules, layout: StaticLayout, marks: torch.Tensor | None) -> None:
        """On what all steps have in common. Raises PlanMismatch alike on all ranks."""
        none = torch.zeros(BLOCKS, self.placement.num_experts, dtype=torch.int64)
        record = self._record(schedule, dtype_code(x_TD.dtype), x_TD.requires_grad, (none,), (0, 0))
        record = record if marks is None else with_marks(record, marks.tolist())
        how = digest(record.config_digest, layout.capacity)
        with closing_on_interrupt(self.transport):
            self.transport.agree(replace(record, static_tokens=layout.tokens, config_digest=how))
        self._agreed_in, self._tokens = self.openings, layout.tokens
        if self._watch is not None:
            self._watch_anew(self._watch)  # where nobody has looked back since

    def _layout(self, ids_TK: torch.Tensor, schedule: Schedules, *, first: bool) -> StaticLayout:
        """The layout of a step, made once. Raises ConfigError."""
        tokens, top_k = ids_TK.shape
        if not first and tokens != self._tokens:
            expected = f"{self._tokens}, the tokens of the first step: all ranks have as many in all steps"
            raise ConfigError("x.shape[0]", tokens, f'{expected} of mode="static"')
        assert isinstance(schedule, SchedulePair)
        segments = segments_of([(schedule.chunks, schedule.by), (schedule.backward_chunks, schedule.backward_by)])
        key = tokens, top_k, segments
        if (first or key not in self._layouts) and _capturing():
            expected = "a step before the capture, which makes what the graph holds"
            raise ConfigError("mode", "static, in a CUDA graph before its first step", expected)
        if key not in self._layouts:
            self._layouts[key] = self._make(tokens, top_k, segments)
        self.layout = self._layouts[key]
        return self.layout

    def _make(self, tokens: int, top_k: int, segments: tuple[int, ...]) -> StaticLayout:
        layout = StaticLayout(
            rank=self.transport.rank, world_size=self.transport.world_size, num_slots=self.placement.num_slots,
            tokens=tokens, top_k=top_k, capacity=self.capacity, segments=segments,
        )  # fmt: skip
        needed = layout.send_rows * self.row_bytes
        if self.most_bytes is not None and needed > self.most_bytes:
            expected = f"at least {needed}, what the rows of static_capacity = {self.capacity!r} take"
            raise ConfigError("max_in_flight_bytes", self.most_bytes, expected)
        return layout


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
