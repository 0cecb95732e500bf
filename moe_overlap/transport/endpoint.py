"""What every transport that moves bytes itself shares: its life, the checks, the counting, what ranks agree on."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from moe_overlap.agreement.agree import Exchanged, agree_on
from moe_overlap.agreement.cost import GATHERED_RANKS, record_capacity
from moe_overlap.agreement.counts import BLOCKS, MOST
from moe_overlap.agreement.header import HEADER_WORDS, Header, difference
from moe_overlap.agreement.message import HEAD_WORDS, described, message, odd_one
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.agreement.record import BACKWARD_FIELDS, BackwardRecord, StepRecord, compare, digest
from moe_overlap.config import TIMEOUT_S, check_environment
from moe_overlap.errors import ConfigError, MoeTransportError, PlanMismatch, TransportClosed
from moe_overlap.transport.base import Agreement, Announcement, TransportStats, Work
from moe_overlap.transport.exchange import Exchange
from moe_overlap.transport.speaker import Speaker, Words
from moe_overlap.transport.where import Where
from moe_overlap.transport.work import DoneWork

SHORTEST_S, LONGEST_S = 1e-3, 1e7  # of a limit; the libraries below count in milliseconds
REOPENED = "the transport was reopened"  # the reason with which it closes
E = TypeVar("E", bound=BaseException)


@dataclass(eq=False, kw_only=True)
class Life:
    """What transports that share connections have in common. `cause`: what poisoned them; `ended`: for good;
    `generation`: how often they were renewed; `capacity`: words that a message has room for, which grows when a layer
    with more experts is opened; `paths`: what layers are called, by the numbers of their transports; `asked`: the
    agreement that has to be waited for before anything else is said; `ranks`: those of the job, where the group has
    others than all in order."""

    cause: BaseException | None = None
    ended: bool = False
    generation: int = 0
    capacity: int = HEADER_WORDS
    paths: dict[int, str] = field(default_factory=dict)
    asked: object = None
    ranks: tuple[int, ...] = ()

    def poison(self, cause: BaseException) -> None:
        """The first cause stays. What errors say of ranks counts within the group: a note says which those are."""
        note = f"the ranks of this group, from 0, are ranks {', '.join(map(str, self.ranks))} of the job"
        if self.ranks and isinstance(cause, MoeTransportError) and note not in getattr(cause, "__notes__", ()):
            cause.add_note(note)
        if self.cause is None:
            self.cause = cause

    def renew(self) -> None:
        self.cause, self.capacity, self.asked = None, HEADER_WORDS, None
        self.generation += 1

    def name_of(self, layer: int, caller: int) -> str:
        """What a layer is called in an error."""
        name = f"layer {self.paths[layer]!r}" if layer in self.paths else f"layer number {layer} of its group"
        return f"a copy of {name}, or another user of its transport" if caller else name


class Asked:
    """The record of a step, said to all ranks."""

    def __init__(self, transport: Endpoint, words: Words, record: StepRecord) -> None:
        self._transport, self._words, self._record = transport, words, record
        self._generation = transport.life.generation

    def wait(self) -> ExchangePlan:
        """Once. Raises ConfigError or PlanMismatch alike on all ranks."""
        self._transport._require_begun_in(self._generation, Where(action="N", step=self._record.step))
        return self._transport._agree(self._words.wait(), self._record)

    def interval(self) -> None:
        """Nobody looks when the words of the others come."""
        return None


class Beginning:
    """The start of a backward, said to all ranks. Nothing may be exchanged before `wait` has returned."""

    def __init__(self, transport: Endpoint, words: Words, record: BackwardRecord) -> None:
        self._transport, self._words, self._record = transport, words, record
        self._generation = transport.life.generation

    def wait(self) -> None:
        """Raises PlanMismatch alike on all ranks where they run other backwards."""
        self._transport._require_begun_in(self._generation, Where(action="Ut", step=self._record.step))
        self._transport._compare_backwards(self._words.wait(), self._record)


class Endpoint(Speaker):
    """One rank's end of a transport: usable until an error, then poisoned until `reopen`.

    The public methods of the contract (`base.py`) are here. A transport says how words are gathered (`_send`), rows
    moved (`_move`) and tensors summed (`_all_reduce`), and adds what is its own to `close` and `_renew`. Those that
    share connections share a `life`; `number` tells them apart.
    """

    name = "transport"
    gathered_ranks = GATHERED_RANKS  # with more ranks, counts go to those whom they concern; before `open`
    group: Any = None  # the group of torch.distributed whose ranks these are
    _device_type: str | None = None  # where rows must be; None: anywhere

    def __init__(
        self, *, rank: int, world_size: int, timeout_s: float | None, life: Life | None = None, number: int = 0
    ) -> None:
        check_environment()
        self.rank = rank
        self.world_size = world_size
        self.global_ranks = tuple(range(world_size))
        self.timeout_s = checked_timeout(timeout_s)
        self.stats = TransportStats()
        self.life = life or Life()
        self.number = number
        self.openings = 0
        self._users = 0
        self._header: Header | None = None
        self._opened_in = -1

    @property
    def exchange_sms(self) -> int:
        return 0

    def open(self, header: Header) -> bool:
        if self._is_open_for(header):
            return False
        table = self._said("open", self._header_words(header), Where(action="open"))
        different = (table != table[0]).any(dim=1).nonzero()
        if len(different):
            odd = int(different[0])
            named = difference(table, odd)
            text = f"rank {odd} opened this transport for another configuration than rank 0 ({named}); nothing was sent"
            peer = odd if odd != self.rank else 0
            raise self._poisoned(PlanMismatch(text, rank=self.rank, peer=peer, action="open"))
        self._header, self._opened_in = header, self.life.generation
        needed = record_capacity(
            header.num_experts, header.num_slots, header.dedup, ranks=self.world_size, nodes=header.nodes,
            gathered=self._gathers,
        )  # fmt: skip
        self.life.capacity = max(self.life.capacity, needed)
        self.openings += 1
        return True

    def agree(self, record: StepRecord) -> ExchangePlan:
        return self.begin_agree(record).wait()

    def begin_agree(self, record: StepRecord) -> Agreement:
        words = self._require_record(record)
        where = Where(action="N", step=record.step)
        asked = Asked(self, self._say("forward", words, where, record.caller), record)
        if not self._gathers:
            self.life.asked = asked
        return asked

    def begin_backward(self, record: BackwardRecord) -> Announcement:
        self._require_usable()
        self._require_nothing_asked()
        where = Where(action="Ut", step=record.step)
        words = self._say("backward", record.to_tensor(), where, record.caller)
        if not self._gathers:
            words = DoneWork(words.wait())  # a recompute may agree before this is waited for
        return Beginning(self, words, record)

    def gather(self, words: torch.Tensor, where: Where) -> torch.Tensor:
        """int64 [n] of every rank, as [W, n]; n must be equal on all ranks. Bounded; the host waits."""
        self._require_usable()
        self._require_nothing_asked()
        return self._said("gather", words, where)

    def start(
        self,
        rows: torch.Tensor,
        plan: ChunkPlan,
        layout: RowLayout,
        chunk: int = 0,
        *,
        reverse: bool = False,
        out: torch.Tensor | None = None,
        action: str = "D",
    ) -> Work:
        self._require_startable()
        if not 0 <= chunk < plan.chunks:
            raise self._refusing(ConfigError("chunk", chunk, f"an integer from 0 to {plan.chunks - 1}"))
        send_rows, recv_rows = map(sum, plan.counts(chunk, reverse=reverse))
        if not _fits(rows, send_rows, layout):
            raise self._refusing(ConfigError("rows", _describe(rows), _expected(send_rows, layout)))
        if out is not None and not _fits(out, recv_rows, layout):
            raise self._refusing(ConfigError("out", _describe(out), _expected(recv_rows, layout)))
        if self._device_type is not None and rows.device.type != self._device_type:
            expected = f"a tensor on {self._device_type}: {self.name} moves no other (copy it first, or use NCCL)"
            raise self._refusing(ConfigError("rows.device", rows.device, expected))
        if self._stays(plan, chunk):
            self.stats.exchanges += 1
            return DoneWork(rows if out is None else out.copy_(rows))
        if out is None:
            out = rows.new_empty(recv_rows, layout.width)
        return self._move(Exchange(rows, plan, layout, chunk, reverse, out, action), out)

    def all_reduce(self, tensor: torch.Tensor, *, action: str = "R") -> Work:
        """The sum of `tensor` over the ranks, in place. Equal shape and dtype on all ranks are the caller's duty."""
        self._require_usable()
        where = Where(action=action)
        if self.world_size > 1:
            self._require_nothing_asked()
            said = torch.tensor([tensor.numel(), digest(tensor.dtype)], dtype=torch.int64)
            table = self._said("all_reduce", said, where)
            if (table != table[0]).any():
                raise self._poisoned(PlanMismatch("the ranks reduce different tensors", rank=self.rank, action=action))
        return self._all_reduce(tensor, where)

    def close(self, reason: str) -> None:
        self.life.poison(RuntimeError(reason))

    def reopen(self) -> None:
        self.close(REOPENED)
        self._renew()

    def join(self) -> int:
        self._users += 1
        return self._users - 1

    def call_it(self, path: str) -> None:
        """What the layer of this transport is called in a model, for errors."""
        self.life.paths[self.number] = path

    @abstractmethod
    def _send(self, message: torch.Tensor, where: Where) -> Words:
        """Start to gather a message of every rank."""

    @abstractmethod
    def _move(self, exchange: Exchange, out: torch.Tensor) -> Work:
        """Count a checked exchange (`_count_rows`) and move its rows into `out`. Returns at once."""

    @abstractmethod
    def _all_reduce(self, tensor: torch.Tensor, where: Where) -> Work:
        """`all_reduce` on a transport that is usable."""

    def _renew(self) -> None:
        """What is left of `reopen` on a transport that is closed."""
        self.life.renew()

    def _stays(self, plan: ChunkPlan, chunk: int) -> bool:
        """Whether no row of the chunk leaves its rank, on any rank: nothing is moved then, and nobody waited for."""
        return plan.stays_local[chunk]

    def _say(self, kind: str, words: torch.Tensor, where: Where, caller: int = 0) -> Words:
        """Start to tell all ranks."""
        step = -1 if where.step is None else where.step
        said = message(kind, words, layer=self.number, caller=caller, step=step, capacity=self.life.capacity)
        if self._gathers:
            return self._send(said, where)
        self._count_agreement(where)
        return self._to_all(said, where)

    def _said(self, kind: str, words: torch.Tensor, where: Where, caller: int = 0) -> torch.Tensor:
        """Tell all ranks; what each one said, int64 [W, n]. Raises PlanMismatch where they talk about other things."""
        table = self._say(kind, words, where, caller).wait()
        self._require_same_subject(table, where)
        return table[:, HEAD_WORDS : HEAD_WORDS + words.numel()]

    def _require_same_subject(self, table: torch.Tensor, where: Where) -> None:
        odd = odd_one(table)
        if odd is not None:
            doing = [described(table[rank], self.life.name_of) for rank in (0, odd)]
            text = f"rank 0 is {doing[0]}, rank {odd} {doing[1]}; nothing was sent"
            peer = odd if odd != self.rank else 0
            raise self._poisoned(PlanMismatch(text, rank=self.rank, peer=peer, **where._asdict()))

    @property
    def _gathers(self) -> bool:
        return self.world_size <= self.gathered_ranks

    def _header_words(self, header: Header) -> torch.Tensor:
        return header.to_tensor(world_size=self.world_size, gathered_ranks=self.gathered_ranks)

    def _agree(self, table: torch.Tensor, record: StepRecord) -> ExchangePlan:
        """From what all ranks said, and what they say further, to the plan."""
        where = Where(action="N", step=record.step)
        self.life.asked = None
        self._require_same_subject(table, where)
        said = table[:, HEAD_WORDS:]
        assert self._header is not None
        try:
            if self._gathers:
                slots = self._header.num_slots
                return agree_on(said, rank=self.rank, num_slots=slots, seats=record.seats, rule=record.rule)
            mine = Exchanged(record, compare(said, rank=self.rank), rank=self.rank)
            mine.hear(self._to_each(mine.parts(), where))
            return mine.plan(*self._reduced(mine.sums(), mine.most(), where))
        except PlanMismatch as error:
            self._poisoned(error)
            raise

    def _require_nothing_asked(self) -> None:
        """Exchanged counts take several messages, of which all but the first come when the plan is waited for: nothing
        else may be said before. Gathered ones take one, which may be answered whenever."""
        if self.life.asked is not None:
            text = "a step whose plan nobody has waited for"
            raise self._refusing(ConfigError("transport", text, "wait() of begin_agree before anything else is said"))

    def _compare_backwards(self, table: torch.Tensor, record: BackwardRecord) -> None:
        where = Where(action="Ut", step=record.step)
        self._require_same_subject(table, where)
        said = table[:, HEAD_WORDS : HEAD_WORDS + len(BACKWARD_FIELDS)]
        different = (said != said[0]).nonzero()
        if len(different):
            odd, column = (int(n) for n in different[0])
            name = self.life.name_of(self.number, record.caller)
            values = f"rank 0 has {int(said[0, column])}, rank {odd} has {int(said[odd, column])}"
            text = (
                f"the ranks run different backwards of {name}: they disagree about {BACKWARD_FIELDS[column]}: {values}"
            )
            peer = odd if odd != self.rank else 0
            raise self._poisoned(
                PlanMismatch(f"{text}; nothing was sent", rank=self.rank, peer=peer, **where._asdict())
            )

    @property
    def _cause(self) -> BaseException | None:
        return self.life.cause

    def _require_startable(self) -> None:
        """Raises what forbids any `start`, before its arguments are looked at."""
        if self.life.cause is not None:
            self._require_usable()

    def _require_usable(self) -> None:
        cause = self.life.cause
        if cause is not None:
            raise TransportClosed(
                f"this transport failed or was closed before ({cause}); reopen() it on all ranks", rank=self.rank
            ) from cause

    def _require_begun_in(self, generation: int, where: Where) -> None:
        """For what is waited for: raises TransportClosed where this transport is not what it was begun on."""
        self._require_usable()
        if generation != self.life.generation:
            text = "the transport was reopened since this began"
            raise TransportClosed(text, rank=self.rank, **where._asdict())

    def _is_void(self, generation: int) -> bool:
        """Whether `_require_begun_in` would raise: nobody needs to wait to learn of it."""
        return self.life.cause is not None or generation != self.life.generation

    def _is_open_for(self, header: Header) -> bool:
        """Whether it is open for `header` already. Raises ConfigError when it is open for another one."""
        self._require_usable()
        is_open = self._header is not None and self._opened_in == self.life.generation
        if is_open and self._header != header:
            raise ConfigError("header", header, f"the header this transport is open for, {self._header}")
        return is_open

    def _require_record(self, record: StepRecord) -> torch.Tensor:
        """The words of `record`, whose length must be the one that the header fixed."""
        self._require_usable()
        self._require_nothing_asked()
        if self._header is None or self._opened_in != self.life.generation:
            raise self._refusing(ConfigError("transport", self.name, "a transport that open(header) was called on"))
        tables = [one for one in record.tables if one is not record.node_rows]
        shapes = [(BLOCKS, self._header.num_experts), *[(BLOCKS, self._header.num_slots)] * (len(tables) - 1)]
        for table, shape in zip(tables, shapes, strict=True):
            if tuple(table.shape) != shape or table.dtype not in (torch.int64, torch.int32):
                given = (tuple(table.shape), table.dtype)
                raise self._refusing(ConfigError("record.counts", given, f"int64 {shape}"))
            if table.dtype == torch.int64 and int(table.max()) > MOST:
                raise self._refusing(ConfigError("record.counts", int(table.max()), f"at most {MOST}"))
        node_shape = None if record.node_rows is None else tuple(record.node_rows.shape)
        of_header = (2, BLOCKS, self._header.nodes * self._header.num_slots // self.world_size)
        if node_shape not in (None, of_header) or (record.status == 0 and record.hierarchical and node_shape is None):
            expected = f"{of_header}, of the {self._header.nodes} nodes of the header"
            raise self._refusing(ConfigError("record.node_rows", node_shape, expected))
        # A refusal need not count.
        most = _tables(self._header.dedup)
        if len(tables) > most or (record.status == 0 and len(tables) != _tables(record.dedup)):
            text = f"{len(tables)} tables with dedup={record.dedup}"
            expected = f"3 with dedup=1, else 1, and at most the {most} of the header"
            raise self._refusing(ConfigError("record.first", text, expected))
        return record.to_tensor() if self._gathers else record.named_fields

    def _count_words(self, words: torch.Tensor, where: Where) -> None:
        """Called by `_send`: a network counts what it is about to send, virtual ranks what has arrived."""
        self._count_agreement(where)
        self.stats.meta_bytes += words.nbytes * (self.world_size - 1)

    def _count_agreement(self, where: Where) -> None:
        self.stats.agreements += where.action == "N"

    def _count_parts(self, parts: torch.Tensor) -> None:
        """Called by `_swap`, likewise."""
        self.stats.meta_bytes += parts[1:].nbytes

    def _count_rows(self, exchange: Exchange, send: tuple[int, ...]) -> None:
        """Called by `_move`, which alone knows when nothing forbids the exchange any longer."""
        self.stats.exchanges += 1
        sent = (exchange.rows.shape[0] - send[self.rank]) * exchange.layout.row_bytes
        across = exchange.plan.exchange.off_node(send) * exchange.layout.row_bytes
        if exchange.layout.weights:
            self.stats.weight_bytes += sent
        elif exchange.layout.metadata:
            self.stats.row_meta_bytes += sent
            self.stats.inter_node_meta_bytes += across
        else:
            self.stats.payload_bytes += sent
            self.stats.inter_node_bytes += across

    def _refusing(self, error: ConfigError) -> ConfigError:
        """A mistake of this rank alone: the peers learn of it before it is raised here."""
        self.close(str(error))
        return error

    def _poisoned(self, error: E) -> E:
        """An error that every rank raises by itself: nothing to tell, and the connections must stay until all have."""
        self.life.poison(error)
        return error


def checked_timeout(timeout_s: float | None) -> float:
    """Seconds; None means the environment's default. Raises ConfigError for what no wait can have."""
    if timeout_s is None:
        return TIMEOUT_S.read()
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not number or not SHORTEST_S <= timeout_s <= LONGEST_S:
        raise ConfigError("timeout_s", timeout_s, f"a finite number of seconds from {SHORTEST_S:g} to {LONGEST_S:g}")
    return float(timeout_s)


def _tables(dedup: int) -> int:
    """How many tables of counts a record has."""
    return 3 if dedup == 1 else 1


def _fits(tensor: torch.Tensor, count: int, layout: RowLayout) -> bool:
    return tensor.dtype == layout.dtype and tensor.shape == (count, layout.width) and tensor.is_contiguous()


def _expected(count: int, layout: RowLayout) -> str:
    return f"contiguous {layout.dtype} {(count, layout.width)}"


def _describe(tensor: torch.Tensor) -> str:
    contiguous = "contiguous" if tensor.is_contiguous() else "non-contiguous"
    return f"{contiguous} {tensor.dtype} {tuple(tensor.shape)}"
