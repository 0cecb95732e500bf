"""What ranks tell each other beside the data: who they are, why one of them stopped, where each of them waits.

A few short text keys in the key-value store of torch.distributed, under a prefix of the transport's own. Text is parsed
here and nowhere trusted further. Every question to the store has a limit of its own, because a store whose host is
stopped never answers and never fails: it is asked from a short-lived thread, and given up when that does not return.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from moe_overlap.errors import MoeTransportError, PeerFailed, RemoteAbort, TransportTimeout
from moe_overlap.transport.where import Where

SEPARATOR = "\x1f"
TEXT_LIMIT = 400
ASK_LIMIT_S = 2.0  # of one question to the store, beside a wait that has a limit of its own

T = TypeVar("T")

CLOSED, TIMED_OUT, PEER_GONE = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Abort:
    """Why the transport is over: the first rank to write it decides for all. `peer` is the rank it blames, or -1."""

    code: int
    rank: int
    peer: int
    text: str

    def to_text(self) -> str:
        text = self.text.replace(SEPARATOR, " ")[:TEXT_LIMIT]
        return SEPARATOR.join([str(self.code), str(self.rank), str(self.peer), text])

    @staticmethod
    def from_text(text: str) -> Abort:
        try:
            code, rank, peer, reason = text[: TEXT_LIMIT + 100].split(SEPARATOR, 3)
            return Abort(code=int(code), rank=int(rank), peer=int(peer), text=reason)
        except ValueError:
            return Abort(code=CLOSED, rank=-1, peer=-1, text="an unreadable abort message")

    def error_on(self, rank: int, where: Where, seconds: float) -> MoeTransportError:
        """The error that this abort means on `rank`, which was busy with `where`."""
        about: dict[str, Any] = {"rank": rank, "seconds": seconds, **where._asdict()}
        if self.code == CLOSED:
            return RemoteAbort(f"rank {self.rank} closed the transport: {self.text}", peer=self.rank, **about)
        if self.peer == rank:
            return RemoteAbort(f"rank {self.rank} gave up on this rank: {self.text}", peer=self.rank, **about)
        kind = PeerFailed if self.code == PEER_GONE else TransportTimeout
        return kind(f"rank {self.rank} reports: {self.text}", peer=None if self.peer < 0 else self.peer, **about)


class StoreLost(RuntimeError):
    """The key-value store is gone or does not answer."""


class ControlPlane:
    """The keys of one generation of the connections of a group; `meet` says which."""

    def __init__(self, store: dist.Store, *, rank: int, world_size: int) -> None:
        self._store = store
        self._generation = 0
        self._rank = rank
        self._peers = [peer for peer in range(world_size) if peer != rank]
        self._who: dict[int, tuple[str, int, int]] = {}
        self._lost: str | None = None
        self._meeting_until = 0.0  # on the clock time.monotonic; 0: over

    @property
    def lost(self) -> str | None:
        """Why the store can no longer be asked; None while it can."""
        return self._lost

    def meet(self, generation: int, timeout_s: float, *, again: bool = False) -> int:
        """Tell who this rank is and wait until all ranks have. Raises naming those that did not come.

        Returns the generation that all ranks meet in: the latest that any of them asks for, since ranks may have tried
        to meet a different number of times. `again`: a meeting that a peer gave up is followed by the next one. Here
        the store is all that is waited for, so a question to it may take what is left of the limit.
        """
        begin = time.monotonic()
        self._meeting_until = begin + timeout_s
        where = Where(action="connect")
        self._come(generation, where)
        pause_s = 0.001
        while True:
            keys = [self._key(f"who/{peer}") for peer in self._peers]
            here = not keys or self._must(lambda keys=keys: self._store.check(keys), where)  # type: ignore[misc]
            latest = self._latest(where)
            if latest > self._generation:
                self._come(latest, where)
                continue
            waited = time.monotonic() - begin
            abort = self.read_abort()
            if abort is not None and again and waited <= timeout_s:
                self._come(self._generation + 1, where)
                continue
            if abort is not None:
                raise abort.error_on(self._rank, where, waited)
            if here:
                break
            if waited > timeout_s:
                missing = [peer for peer in self._peers if not self._must(self._checker(f"who/{peer}"), where)]
                peer = missing[0] if missing else None
                text = f"no sign of {ranks_text(missing)} within {timeout_s:.3f} s"
                self.abort(Abort(code=TIMED_OUT, rank=self._rank, peer=-1 if peer is None else peer, text=text))
                raise TransportTimeout(text, rank=self._rank, peer=peer, seconds=waited, action="connect")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
        for peer in self._peers:
            self._who[peer] = parse_identity(self._must(self._getter(f"who/{peer}"), where))
        self._meeting_until = 0.0
        return self._generation

    def _come(self, generation: int, where: Where) -> None:
        """Tell who this rank is, in a generation."""
        self._generation = generation
        self._must(lambda: self._store.set(f"reached/{generation}", ""), where)
        name = SEPARATOR.join(map(str, identity()))
        self._must(lambda: self._store.set(self._key(f"who/{self._rank}"), name), where)

    def _latest(self, where: Where) -> int:
        """The latest generation that a rank has come to: none is left out, so the next one tells."""
        latest = self._generation
        while self._must(lambda after=latest + 1: self._store.check([f"reached/{after}"]), where):  # type: ignore[misc]
            latest += 1
        return latest

    def _key(self, name: str) -> str:
        return f"{self._generation}/{name}"

    def abort(self, abort: Abort) -> None:
        """Write `abort` unless another rank was first. Never raises."""
        self._try(lambda: self._store.compare_set(self._key("abort"), "", abort.to_text()))

    def read_abort(self) -> Abort | None:
        text = self._try(self._getter("abort", checked=True))
        return Abort.from_text(text) if text else None

    def report(self, position: int, where: Where) -> None:
        """Tell that this rank waits in its `position`-th operation."""
        self._try(lambda: self._store.set(self._key(f"at/{self._rank}"), f"{position}{SEPARATOR}{where}"))

    def late(self, position: int) -> list[tuple[int, str]]:
        """(peer, what it is known to do) of the peers not known to have come to this rank's `position`.

        Position 0 is to connect, and whoever is further has done that.
        """
        late = []
        for peer in self._peers:
            text = self._try(self._getter(f"at/{peer}", checked=True))
            if self._lost is not None:
                return []
            number, _, where = (text or "").partition(SEPARATOR)
            if not number.isdecimal() or int(number) < position:
                late.append((peer, f"last seen waiting in {where[:80]}" if where else "never seen waiting"))
            elif int(number) > position > 0:
                late.append((peer, f"waits in {where[:80]}"))
        return late

    def suspects(self, states: Sequence[str] = ("dead", "stopped")) -> list[tuple[int, str]]:
        """(peer, "dead" or "stopped") of the peers on this host whose process is so."""
        found = []
        for peer, (host, pid, born) in self._who.items():
            state = process_state(pid, born) if host == host_name() else "unknown"
            if state in states:
                found.append((peer, state))
        return found

    def _checker(self, key: str) -> Callable[[], bool]:
        return lambda: self._store.check([self._key(key)])

    def _getter(self, key: str, *, checked: bool = False) -> Callable[[], str]:
        def get() -> str:
            if checked and not self._store.check([self._key(key)]):
                return ""
            return bytes(self._store.get(self._key(key))).decode("utf-8", "replace")

        return get

    def _must(self, question: Callable[[], T], where: Where) -> T:
        """The store's answer. Raises PeerFailed when the store is gone."""
        try:
            return self._ask(question)
        except StoreLost as error:
            text = f"the key-value store of torch.distributed is lost ({error})"
            raise PeerFailed(text, rank=self._rank, **where._asdict()) from error

    def _try(self, question: Callable[[], T]) -> T | None:
        try:
            return self._ask(question)
        except StoreLost:
            return None

    def _ask(self, question: Callable[[], T]) -> T:
        if self._lost is not None:
            raise StoreLost(self._lost)
        try:
            return bounded(question, max(ASK_LIMIT_S, self._meeting_until - time.monotonic()))
        except StoreLost as error:
            self._lost = str(error)
            raise


def bounded(question: Callable[[], T], limit_s: float) -> T:
    """The answer of a call that may never return. Raises StoreLost when it fails or has not returned in time."""
    answers: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(question())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="moe_overlap store question", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # since Python 3.12 no thread starts while the interpreter ends
        raise StoreLost(str(error)) from None
    thread.join(limit_s)
    if answers:
        return answers[0]
    raise StoreLost(type(errors[0]).__name__ if errors else f"no answer within {limit_s:.3f} s")


def own_store(store: dist.Store, limit_s: float, use: str = "control") -> dist.Store:
    """A connection of our own to `store`: a question that is stuck must not block the rest of the process.

    One for all transports of the process and each `use`: connecting to a TCPStore was seen to stall for 5 s now and
    then. Raises StoreLost when there is no connection within the limit.
    """
    own = _own_stores.setdefault(store, {})
    if use not in own:
        own[use] = bounded(store.clone, limit_s) if hasattr(store, "clone") else store
    return own[use]


def forget_own_store(store: dist.Store, use: str = "control") -> None:
    """After it was lost or may be stuck: the next `own_store` connects again."""
    _own_stores.get(store, {}).pop(use, None)


_own_stores: weakref.WeakKeyDictionary[dist.Store, dict[str, dist.Store]] = weakref.WeakKeyDictionary()


def host_name() -> str:
    """This machine and process namespace, so that a process id means something."""
    global _host_name
    if _host_name is None:
        try:
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                boot = file.read().strip()
            _host_name = f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
        except OSError:
            _host_name = f"{socket.gethostname()} pid {os.getpid()}"
    return _host_name


_host_name: str | None = None


def identity() -> tuple[str, int, int]:
    """(host, process id, birth time in ticks) of this process."""
    return host_name(), os.getpid(), _stat(os.getpid())[1]


def parse_identity(text: str) -> tuple[str, int, int]:
    host, _, rest = text[:500].partition(SEPARATOR)
    pid, _, born = rest.partition(SEPARATOR)
    return (host, int(pid), int(born)) if pid.isdecimal() and born.isdecimal() else ("", 0, 0)


def process_state(pid: int, born: int) -> str:
    """ "running", "stopped" or "dead" for a process of this host."""
    state, birth = _stat(pid)
    if state in ("", "Z", "X", "x") or birth != born:
        return "dead"
    return "stopped" if state in ("T", "t") else "running"


def _stat(pid: int) -> tuple[str, int]:
    """(state letter, birth time in ticks) from /proc; ("", 0) when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            words = file.read().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return words[0], int(words[19])


def ranks_text(ranks: Sequence[int]) -> str:
    if not ranks:
        return "a rank that is not known"
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(rank) for rank in ranks)
