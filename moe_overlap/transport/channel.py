"""Where virtual ranks meet: one queue of collectives per kind, checked when the last rank has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from moe_overlap.transport.world import World


@dataclass(kw_only=True)
class Meeting:
    """One collective: of whom, what each brought so far, who has been served, and what is wrong with it."""

    members: Sequence[int]
    brought: dict[int, Any] = field(default_factory=dict)
    served: set[int] = field(default_factory=set)
    mismatch: str | None = None
    odd_one: int | None = None


@dataclass(kw_only=True)
class Parcel:
    """A rank's part in an exchange. `meaning` must be equal on all ranks; rows are copied when they are sent."""

    meaning: tuple[object, ...]
    send: tuple[int, ...]
    recv: tuple[int, ...]
    rows: torch.Tensor
    sent: torch.Tensor
    out: torch.Tensor


class Channel:
    """The shared side of the transports that the W ranks made together."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.abort: tuple[int, str] | None = None
        self._generation = 0
        self._open: dict[tuple[str, int], Meeting] = {}
        self._positions: dict[tuple[str, int], int] = {}

    def bring(self, kind: str, rank: int, what: Any, members: Sequence[int] | None = None) -> Meeting:
        """Join this rank's next meeting of `kind`; the last one to come sets the deliveries up. `members`: all ranks,
        or those who meet under this name."""
        members = range(self.world.world_size) if members is None else members
        position = self._positions.get((kind, rank), 0)
        self._positions[kind, rank] = position + 1
        meeting = self._open.setdefault((kind, position), Meeting(members=members))
        meeting.brought[rank] = what
        if len(meeting.brought) == len(members):
            del self._open[kind, position]
            if kind == "exchange":
                _check_parcels(meeting)
            if kind == "reopen":
                self._renew()
            for receiver in members:
                self.world.baton.deliver_later(partial(self._serve, meeting, kind, receiver, self._generation))
        return meeting

    def _renew(self) -> None:
        """A new generation: what the old one had not delivered never arrives."""
        self.abort = None
        self._generation += 1
        self._open = {key: value for key, value in self._open.items() if key[0] == "reopen"}
        self._positions = {key: value for key, value in self._positions.items() if key[0] == "reopen"}

    def _serve(self, meeting: Meeting, kind: str, receiver: int, generation: int) -> None:
        """The delivery of one rank's share of a meeting that everybody has come to."""
        if generation != self._generation:
            return
        if kind == "exchange" and meeting.mismatch is None:
            with _disable_current_modes():  # of the rank in whose thread this happens to run
                self._deliver(meeting, receiver)
        meeting.served.add(receiver)

    def _deliver(self, meeting: Meeting, receiver: int) -> None:
        mine: Parcel = meeting.brought[receiver]
        parts = []
        for source in range(len(meeting.brought)):
            theirs: Parcel = meeting.brought[source]
            first = sum(theirs.send[:receiver])
            parts.append(theirs.sent[first : first + theirs.send[receiver]])
        mine.out.data.copy_(torch.cat(parts))


def _check_parcels(meeting: Meeting) -> None:
    parcels = meeting.brought
    for rank in sorted(parcels):
        if parcels[rank].meaning != parcels[0].meaning:
            meeting.odd_one = rank
            meeting.mismatch = f"rank 0 is in {parcels[0].meaning}, rank {rank} in {parcels[rank].meaning}"
            return
    for source in sorted(parcels):
        for target in sorted(parcels):
            sent, expected = parcels[source].send[target], parcels[target].recv[source]
            if sent != expected:
                meeting.odd_one = source
                meeting.mismatch = (
                    f"rank {source} sends {sent} rows to rank {target}, which expects {expected}, in "
                    f"{parcels[0].meaning}"
                )
                return
