"""From a routing decision to an agreed plan: where a layer speaks to the other ranks before its rows do."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from moe_overlap.agreement.common import WORDS, fingerprint, is_compared
from moe_overlap.agreement.cost import GATHERED_RANKS
from moe_overlap.agreement.counts import BLOCKS, MOST, Said, block_counts, block_counts_of_rows, check_counts
from moe_overlap.agreement.header import WEIGHTS_AT, Header
from moe_overlap.agreement.plan import CHUNK_BY, ExchangePlan
from moe_overlap.agreement.record import DTYPES, NOT_SENT, REFUSALS, StepRecord, digest, dtype_code
from moe_overlap.agreement.seats import Seats, StepRule, seats_of
from moe_overlap.agreement.second_gather import gather_layout, gather_plan, pairs_of, with_pairs
from moe_overlap.errors import ConfigError
from moe_overlap.placement.placement import Placement
from moe_overlap.schedule.builders import Schedules
from moe_overlap.schedule.expert_copies import CopyStore
from moe_overlap.transport.base import Agreement, Transport
from moe_overlap.transport.closing import closing_on_error, closing_on_interrupt
from moe_overlap.transport.link import nodes_of

ACTIVATIONS = ("swiglu", "gelu", "relu")
WEIGHT_DTYPES = (torch.float32, torch.float64)
Weights = Callable[[], Iterable[torch.Tensor]]


def _activation_number(name: str) -> int:
    """What stands for an activation in a header: a registered one is compared by its name."""
    return ACTIVATIONS.index(name) if name in ACTIVATIONS else len(ACTIVATIONS) + zlib.crc32(name.encode())


def with_marks(record: StepRecord, marks: Sequence[int]) -> StepRecord:
    """The record with the words of a `fingerprint`."""
    norm, one, other = marks
    return replace(record, common_norm=norm, common_sum=one, common_other_sum=other)


def _said(status: torch.Tensor | None, marks: torch.Tensor | None) -> Said | None:
    """What the host wants to know of a step beside the counts."""
    asked = [one.reshape(-1) for one in (status, marks) if one is not None]
    with _disable_current_modes():  # in a recompute there are no marks
        return Said(torch.cat(asked) if len(asked) > 1 else asked[0]) if asked else None


def current_phase() -> int:
    """0 in a forward call, 1 in a recompute (a forward call from inside a backward).

    Raises ConfigError in the recompute of a reentrant checkpoint: its nested backward would run exchanges twice.
    """
    if torch._C._current_graph_task_id() < 0:
        return 0
    if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        raise ConfigError(
            "checkpoint",
            "use_reentrant=True",
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False): a reentrant checkpoint nests a backward in "
            "the backward",
        )
    return 1


def check_routing(
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    x_TD: torch.Tensor,
    *,
    dtypes: Sequence[torch.dtype] = (torch.int32,),
) -> None:
    """Raises ConfigError unless a router's choice fits the tokens (`block_counts` looks at the values of the ids).
    dtypes: those that ids may have, where others than int32 are cast later on."""
    # Nothing is printed before it is wrong: a size in a text is a number to torch.compile, no longer any number.
    device = x_TD.device
    known = ids_TK.dtype in dtypes
    if ids_TK.dim() != 2 or not known or ids_TK.device != device or ids_TK.shape[0] != x_TD.shape[0]:
        wanted = ids_TK.dtype if known else dtypes[0]
        raise ConfigError("topk_ids", _kind(ids_TK), f"{wanted} [{x_TD.shape[0]}, K] on {device}")
    if weights_TK.shape != ids_TK.shape or weights_TK.device != device or weights_TK.dtype not in WEIGHT_DTYPES:
        expected = f"torch.float32 or torch.float64 {tuple(ids_TK.shape)} on {device}"
        raise ConfigError("topk_weights", _kind(weights_TK), expected)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


class Completed:
    """An agreement of a deduplicated step (`Agreement`) that may need a second gather: where a rule gave it other seats
    than the rows were counted by."""

    def __init__(self, agreement: Agreement, transport: Transport, ids_TK: torch.Tensor) -> None:
        self._agreement, self._transport, self._ids_TK = agreement, transport, ids_TK

    def wait(self) -> ExchangePlan:
        """As `Agreement.wait`."""
        exchange = self._agreement.wait()
        if exchange.first is not None:
            return exchange
        with closing_on_error(self._transport, "N"):
            pairs = pairs_of(self._ids_TK, exchange)
            work = self._transport.start(pairs.expand(exchange.world_size, -1).contiguous(), gather_plan(exchange),
                                         gather_layout(exchange), action="N, second gather")  # fmt: skip
            said = work.wait().cpu()
        return with_pairs(exchange, said)

    def interval(self) -> tuple[float, float] | None:
        """As `Agreement.interval`: of the first gather."""
        return self._agreement.interval()


@dataclass
class Dispatcher:
    """Agrees on one layer's steps. Three things here change: `steps` counts its forward calls since the transport was
    opened, `probes` those of them that were a calibration's, `openings` how often that was. `caller` tells those apart
    that share a transport, copies of a layer too. `dedup`: a position in `record.DEDUP`; `ranks_per_node`: so many
    ranks in a row share a node (0: not known); `hierarchical`: one row for each (token, node) crosses nodes.
    `weights_at`: in `header.WEIGHTS_AT`, for the ranks to compare. `copy_store`: the copies that this rank has of other
    ranks' experts; `rule`: which copies there are in a step, decided when its counts are known."""

    transport: Transport
    placement: Placement
    hidden: int
    ffn_hidden: int
    top_k: int
    activation: str
    dtype: torch.dtype
    bad_logits: str = "raise"
    payload_dtype: torch.dtype | None = None
    steps: int = 0
    probes: int = 0
    openings: int = 0
    caller: int = 0
    copies: int = 0
    dedup: int = 0
    ranks_per_node: int = 0
    hierarchical: bool = False
    weights_at: str = "output"
    copy_store: CopyStore = field(default_factory=CopyStore)
    weights_require_grad: bool = False
    rule: StepRule | None = None
    _seats: Seats | None = field(default=None, init=False, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, object]) -> Dispatcher:
        """On the same transport, as another caller: ranks whose copies run in another order learn of it."""
        self.copies += 1
        return replace(self, caller=digest(self.caller, self.copies), copies=0, copy_store=CopyStore())

    @property
    def header(self) -> Header:
        return Header(
            num_experts=self.placement.num_experts,
            num_slots=self.seats.num_seats if self.dedup == 1 else self.placement.num_experts,
            hidden=self.hidden,
            ffn_hidden=self.ffn_hidden,
            top_k=self.top_k,
            weight_dtype=DTYPES.index(self.dtype) if self.dtype in DTYPES else -1,
            activation=_activation_number(self.activation),
            dedup=int(self.dedup == 1),
            nodes=self._counted_nodes,
            weights_at=WEIGHTS_AT.index(self.weights_at),
        )

    @property
    def seats(self) -> Seats:
        """Where the experts are."""
        if self._seats is None or self._seats.placement is not self.placement:
            self._seats = seats_of(self.placement)
        return self._seats

    @property
    def _counted_nodes(self) -> int:
        """Nodes that rows are counted for, where they cross nodes once."""
        return self.placement.world_size // self.ranks_per_node if self.hierarchical else 0

    def plan(self, ids_TK: torch.Tensor, x_TD: torch.Tensor, schedule: Schedules, *,
             status: torch.Tensor | None = None, common: Weights | None = None) -> ExchangePlan:  # fmt: skip
        """The agreed counts of one step: `begin` and `finish`."""
        return self.finish(self.begin(ids_TK, x_TD, schedule, status=status, common=common))

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
        """Tell all ranks what this one will send in a step; returns at once.

        ids_TK: integers [T, K], logical experts, -1 unused. x_TD: the rows' tensor (width, dtype, requires_grad).
        status: int32 [1] flag word of the router. router_state: see StepRecord. common: gives the weights that every
        rank has whole, which are compared in some steps (`is_compared`). Raises ConfigError alike on all ranks
        where this one refuses. What runs before `finish` has to be the same on all ranks, and stands in
        `closing_on_error`.
        """
        self.open()
        try:
            marks = self._marks(common, ids_TK.device)
            said = _said(status, marks)
            tables, rule = self._count(ids_TK, said), self._rule_under(schedule)
        except Exception as error:
            self.refuse(error, schedule)
        values = () if said is None else said.values
        flags = 0 if status is None else values[0]
        said_so = (1, flags) if flags else (0, 0)
        grad = x_TD.requires_grad
        record = self._record(schedule, dtype_code(x_TD.dtype), grad, tables, said_so, router_state, rule)
        record = record if marks is None else with_marks(record, values[-WORDS:])
        with closing_on_interrupt(self.transport):
            agreement = self.transport.begin_agree(record)
        return agreement if rule is None or self.dedup != 1 else Completed(agreement, self.transport, ids_TK)

    def finish(self, agreement: Agreement) -> ExchangePlan:
        """The plan, bounded. Raises ConfigError or PlanMismatch alike on all ranks."""
        with closing_on_interrupt(self.transport):
            return agreement.wait()

    def look_at_weights(self, *weights: torch.Tensor) -> None:
        """This rank's expert weights as a call reads them, where others have copies of them. Raises ConfigError for a
        rule that cannot act here."""
        if torch.compiler.is_compiling():
            return
        if self.rule is not None:
            self.check_rule(self.rule)
        if self.seats.has_copies or self.rule is not None:
            self.copy_store.look_at(*weights)
            self.weights_require_grad = any(weight.requires_grad for weight in weights)

    def check_rule(self, rule: object) -> None:
        """Raises ConfigError for what is no `StepRule`, and for one beside what it cannot act on."""
        if isinstance(rule, type) or not callable(rule) or not hasattr(rule, "digest"):
            name = rule.__name__ if isinstance(rule, type) else type(rule).__name__
            raise ConfigError("rule", name, "None, or a rule: ReplicationRule(...) or ParallelismSwitch(...)")
        if self.hierarchical or self.placement.world_size > GATHERED_RANKS:
            expected = "None beside hierarchical exchanges, or with more than "
            raise ConfigError("rule", type(rule).__name__,
                              f"{expected}{GATHERED_RANKS} ranks, of which no rank hears all counts")  # fmt: skip
        known = self.ranks_per_node or 1
        nodes = getattr(rule, "ranks_per_node", known)
        if nodes != known:
            expected = "as the layer has" if self.ranks_per_node else "as the layer does not know its nodes"
            raise ConfigError("rule.ranks_per_node", nodes, f"{known}, {expected} (MoELayer(ranks_per_node=))")

    def _rule_under(self, schedule: Schedules) -> StepRule | None:
        """The rule of a step that runs what `schedule` says, from which it may have its prices; none on one rank."""
        if self.transport.world_size == 1:
            return None
        under = getattr(self.rule, "under", None)
        return self.rule if under is None else under(schedule, grad=torch.is_grad_enabled())

    def _marks(self, common: Weights | None, device: torch.device) -> torch.Tensor | None:
        """`fingerprint` of these weights, where the step that begins compares them."""
        if common is None or self.transport.world_size == 1 or torch._C._current_graph_task_id() >= 0:
            return None
        return fingerprint(common(), device) if is_compared(self.steps + 1 - self.probes) else None

    def end_step(self) -> None:
        """At the end of a forward that is no recompute: everything was agreed on."""

    def refuse(self, error: BaseException, schedule: Schedules) -> NoReturn:
        """Tell all ranks that this one cannot take part in the step, then raise `error`; the peers raise its like. An
        interrupt waits for nobody: it closes the transport."""
        if not isinstance(error, Exception):
            self.transport.close(f"rank {self.transport.rank}: {type(error).__name__}")
            raise error
        fields = {field: code for code, (field, _) in REFUSALS.items()}
        code, value = fields["x"], NOT_SENT
        if isinstance(error, ConfigError):
            code = fields.get(error.field, code)
            if isinstance(error.value, int):
                value = max(-(1 << 61), min(error.value, 1 << 61))
            elif isinstance(error.value, torch.dtype) and error.value in DTYPES:
                value = DTYPES.index(error.value)
        try:
            with temporarily_clear_interpreter_stack():  # also where a transform of torch.func is what is refused
                counts = torch.zeros(BLOCKS, self.placement.num_experts, dtype=torch.int64)
                self.transport.agree(self._record(schedule, 0, False, (counts,), (code, value)))
        except ConfigError:
            # All ranks raise; this one knows more about the cause than the record could carry.
            raise error from None
        raise AssertionError("a refused step cannot be agreed on")

    def _count(self, ids_TK: torch.Tensor, said: Said | None) -> tuple[torch.Tensor, ...]:
        """The record's counts, where rows are deduplicated `first` and `last` too, and then perhaps `node_rows`."""
        ends: list[torch.Tensor] = []
        if self.dedup == 1:
            seats, seats_TK = self.seats, self.seats.of_ids(ids_TK, self.transport.rank)
            counts, *ends = block_counts_of_rows(seats_TK, seats.num_seats, seats.world_size, self._counted_nodes, said)
            counts = seats.by_expert(counts)
        else:
            counts = block_counts(ids_TK, self.placement.num_experts, said)
        if ids_TK.numel() > MOST:
            check_counts(counts)
        return counts, *ends

    def _record(
        self,
        schedule: Schedules,
        dtype: int,
        x_requires_grad: bool,
        tables: tuple[torch.Tensor, ...],
        status: tuple[int, int],
        router_state: int = 0,
        rule: StepRule | None = None,
    ) -> StepRecord:
        phase = int(torch._C._current_graph_task_id() >= 0)
        self.open()
        self.steps += phase == 0
        grad = torch.is_grad_enabled()
        return StepRecord(
            step=self.steps,
            phase=phase,
            status=status[0],
            status_value=status[1],
            grad_enabled=int(grad),
            x_requires_grad=int(grad and x_requires_grad),
            chunks=schedule.chunks,
            chunk_by=CHUNK_BY.index(schedule.by),
            dtype=dtype,
            hidden=self.hidden,
            top_k=self.top_k,
            placement_epoch=self.placement.epoch,
            config_digest=digest(
                self.activation,
                self.bad_logits,
                self.ffn_hidden,
                self.placement.digest,
                self.payload_dtype,
                0 if rule is None else rule.digest,  # a refused step says so with any rule
            ),
            schedule_digest=schedule.digest,
            counts=tables[0],
            first=tables[1] if len(tables) > 1 else None,
            last=tables[2] if len(tables) > 1 else None,
            node_rows=tables[3] if len(tables) > 3 else None,
            dedup=self.dedup,
            ranks_per_node=self.ranks_per_node,
            hierarchical=int(self.hierarchical),
            router_state=router_state,
            weight_version=self.copy_store.version,
            weights_require_grad=int(grad and self.weights_require_grad),
            caller=self.caller,
            seats=None if self.seats.are_slots and self.placement.is_identity and rule is None else self.seats,
            rule=rule,
            nodes=nodes_of(self.transport),
        )

    def open(self) -> None:
        """Open the transport, unless it is; steps count from there. When a step fails, one rank may have begun the next
        one already, so that the ranks' counts differ; only an opening, which all ranks do together, makes them equal.
        """
        try:
            self.transport.open(self.header)
        except ConfigError as error:
            self.transport.close(str(error))  # open for another configuration: the peers wait in their step's record
            raise
        if self.openings != self.transport.openings:  # by this layer, or by another one on the same transport
            self.steps = self.probes = 0
            self.copy_store.forget()
            self.openings = self.transport.openings
