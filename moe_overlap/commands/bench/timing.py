"""Interleaved timing: every variant once per round, so that a slow moment of the machine falls on all of them alike.

T of one run is the maximum over ranks of the time from a common barrier to the end.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from moe_overlap.commands.bench.cases import BlockPair
from moe_overlap.commands.bench.phases import has
from moe_overlap.launch.launch import World
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.transport.base import Transport


@dataclass(frozen=True, eq=False, kw_only=True)
class Variant:
    """One thing to time: a case by a schedule over a transport."""

    name: str
    model: BlockPair
    pair: SchedulePair
    transport: Transport


@dataclass
class Samples:
    """What was measured of a variant: per round, this rank's seconds (forward, whole), and all ranks' maximum."""

    forward_s: list[float] = field(default_factory=list)
    own_s: list[float] = field(default_factory=list)
    events: list[list[TimelineEvent]] = field(default_factory=list)
    time_s: list[float] = field(default_factory=list)
    forward_max_s: list[float] = field(default_factory=list)


class Runner:
    """Runs variants of one phase on this rank's tokens x_TD with the gradient dy_TD of the output."""

    def __init__(self, world: World, phase: str, x_TD: torch.Tensor, dy_TD: torch.Tensor) -> None:
        self.world, self.phase = world, phase
        self.x_TD, self.dy_TD = x_TD, dy_TD

    def once(self, variant: Variant, samples: Samples | None = None) -> None:
        """One run from a common barrier; its times go to `samples`."""
        model = variant.model
        model.use(variant.pair, variant.transport)
        model.zero_grad(set_to_none=True)
        x_TD = self.x_TD if self.phase == "infer" else self.x_TD.detach().requires_grad_()
        self.world.barrier()
        start_s = time.perf_counter()
        with torch.set_grad_enabled(self.phase != "infer"):
            y_TD = model(x_TD)
        forward_s = time.perf_counter() - start_s
        if self.phase == "backward":  # from a barrier of its own
            self.world.barrier()
            forward_s, start_s = 0.0, time.perf_counter()
        if has(self.phase, "backward"):
            y_TD.backward(self.dy_TD)
        end_s = time.perf_counter()
        if samples is not None:
            samples.forward_s.append(forward_s)
            samples.own_s.append(end_s - start_s)
            samples.events.append(self.timed(model.moe.last_events))

    def timed(self, events: Sequence[TimelineEvent]) -> list[TimelineEvent]:
        """Those of the events that happen in what the phase times."""
        return [event for event in events if self.phase != "backward" or event.phase == "backward"]

    def interleave(
        self,
        variants: Sequence[Variant],
        repeats: Sequence[int],
        *,
        warmup: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Samples]:
        """Time every variant repeats[i] times, spread evenly over the rounds; the maximum over ranks is filled in."""
        samples = [Samples() for _ in variants]
        rounds = max(repeats, default=0)
        for _ in range(warmup):
            for variant in variants:
                self.once(variant)
        with quiet_collector():
            for round_ in range(rounds):
                # Every other round backwards: what follows what must not favour anyone.
                order = range(len(variants)) if round_ % 2 == 0 else reversed(range(len(variants)))
                for i in order:
                    if (round_ + 1) * repeats[i] // rounds > round_ * repeats[i] // rounds:
                        self.once(variants[i], samples[i])
                gc.collect()
                if progress is not None:
                    progress(round_ + 1, rounds)
        for one in samples:
            one.time_s = self.maximum(one.own_s)
            one.forward_max_s = self.maximum(one.forward_s)
        return samples

    def maximum(self, seconds: Sequence[float]) -> list[float]:
        """Element by element, the maximum over ranks."""
        if not seconds:
            return []
        parts = self.world.gather(torch.tensor(seconds, dtype=torch.float64))
        return [float(value) for value in torch.stack(parts).amax(dim=0)]


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Python's cyclic collector runs between the rounds, not in the middle of one."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
