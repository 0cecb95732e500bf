"""Experts in host memory at run time: one half of one step. The order of its copies is `schedule/offload.py`'s."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from moe_overlap.schedule.actions import SLOTS
from moe_overlap.schedule.lanes import Lanes
from moe_overlap.schedule.weights import Part
from moe_overlap.transport.host_link import HostCopy, HostLink, Slot

ALIGNED = 256  # bytes: where the second weight begins in a slot


class Group(NamedTuple):
    """Some experts' tensors in a slot: [n, F', D] and [n, D, F], and which experts they are."""

    slot: Slot
    first: torch.Tensor
    second: torch.Tensor
    experts: slice


class HostExperts:
    """The stacked weights of a rank's experts, w_in [e, F', D] and w_out [e, D, F], on the host.

    slots: of this rank, e and those without an expert; chunks: how the half is cut, by experts. lanes: where each copy
    is noted, and each wait for one. joined: copies are waited for where they start (overlap off).
    """

    def __init__(
        self,
        link: HostLink,
        weights: Sequence[torch.Tensor],
        *,
        slots: int,
        chunks: int,
        joined: bool,
        lanes: Lanes,
    ) -> None:
        self._link, self._slots, self._chunks, self._joined, self._lanes = link, slots, chunks, joined, lanes
        self._timing = lanes.clock is not None
        self._weights = tuple(weights)
        self._here: dict[int, tuple[str, HostCopy, Group]] = {}
        self._last: HostCopy | None = None
        # The gradients: where they go to, those made that did not leave yet, and those under way.
        self._gradients: tuple[torch.Tensor, ...] = ()
        self._made: dict[int, Group] = {}
        self._leaving: list[tuple[str, HostCopy, Group]] = []

    # ---------------------------------------------------------------- weights

    def fetch(self, action: str, chunk: int) -> None:
        """Hf, Hb: the weights of the experts of a chunk set out."""
        experts = self._experts_of(chunk)
        group = self._group(experts)
        pairs = [(into, weight[experts]) for into, weight in zip(group[1:3], self._weights, strict=True)]
        self._last = copy = self._link.up(pairs, timing=self._timing)
        self._here[chunk] = action, copy, group
        if self._joined:
            self._stand_still(action, copy)

    def arrive(self, chunk: int) -> None:
        """What is computed from now on sees the weights of the experts of a chunk."""
        action, copy, _ = self._here[chunk]
        if not self._joined:
            self._stand_still(action, copy)

    def parts(self, chunk: int) -> Iterator[Part]:
        """The weights of the experts of a chunk, after `arrive`; they are on the device until the caller asks for the
        next part."""
        action, copy, group = self._here.pop(chunk)
        self._say(action, copy)
        if group.experts.start < group.experts.stop:
            yield Part(group.first, group.second, group.experts)
        self._link.give_back(group.slot)

    def let_go(self) -> None:
        """The host waits for the weights that went up, which may be changed afterwards."""
        if self._last is not None:
            self._link.join(self._last)

    # ---------------------------------------------------------------- gradients

    def make_room(self) -> None:
        """A slot is written again when what was in it has gone down."""
        if len(self._leaving) >= SLOTS and not self._joined:
            action, copy, _ = self._leaving[-SLOTS]
            self._stand_still(action, copy)

    def weigh(self, rows: Any, number: int, first: int, last: int) -> None:
        """Ew: the weight gradients of experts first .. last-1 into a slot, after `make_room`. rows: a
        `BackwardRows`."""
        if not self._gradients:
            self._gradients = tuple(self._link.host_empty(one.shape, one.dtype) for one in self._weights)
        used = self._leaving[-SLOTS][2].slot if len(self._leaving) >= SLOTS else None
        group = self._group(slice(first, last), used)
        if first < last:
            rows.group_gradient(first, last, group.first, group.second)
        self._made[number] = group

    def store(self, action: str, number: int) -> None:
        """Hg: a group of gradients goes down."""
        group = self._made.pop(number)
        pairs = [(whole[group.experts], one) for whole, one in zip(self._gradients, group[1:3], strict=True)]
        copy = self._link.down(pairs, timing=self._timing)
        self._leaving.append((action, copy, group))
        if self._joined:
            self._stand_still(action, copy)

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(dw_in, dw_out) on the host, which waits for them; None where none were asked for. Whatever was asked for,
        weights may be changed afterwards."""
        self.let_go()
        for action, copy, _ in self._leaving:
            self._link.join(copy)
            self._say(action, copy)
        for slot in {id(group.slot): group.slot for _, _, group in self._leaving}.values():
            self._link.give_back(slot)
        self._leaving.clear()
        found, self._gradients = self._gradients, ()
        return (found[0], found[1]) if found else (None, None)

    # ---------------------------------------------------------------- details

    def _experts_of(self, chunk: int) -> slice:
        """As `ExchangePlan.cut_counts` has them."""
        held = self._weights[0].shape[0]
        first, last = (self._slots * c // self._chunks for c in (chunk, chunk + 1))
        return slice(min(first, held), min(last, held))

    def _group(self, experts: slice, slot: Slot | None = None) -> Group:
        """Room for some experts, in a slot large enough for any group of this half."""
        most = -(-self._slots // self._chunks)
        sizes = [weight.shape[1:].numel() * weight.element_size() for weight in self._weights]
        begin = -(-most * sizes[0] // ALIGNED) * ALIGNED
        if slot is None:
            slot = self._link.slot(begin + most * sizes[1])
        count = experts.stop - experts.start
        first, second = (
            slot.memory[at : at + count * size].view(weight.dtype).view(count, *weight.shape[1:])
            for at, size, weight in zip((0, begin), sizes, self._weights, strict=True)
        )
        return Group(slot, first, second, experts)

    def _say(self, action: str, copy: HostCopy) -> None:
        self._lanes.note(action, "copy", copy.begin, copy.end)

    def _stand_still(self, action: str, copy: HostCopy) -> None:
        """Wait for a copy, and note the time that takes, which is not that of the experts."""
        begin = self._lanes.now()
        self._link.wait(copy)
        self._lanes.note(action, "wait", begin, self._lanes.now())
