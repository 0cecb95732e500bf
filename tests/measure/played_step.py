"""Steps of several ranks as events, played on paper: every rank walks one schedule over links of its own, in order of
issue, with times drawn by a seed. One fault may be planted. Written without the code that it is to test."""

from __future__ import annotations

import random
from dataclasses import dataclass

from moe_overlap.schedule.actions import dependencies
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.recorder import TimelineEvent

COMPUTE_S = {"P": 0.4e-3, "U": 0.5e-3, "B": 4e-3, "S": 3e-3, "E": 6e-3}
EXCHANGE_S = 4e-3  # of a dispatch or a combine in one chunk
LATENCY_S = 0.05e-3
AGREE_S = 0.2e-3
BEFORE_S = 5e-3  # attention, ahead of the agreement
NOISE = 0.05


@dataclass(frozen=True, kw_only=True)
class Fault:
    """kind "late": `rank` needs `times` as long for each action of verb `verb`; "wire": its link does for all rows;
    "contention": its link is busy for `times` exchanges before the first rows."""

    kind: str
    rank: int
    times: float
    verb: str = ""


class Player:
    def __init__(self, pair: SchedulePair, ranks: int, rng: random.Random, fault: Fault | None, *, tells: bool) -> None:
        """tells: the transport knows whose rows came last and when bytes began, as the emulated link does."""
        self.pair, self.ranks, self.rng, self.fault, self.tells = pair, ranks, rng, fault, tells
        self.now = [rng.uniform(0, 0.1e-3) for _ in range(ranks)]
        self.busy = [0.0] * ranks
        self.events: list[TimelineEvent] = []
        self.flying: dict[str, list[tuple[float, float, float, float]]] = {}

    def play(self) -> list[TimelineEvent]:
        for rank in range(self.ranks):
            self.compute(rank, "attn1", BEFORE_S, "attn")
        self.issue("N", [AGREE_S] * self.ranks, on_link=False)
        self.wait("N")
        chunks, waited = self.pair.chunks, set()
        if self.fault is not None and self.fault.kind == "contention":
            rank = self.fault.rank
            self.busy[rank] = self.now[rank] + self.fault.times * EXCHANGE_S
        for action, needs in zip(self.pair.forward, dependencies(self.pair.forward), strict=True):
            for need in needs:
                other = self.pair.forward.actions[need]
                if other.lane == "wire" and need not in waited:
                    waited.add(need)
                    self.wait(other.text)
            if action.lane == "wire":
                self.issue(action.text, [self.wire_s(rank) / chunks for rank in range(self.ranks)], on_link=True)
            else:
                share = chunks if action.verb == "E" else 1
                for rank in range(self.ranks):
                    self.compute(rank, action.text, COMPUTE_S[action.verb] / share, action.verb)
        return self.events

    def noise(self) -> float:
        return max(0.5, self.rng.gauss(1.0, NOISE))

    def wire_s(self, rank: int) -> float:
        slow = self.fault is not None and (self.fault.kind, self.fault.rank) == ("wire", rank)
        return EXCHANGE_S * self.noise() * (self.fault.times if slow else 1.0)

    def compute(self, rank: int, action: str, seconds: float, verb: str) -> None:
        fault = self.fault
        slow = fault is not None and (fault.kind, fault.rank, fault.verb) == ("late", rank, verb)
        start_s = self.now[rank]
        self.now[rank] += seconds * self.noise() * (fault.times if slow else 1.0)
        self.events.append(TimelineEvent(rank, 7, "forward", action, "comp", start_s, self.now[rank]))

    def issue(self, action: str, seconds: list[float], *, on_link: bool) -> None:
        """Per rank (issued, begin, left, arrival at the others)."""
        found = []
        for rank, one in enumerate(seconds):
            issued_s = self.now[rank]
            begin_s = max(issued_s, self.busy[rank]) if on_link else issued_s
            left_s = begin_s + one
            if on_link:
                self.busy[rank] = left_s
            found.append((issued_s, begin_s, left_s, left_s + LATENCY_S))
        self.flying[action] = found

    def wait(self, action: str) -> None:
        flights = self.flying.pop(action)
        for rank, (issued_s, begin_s, left_s, _) in enumerate(flights):
            ends = {other: flight[3] for other, flight in enumerate(flights) if other != rank} | {rank: left_s}
            sender = max(ends, key=lambda other: ends[other])
            start_s = self.now[rank]
            end_s = self.now[rank] = max(start_s, ends[sender])
            self.events.append(TimelineEvent(rank, 7, "forward", action, "wait", start_s, end_s))
            knows = self.tells and action != "N"
            wire = (begin_s, max(begin_s, ends[sender])) if knows else (issued_s, end_s)
            self.events.append(
                TimelineEvent(rank, 7, "forward", action, "wire", *wire, issued_s, sender if knows else None)
            )
