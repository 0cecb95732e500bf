"""The contract of every transport: agree on a step's counts, then move rows.

A transport belongs to one layer configuration. Its life: open (a header of fixed length is compared on all ranks),
then for every step one `agree` and any number of `start`s, issued in the same order on all ranks. `start` returns at
once; `Work.wait` returns the rows or raises within its limit. A refusal that travelled in the record (a ConfigError,
alike on all ranks) leaves the transport usable. After any other error it is poisoned, a mistake in the arguments of one
rank included, of which the peers learn at once: every later call raises TransportClosed from the first cause;
`reopen()`, called on all ranks, makes it usable again.

`Endpoint` (endpoint.py) is the base of the transports that move bytes, `Wrapper` (wrapper.py) of those around another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from moe_overlap.agreement.header import Header
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.agreement.record import BackwardRecord, StepRecord


@dataclass
class TransportStats:
    """Counters since the transport was made. `payload_bytes`: rows sent to other ranks; `row_meta_bytes`: ids and
    weights beside them, and their gradients; `inter_node_bytes` and `inter_node_meta_bytes`: of these two what goes to
    other nodes, where the plan knows them; `weight_bytes`: of copies of experts, and their gradients; `meta_bytes`:
    headers, records and stamps sent to other ranks; `exchanges`: calls of `start`; `agreements`: calls of `agree`."""

    payload_bytes: int = 0
    row_meta_bytes: int = 0
    inter_node_bytes: int = 0
    inter_node_meta_bytes: int = 0
    weight_bytes: int = 0
    meta_bytes: int = 0
    exchanges: int = 0
    agreements: int = 0


class Work(Protocol):
    """An exchange under way. It holds its buffers until it has been waited for or the transport closed.

    One that can tell whose rows came last, once waited for, has a method `last_sender() -> int` (this rank, where its
    own bytes took longest to leave); so may an Agreement."""

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        """The received rows. On CUDA the current stream waits, not the host. Raises a MoeTransportError in time."""

    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once: True after `close` and `reopen`, as it raises then."""

    def interval(self) -> tuple[float, float] | None:
        """(start_s, end_s) on the time.perf_counter clock during which the bytes were under way, once waited for."""


class Agreement(Protocol):
    """The record of a step, said to all ranks."""

    def wait(self) -> ExchangePlan:
        """The plan, once; bounded. Raises ConfigError or PlanMismatch alike on all ranks."""

    def interval(self) -> tuple[float, float] | None:
        """(start_s, end_s) on the time.perf_counter clock during which it was under way, once waited for; None: not
        known."""


class Announcement(Protocol):
    """The start of a backward, said to all ranks."""

    def wait(self) -> None:
        """Until all ranks have said the same. Raises PlanMismatch."""


@runtime_checkable
class Transport(Protocol):
    """Bytes between ranks. No routing, no arithmetic. `global_ranks`: the process's rank of each rank, in order."""

    name: str
    rank: int
    world_size: int
    global_ranks: tuple[int, ...]
    timeout_s: float

    @property
    def stats(self) -> TransportStats:
        """Counted by the transport that moves the bytes: one that wraps another has that one's."""

    @property
    def openings(self) -> int:
        """How often it was opened: steps count from there."""

    @property
    def group(self) -> Any:
        """The ProcessGroup of its ranks; None where they are not those of torch.distributed."""

    @property
    def exchange_sms(self) -> int:
        """Multiprocessors of the device that an exchange may take; 0: none, or it is not limited."""

    def open(self, header: Header) -> bool:
        """Compare `header` on all ranks; called by the layer before its first step, and again after `reopen`.

        Returns whether it was opened now; False where it is open for an equal header already. Raises PlanMismatch alike
        on all ranks where headers differ, ConfigError when the transport is already open for another configuration.
        """

    def agree(self, record: StepRecord) -> ExchangePlan:
        """`begin_agree`, waited for."""

    def begin_agree(self, record: StepRecord) -> Agreement:
        """Tell all ranks what a step will be; returns at once. Its `wait` gives the plan that follows from the records
        of all. Other work may be done in between; on many ranks (`agreement/cost.py`) nothing else may be said."""

    def begin_backward(self, record: BackwardRecord) -> Announcement:
        """Tell all ranks which backward begins; returns at once. Raises PlanMismatch from its `wait`, alike on all
        ranks, where they begin other ones: so `wait` stands before the first exchange."""

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
        """Send `rows` [sum(plan.send_counts[chunk]), width], grouped by destination rank; receive
        [sum(plan.recv_counts[chunk]), width], grouped by source rank, into `out` where given.

        `reverse=True` is the adjoint and swaps the two lists. `action` (e.g. "D0") appears in errors. Returns at once.
        """

    def all_reduce(self, tensor: torch.Tensor, *, action: str = "R") -> Work:
        """The sum of `tensor` over the ranks, in place. Equal shape and dtype on all ranks are the caller's duty."""

    def join(self) -> int:
        """The number of one more user of this transport, from 0: ranks whose users differ in order learn of it."""

    def call_it(self, path: str) -> None:
        """What the layer of this transport is called in a model: for errors."""

    def close(self, reason: str) -> None:
        """Poison the transport and tell the peers, whose waits then raise RemoteAbort with `reason`. Never raises. One
        that has failed already says nothing: the peers know, or raise alike what they have not heard yet."""

    def reopen(self) -> None:
        """A fresh transport under the same object, in whatever state it was; collective over all ranks of the group.

        One that is usable closes first: peers that still wait learn of it (RemoteAbort). What began before is void:
        `wait` of an exchange, an agreement or an announcement raises TransportClosed and leaves the fresh transport
        usable; rows that were there already (waited for before, or over when they began) stay. Then comes `open`."""
