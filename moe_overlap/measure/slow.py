"""Why was this step slow? From the executed actions of all ranks to what each rank stood still for.

While rank r stands still for an exchange, one of three things holds it up, at every moment:

    late        some rank has not issued the exchange yet, and computes, or does what no action stands for
    contention  all have, but other bytes are before it on the link that brings the rows
    wire        its bytes are on the way

A late rank that stands still itself, for an exchange before this one, passes the blame on, until there is a rank that
does not wait. So the time of every wait is parted without rest, and each part names a rank and an action.

The length of a step is another question: what nobody waits for may be the end of it. `critical_path` walks back from
the end, on the rank that ended last; at a wait it goes on at the rank whose rows ended it, at the time when that issued
them. What lies on that path and took longer than usual is why the step did.

Times of all ranks have to be on one clock: `time.perf_counter` of one machine. Which rank's link was last, and when its
bytes began to move, only some transports know (`TimelineEvent.last_sender`; the emulated link does). Elsewhere a part
of kind "wire" has the rank None, and "contention" is said where an exchange that was issued before was still not over.
Compute that takes cores away from a transport is not told from a slow wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from moe_overlap.measure.timeline import Interval, length, union
from moe_overlap.schedule.recorder import TimelineEvent

KINDS = ("late", "wire", "contention")
BETWEEN = "between actions"  # a late rank does something that is no action: the host, a data loader, another program
BEFORE = "before its first action"  # a late rank began the step after another one
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


@dataclass(frozen=True, kw_only=True)
class _Arrival:
    """How the rows of one exchange came to one rank. bringer: the rank whose rows came last, or the last to issue where
    that is not known; issued_s: when it did; begun_s: when its bytes were on the wire, behind `before`."""

    bringer: int
    sender: int | None
    issued_s: float
    begun_s: float
    before: Key | None
    end_s: float


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

    def arrival(self, rank: int, key: Key) -> _Arrival:
        """Of an exchange that `rank` took part in."""
        flights = self.flights[key]
        mine = flights[rank]
        if mine.sender is not None and mine.sender in flights:
            return replace(self._departure(mine.sender, key), end_s=mine.end_s)
        issued_s, bringer = max((flight.issued_s, other) for other, flight in flights.items())
        busy_s, before = self._unfinished(rank, mine, key)
        return _Arrival(bringer=bringer, sender=None, issued_s=issued_s, begun_s=max(issued_s, busy_s), before=before,
                        end_s=mine.end_s)  # fmt: skip

    def parts(self, rank: int, key: Key, start_s: float, end_s: float) -> list[Part]:
        """What holds `rank` up for the exchange `key` between two times."""
        if rank not in self.flights.get(key, {}):  # of which nothing but the wait was recorded
            return [Part("wire", None, key[2], end_s - start_s)] if end_s > start_s else []
        arrival = self.arrival(rank, key)
        issued_s = min(max(arrival.issued_s, start_s), end_s)
        begun_s = min(max(arrival.begun_s, issued_s), end_s)
        found = self._late(arrival.bringer, key, start_s, issued_s)
        before = OTHER if arrival.before is None else arrival.before[2]
        found.append(Part("contention", arrival.sender, before, begun_s - issued_s))
        found.append(Part("wire", arrival.sender, key[2], end_s - begun_s))
        return [part for part in found if part.seconds > 0]

    def path(self) -> list[Part]:
        """See `critical_path`."""
        lanes: dict[int, list[tuple[float, float, str, Key | None]]] = {}
        for rank, mine in self.compute.items():
            lanes.setdefault(rank, []).extend((event.end_s, event.start_s, event.action, None) for event in mine)
        for rank, stood in self.stood.items():
            lanes.setdefault(rank, []).extend((end_s, start_s, key[2], key) for start_s, end_s, key in stood)
        for lane in lanes.values():
            lane.sort(key=lambda one: one[:2])
        found: list[Part] = []
        if not lanes:
            return found
        begin_s = min(one[1] for lane in lanes.values() for one in lane)
        now_s, rank = max((lane[-1][0], rank) for rank, lane in lanes.items())
        while lanes.get(rank):
            end_s, start_s, action, key = lanes[rank].pop()
            if start_s >= now_s:  # after the time at which the path came to this rank
                continue
            if end_s < now_s:
                found.append(Part("late", rank, BETWEEN, now_s - end_s))
            end_s = min(end_s, now_s)
            if key is None:
                found.append(Part("late", rank, action, end_s - start_s))
                now_s = start_s
            elif rank in self.flights.get(key, {}) and self.arrival(rank, key).end_s > start_s:
                parts, now_s, rank = self._over_the_wire(rank, key, end_s)
                found += parts
            else:  # it was there already
                now_s = start_s
        found.append(Part("late", rank, BEFORE, now_s - begin_s))
        return [part for part in found if part.seconds > 0]

    def _over_the_wire(self, rank: int, key: Key, end_s: float) -> tuple[list[Part], float, int]:
        """The path from the end of an exchange at `rank` back to (parts, time, rank) where it was issued. Where it was
        behind others on its link, by way of those: a slow link is slow with all of them."""
        found: list[Part] = []
        arrival = self.arrival(rank, key)
        while True:
            begun_s = min(arrival.begun_s, end_s)
            issued_s = min(arrival.issued_s, begun_s)
            found.append(Part("wire", arrival.sender, key[2], end_s - begun_s))
            if issued_s == begun_s or arrival.before is None:
                found.append(Part("contention", arrival.sender, key[2], begun_s - issued_s))
                return found, issued_s, arrival.bringer
            end_s, key = begun_s, arrival.before
            arrival = self.arrival(rank, key) if arrival.sender is None else self._departure(arrival.sender, key)

    def _departure(self, rank: int, key: Key) -> _Arrival:
        """The same of an exchange on its way from `rank`, whoever's rows came last."""
        flight = self.flights[key][rank]
        begun_s = max(flight.issued_s, flight.start_s)
        return _Arrival(bringer=rank, sender=rank, issued_s=flight.issued_s, begun_s=begun_s,
                        before=self._before(rank, key), end_s=flight.end_s)  # fmt: skip

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
        rest_s = end_s - start_s - length(union(covered))
        return [*found, Part("late", rank, BETWEEN, rest_s)]

    def _issued(self, rank: int, key: Key) -> float:
        flight = self.flights.get(key, {}).get(rank)
        return float("inf") if flight is None else flight.issued_s

    def _before(self, rank: int, key: Key) -> Key | None:
        """The exchange that the link of `rank` was busy with: the last one issued before that was not over."""
        mine_s = self._issued(rank, key)
        found = [(flights[rank].issued_s, other) for other, flights in self.flights.items()
                 if rank in flights and flights[rank].issued_s < mine_s < flights[rank].end_s]  # fmt: skip
        return max(found)[1] if found else None

    def _unfinished(self, rank: int, mine: _Flight, key: Key) -> tuple[float, Key | None]:
        """(end, key) of the exchange of `rank` that was issued before this one and ended last."""
        found = [(flights[rank].end_s, other) for other, flights in self.flights.items()
                 if other != key and rank in flights and flights[rank].issued_s < mine.issued_s]  # fmt: skip
        return max(found) if found else (mine.issued_s, None)


@dataclass(frozen=True, kw_only=True)
class Slow:
    """Why a step took longer than usual: the one thing on its critical path that did most for it. kind: one of KINDS
    ("late": a rank computed, or did something else, for longer), or None where nothing took longer. rank: the late one,
    or whose link it was (None: not known). excess_s: seconds beyond usual. by_kind: those of the whole path."""

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
            "contention": f"the link of {where} was busy before {self.action}",
            None: "nothing took longer",
        }[self.kind]
        parts = ", ".join(f"{kind} {1e3 * seconds:+.2f}" for kind, seconds in self.by_kind.items())
        beyond = "other ranks' compute" if self.usual_s is None else "usual"
        return f"{took}: {said}; ms beyond {beyond} on the critical path: {parts}"


def critical_path(events: Iterable[TimelineEvent]) -> list[Part]:
    """What the length of a step is made of, from its end back to its beginning."""
    return _Ranks(events).path()


def why_slow(step: Sequence[TimelineEvent], usual: Sequence[Sequence[TimelineEvent]] = ()) -> Slow:
    """What made one step (the events of all ranks) slower than `usual` steps of the same program: medians of what each
    action of a rank took there, and each exchange. Without them: compute beyond that of the other ranks, and exchanges
    with all that they took. ValueError where nothing was recorded."""
    if not step:
        raise ValueError("no events: record() has to be open while the step runs")
    known = _Usual(step, usual)
    excess: dict[Cause, float] = {}
    for part in critical_path(step):
        cause = part.kind, part.rank, part.action
        excess[cause] = excess.get(cause, 0.0) + part.seconds - known.seconds(part)
    by_kind = {kind: sum(seconds for cause, seconds in excess.items() if cause[0] == kind) for kind in KINDS}
    by_rank: dict[tuple[str, int | None], float] = {}
    for (kind, rank, _), seconds in excess.items():
        by_rank[kind, rank] = by_rank.get((kind, rank), 0.0) + seconds
    took_s, usual_s = _took(step), median(map(_took, usual)) if usual else None
    worst = max(by_rank, key=lambda one: by_rank[one], default=None)
    if worst is None or by_rank[worst] <= 0:
        return Slow(kind=None, rank=None, action="", excess_s=0.0, by_kind=by_kind, took_s=took_s, usual_s=usual_s)
    action = max((one for one in excess if one[:2] == worst), key=lambda one: excess[one])[2]
    return Slow(kind=worst[0], rank=worst[1], action=action, excess_s=by_rank[worst], by_kind=by_kind, took_s=took_s,
                usual_s=usual_s)  # fmt: skip


@dataclass(kw_only=True)
class _Times:
    """Seconds that were seen, by name."""

    compute: dict[tuple[int, str], list[float]] = field(default_factory=dict)
    wire: dict[str, list[float]] = field(default_factory=dict)
    before: dict[str, list[float]] = field(default_factory=dict)

    def add(self, events: Sequence[TimelineEvent]) -> None:
        ranks = _Ranks(events)
        for rank, mine in ranks.compute.items():
            for event in mine:
                self.compute.setdefault((rank, event.action), []).append(event.end_s - event.start_s)
        begin_s = min(one.start_s for one in events if one.lane != "wire")
        for rank in {event.rank for event in events if event.lane != "wire"}:
            busy = union((one.start_s, one.end_s) for one in events if one.rank == rank and one.lane != "wire")
            self.compute.setdefault((rank, BEFORE), []).append(busy[0][0] - begin_s if busy else 0.0)
            gaps = [after[0] - before[1] for before, after in zip(busy, busy[1:], strict=False)]
            self.compute[rank, BETWEEN] = [*self.compute.get((rank, BETWEEN), ()), *gaps]
        for key, flights in ranks.flights.items():
            for rank in flights:
                arrival = ranks.arrival(rank, key)
                self.wire.setdefault(key[2], []).append(max(0.0, arrival.end_s - arrival.begun_s))
                self.before.setdefault(key[2], []).append(max(0.0, arrival.begun_s - arrival.issued_s))


class _Usual:
    """What each part of a path takes in other steps. Without them: compute on other ranks in this one, and nothing for
    exchanges, of which all ranks wait for the slowest."""

    def __init__(self, step: Sequence[TimelineEvent], usual: Sequence[Sequence[TimelineEvent]]) -> None:
        self.given, self.times = bool(usual), _Times()
        for events in usual or [step]:
            self.times.add(events)

    def seconds(self, part: Part) -> float:
        times = self.times
        if part.kind != "late" and not self.given:
            return 0.0
        if part.kind == "late":
            found = [seconds for (rank, action), seen in times.compute.items() for seconds in seen
                     if action == part.action and (rank == part.rank) == self.given]  # fmt: skip
            if not found and not self.given:  # the only rank: there is nothing to compare with
                return part.seconds
        else:
            found = (times.wire if part.kind == "wire" else times.before).get(part.action, [])
        return median(found or [0.0])


def _took(events: Sequence[TimelineEvent]) -> float:
    return max(event.end_s for event in events) - min(event.start_s for event in events)
