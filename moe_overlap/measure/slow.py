"""Why was this step slow? From the executed actions of all ranks to what each rank stood still for.

While rank r stands still for an exchange, one of three things holds it up, at every moment:

    late        some rank has not issued the exchange yet, and computes, or does what no action stands for
    contention  all have, but other bytes are before it on the link that brings the rows
    wire        its bytes are on the way

A late rank that stands still itself, for an exchange before this one, passes the blame on, until there is a rank that
does not wait. So the time of every wait is parted without rest, and each part names a rank and an action.

Times of all ranks have to be on one clock: `time.perf_counter` of one machine. Which rank's link was last, and when its
bytes began to move, only some transports know (`TimelineEvent.last_sender`; the emulated link does). Elsewhere a part
of kind "wire" has the rank None, and "contention" is said where an exchange that was issued before was still not over.
Compute that takes cores away from a transport is not told from a slow wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from moe_overlap.measure.timeline import Interval, length, union
from moe_overlap.schedule.recorder import TimelineEvent

KINDS = ("late", "wire", "contention")
BETWEEN = "between actions"  # a late rank does something that is no action: the host, a data loader, another program
OTHER = "other traffic"  # on the link, and no exchange of these events
Key = tuple[int, str, str, int]  # step, phase, action, and which of those that have the same name
Cause = tuple[str, int | None, str]  # kind, rank, action


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of one wait. `rank`: the late one, or whose link it was (None: not known). `action`: what the late rank
    did; what was on the link."""

    kind: str
    rank: int | None
    action: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Wait:
    """The time that one rank stood still for one exchange, and what it is made of; the parts sum to its seconds."""

    rank: int
    step: int
    phase: str
    action: str
    start_s: float
    end_s: float
    parts: tuple[Part, ...]

    def seconds(self, kind: str) -> float:
        """Those of one of KINDS."""
        return sum(part.seconds for part in self.parts if part.kind == kind)


def split_waits(events: Iterable[TimelineEvent]) -> list[Wait]:
    """Every wait of every rank in `events` (those of all ranks), in the order in which they ended."""
    return _Ranks(events).waits()


def blame(waits: Iterable[Wait]) -> dict[Cause, float]:
    """Seconds by kind, rank and action, summed over all waits."""
    found: dict[Cause, float] = {}
    for wait in waits:
        for part in wait.parts:
            cause = part.kind, part.rank, part.action
            found[cause] = found.get(cause, 0.0) + part.seconds
    return found


@dataclass(frozen=True, kw_only=True)
class _Flight:
    issued_s: float
    start_s: float
    end_s: float
    sender: int | None


class _Ranks:
    """The events of all ranks, by what is asked of them."""

    def __init__(self, events: Iterable[TimelineEvent]) -> None:
        self.flights: dict[Key, dict[int, _Flight]] = {}
        self.stood: dict[int, list[tuple[float, float, Key]]] = {}
        self.compute: dict[int, list[TimelineEvent]] = {}
        seen: dict[tuple[int, str, Key], int] = {}
        for event in sorted(events, key=lambda event: (event.end_s, event.start_s)):
            if event.lane == "comp":
                self.compute.setdefault(event.rank, []).append(event)
                continue
            name = event.step, event.phase, event.action, 0
            number = seen.get((event.rank, event.lane, name), 0)
            seen[event.rank, event.lane, name] = number + 1
            key = *name[:3], number
            if event.lane == "wait":
                self.stood.setdefault(event.rank, []).append((event.start_s, event.end_s, key))
            if event.lane == "wire" or event.issued_s is not None:
                issued_s = event.start_s if event.issued_s is None else event.issued_s
                self.flights.setdefault(key, {})[event.rank] = _Flight(
                    issued_s=issued_s, start_s=event.start_s, end_s=event.end_s, sender=event.last_sender
                )

    def waits(self) -> list[Wait]:
        found = [
            Wait(rank=rank, step=key[0], phase=key[1], action=key[2], start_s=start_s, end_s=end_s,
                 parts=tuple(self.parts(rank, key, start_s, end_s)))
            for rank, stood in self.stood.items() for start_s, end_s, key in stood
        ]  # fmt: skip
        return sorted(found, key=lambda wait: (wait.end_s, wait.rank))

    def parts(self, rank: int, key: Key, start_s: float, end_s: float) -> list[Part]:
        """What holds `rank` up for the exchange `key` between two times."""
        flights = self.flights.get(key, {})
        mine = flights.get(rank)
        sender = None if mine is None else mine.sender
        # What the sender of the last rows did counts; where it is not known, what the last rank to issue did.
        others = [(flight.issued_s, other) for other, flight in flights.items()
                  if other != rank and sender in (None, other)]  # fmt: skip
        last_s, late = max(others, default=(start_s, rank))
        issued_s = min(max(last_s, start_s), end_s)
        found = self._late(late, key, start_s, issued_s)
        begun_s, before = issued_s, OTHER
        if sender is not None and sender in flights:
            begun_s = min(max(flights[sender].start_s, issued_s), end_s)
            before = self._before(sender, key, issued_s) or OTHER
        elif mine is not None:
            busy = self._unfinished(rank, mine, key)
            if busy is not None:
                begun_s, before = min(max(busy[0], issued_s), end_s), busy[1]
        return [part for part in (*found, Part("contention", sender, before, begun_s - issued_s),
                                  Part("wire", sender, key[2], end_s - begun_s)) if part.seconds > 0]  # fmt: skip

    def _late(self, rank: int, key: Key, start_s: float, end_s: float) -> list[Part]:
        """What `rank` did between two times, at whose end it issued `key`."""
        found: list[Part] = []
        covered: list[Interval] = []
        for begin_s, stop_s, other in self.stood.get(rank, ()):
            begin_s, stop_s = max(begin_s, start_s), min(stop_s, end_s)
            # What it waits for was issued before, so this ends: a cycle of ranks would be a deadlock.
            if begin_s < stop_s and other != key and self._issued(rank, other) < self._issued(rank, key):
                found += self.parts(rank, other, begin_s, stop_s)
                covered.append((begin_s, stop_s))
        for event in self.compute.get(rank, ()):
            begin_s, stop_s = max(event.start_s, start_s), min(event.end_s, end_s)
            if begin_s < stop_s:
                found.append(Part("late", rank, event.action, stop_s - begin_s))
                covered.append((begin_s, stop_s))
        return [*found, Part("late", rank, BETWEEN, end_s - start_s - length(union(covered)))]

    def _issued(self, rank: int, key: Key) -> float:
        flight = self.flights.get(key, {}).get(rank)
        return float("inf") if flight is None else flight.issued_s

    def _before(self, rank: int, key: Key, at_s: float) -> str | None:
        """The exchange that the link of `rank` was busy with: the last one issued before that was not over."""
        mine_s = self._issued(rank, key)
        found = [(flights[rank].issued_s, other[2]) for other, flights in self.flights.items()
                 if rank in flights and flights[rank].issued_s < mine_s and flights[rank].end_s > at_s]  # fmt: skip
        return max(found)[1] if found else None

    def _unfinished(self, rank: int, mine: _Flight, key: Key) -> tuple[float, str] | None:
        """(end, action) of the exchange of `rank` that was issued before this one and ended last, after its issue."""
        found = [(flights[rank].end_s, other[2]) for other, flights in self.flights.items()
                 if other != key and rank in flights and flights[rank].issued_s < mine.issued_s]  # fmt: skip
        return max(found) if found else None


@dataclass(frozen=True, kw_only=True)
class Slow:
    """Why a step took longer than usual. kind: one of KINDS, or None where no rank stood still longer. rank, action:
    the late rank and the action of it that took longest over its usual time; the link and what it brought. excess_s:
    seconds that the ranks stood still for it beyond usual, summed. by_kind: those of each kind, over all causes."""

    kind: str | None
    rank: int | None
    action: str
    excess_s: float
    by_kind: Mapping[str, float]
    took_s: float
    usual_s: float | None

    def __str__(self) -> str:
        took = f"the step took {1e3 * self.took_s:.2f} ms"
        took += "" if self.usual_s is None else f", usually {1e3 * self.usual_s:.2f} ms"
        where = "an unknown rank" if self.rank is None else f"rank {self.rank}"
        said = {
            "late": f"{where} was late, most of all in {self.action}",
            "wire": f"the link of {where} was slow, most of all with {self.action}",
            "contention": f"the link of {where} was busy with {self.action}",
            None: "no rank stood still longer than usual",
        }[self.kind]
        parts = ", ".join(f"{kind} {1e3 * seconds:+.2f}" for kind, seconds in self.by_kind.items())
        return f"{took}: {said}; ms of waiting beyond usual, summed over ranks: {parts}"


def why_slow(step: Sequence[TimelineEvent], usual: Sequence[Sequence[TimelineEvent]] = ()) -> Slow:
    """The cause that ranks stood still for longest in one step (the events of all ranks), beyond the median of `usual`
    steps of the same program; without them, of all that they stood still for. ValueError where nothing was recorded."""
    if not step:
        raise ValueError("no events: record() has to be open while the step runs")
    now = blame(split_waits(step))
    before = [blame(split_waits(events)) for events in usual]
    causes = dict.fromkeys([*now, *(cause for found in before for cause in found)])
    excess = {cause: now.get(cause, 0.0) - _median(found.get(cause, 0.0) for found in before) for cause in causes}
    by_kind = {kind: sum(seconds for cause, seconds in excess.items() if cause[0] == kind) for kind in KINDS}
    by_rank: dict[tuple[str, int | None], float] = {}
    for (kind, rank, _), seconds in excess.items():
        by_rank[kind, rank] = by_rank.get((kind, rank), 0.0) + seconds
    took_s, usual_s = _took(step), _median(map(_took, usual)) if usual else None
    worst = max(by_rank, key=lambda one: by_rank[one], default=None)
    if worst is None or by_rank[worst] <= 0:
        return Slow(kind=None, rank=None, action="", excess_s=0.0, by_kind=by_kind, took_s=took_s, usual_s=usual_s)
    kind, rank = worst
    mine = {action: seconds for (k, r, action), seconds in excess.items() if (k, r) == worst}
    action = max(mine, key=lambda one: mine[one])
    if kind == "late" and rank is not None:
        action = _longest_over(step, usual, rank) or action
    return Slow(kind=kind, rank=rank, action=action, excess_s=by_rank[worst], by_kind=by_kind, took_s=took_s,
                usual_s=usual_s)  # fmt: skip


def _longest_over(step: Sequence[TimelineEvent], usual: Sequence[Sequence[TimelineEvent]], rank: int) -> str | None:
    """The compute action of `rank` that took longest over its usual time: that of the other steps, else of the other
    ranks in this one. None where none took longer than all that lies between its actions."""
    mine = _compute(step, rank)
    if usual:
        known = [_compute(events, rank) for events in usual]
    else:
        known = [_compute(step, other) for other in sorted({event.rank for event in step} - {rank})]
    over = {action: seconds - _median(one.get(action, 0.0) for one in known) for action, seconds in mine.items()}
    action = max(over, key=lambda one: over[one], default=None)
    return action if action is not None and over[action] > 0 else None


def _compute(events: Iterable[TimelineEvent], rank: int) -> dict[str, float]:
    """Seconds by action of one rank's compute lane; what lies between its actions and waits as BETWEEN."""
    found: dict[str, float] = {}
    mine = [event for event in events if event.rank == rank and event.lane != "wire"]
    for event in mine:
        if event.lane == "comp":
            found[event.action] = found.get(event.action, 0.0) + event.end_s - event.start_s
    if mine:
        whole_s = max(event.end_s for event in mine) - min(event.start_s for event in mine)
        found[BETWEEN] = whole_s - length(union((event.start_s, event.end_s) for event in mine))
    return found


def _took(events: Sequence[TimelineEvent]) -> float:
    return max(event.end_s for event in events) - min(event.start_s for event in events)


def _median(values: Iterable[float]) -> float:
    return median(list(values) or [0.0])
