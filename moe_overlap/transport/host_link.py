"""The link between a device and the memory of its host, which experts in host memory travel on.

Weights go up, gradients come down, each direction in the order in which copies were asked for, beside compute. On a
CUDA device that is PCIe, by two copy engines and pinned memory (`CudaHostLink`); on a CPU both ends are the same
memory, and what the wire would take is waited for (`EmulatedHostLink`).

What is on the device lies in slots, which are used again: with as many slots as copies that are wanted ahead, the
memory of a device is bounded however far the host runs ahead of it. A copy begins when the current stream has come to
where it was asked for, so whoever used the slot before is done with it. All users of a link share one compute stream.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from moe_overlap.errors import ConfigError
from moe_overlap.transport.staged import Engine, in_graphs

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]  # (into, source)


@dataclass(eq=False)
class Slot:
    """Memory of the device, uint8 [n]."""

    memory: torch.Tensor


@dataclass(eq=False)
class HostCopy:
    """A copy under way. `begin`, `end`: stamps of the clock that the device's steps are timed by."""

    begin: Any
    end: Any


class HostLink:
    """What both kinds have in common. `device`: where rows are computed. `text`: what the link is, in words; of two
    with one text and one device a copy takes the same time. device_limit_bytes: the most bytes of the experts of a
    step on the device at a time, without what aligns them; None: no limit. Raises ConfigError for what is none."""

    device: torch.device
    text = "host link"

    def __init__(self, *, device_limit_bytes: int | None = None) -> None:
        given = device_limit_bytes
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise ConfigError("device_limit_bytes", given, "None or an integer of at least 1")
        self.device_limit_bytes = device_limit_bytes
        self.fetched_bytes = 0
        self.stored_bytes = 0
        self._free: list[Slot] = []
        self._slots: weakref.WeakSet[Slot] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> HostLink:
        """Copies of a layer share the link."""
        return self

    @property
    def device_bytes(self) -> int:
        """Bytes of all slots, in use or free: what experts take on the device."""
        return sum(slot.memory.numel() for slot in self._slots)

    def slot(self, num_bytes: int) -> Slot:
        """A slot of at least so many bytes, for the caller alone until `give_back`; free ones that are too small go."""
        while self._free:
            slot = self._free.pop()
            if slot.memory.numel() >= num_bytes:
                return slot
        slot = Slot(torch.empty(num_bytes, dtype=torch.uint8, device=self.device))
        self._slots.add(slot)
        return slot

    def give_back(self, slot: Slot) -> None:
        """Nobody will read or write the slot but for what was asked of the current stream already."""
        self._free.append(slot)

    def up(self, pairs: Pairs, *, timing: bool) -> HostCopy:
        """Copy from the host into a slot. timing: begin and end are to be read."""
        self.fetched_bytes += sum(source.nbytes for _, source in pairs)
        return self._copy(pairs, up=True, timing=timing)

    def down(self, pairs: Pairs, *, timing: bool) -> HostCopy:
        """Copy from a slot to the host."""
        self.stored_bytes += sum(source.nbytes for _, source in pairs)
        return self._copy(pairs, up=False, timing=timing)

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that a copy may come down to."""
        raise NotImplementedError

    def pin(self, weight: torch.Tensor) -> None:
        """Move a parameter of the host, in place, to where it can be copied from beside compute."""
        raise NotImplementedError

    def wait(self, copy: HostCopy) -> None:
        """What is computed from now on sees what was copied."""
        raise NotImplementedError

    def join(self, copy: HostCopy) -> None:
        """The host waits: afterwards it may read what came down, and change what went up."""
        raise NotImplementedError

    def _copy(self, pairs: Pairs, *, up: bool, timing: bool) -> HostCopy:
        raise NotImplementedError


class CudaHostLink(HostLink):
    """Pinned memory of the host and two copy-engine streams of one CUDA device.

    Weights and their gradients are pinned, which the system cannot take back: `pinned_bytes`, at most `limit_bytes`,
    by default half of the host's memory. Raises ConfigError without a CUDA device, and from `pin` beyond the limit.

    Weights can come up in a CUDA graph: each replay copies those that are there then, so whoever changes them waits for
    the replay first. Gradients cannot come down in one, since autograd reads them on the host: ConfigError. Graphs and
    steps of one link run one after another.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        limit_bytes: int | None = None,
        device_limit_bytes: int | None = None,
    ) -> None:
        super().__init__(device_limit_bytes=device_limit_bytes)
        self._engine = Engine(device)
        self.text = "pinned memory"
        self.device = self._engine.device
        self._up, self._down = self._engine.stream(), self._engine.stream()
        self.limit_bytes = host_memory_bytes() // 2 if limit_bytes is None else limit_bytes
        self._pinned = WeakIdKeyDictionary()  # weight -> bytes

    @property
    def pinned_bytes(self) -> int:
        """Of the weights that are still there, and of a gradient of each."""
        return sum(self._pinned.values())

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self._engine.capturing():
            expected = "frozen experts or torch.no_grad(): autograd reads on the host, ahead of the replay"
            raise ConfigError("expert_offload", "gradients of experts in a CUDA graph", expected)
        return self._engine.pinned(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))

    def pin(self, weight: torch.Tensor) -> None:
        if self._engine.is_pinned(weight):
            return
        if self._engine.capturing():
            expected = "a step before the capture, which pins them"
            raise ConfigError("expert_offload", "weights that are not pinned, in a CUDA graph", expected)
        self._pinned.pop(weight, None)  # what it had before is no longer its own
        need = self.pinned_bytes + 2 * weight.nbytes  # its gradient will be, too
        if need > self.limit_bytes:
            expected = f"at most {self.limit_bytes} pinned ones (limit_bytes) for weights and gradients of all layers"
            raise ConfigError("expert_offload", f"{need} bytes", expected)
        pinned = self.host_empty(weight.shape, weight.dtype)
        pinned.copy_(weight.detach())
        weight.data = pinned
        self._pinned[weight] = 2 * weight.nbytes

    def wait(self, copy: HostCopy) -> None:
        self._engine.current().wait_event(copy.end)

    def join(self, copy: HostCopy) -> None:
        if self._engine.capturing():  # the host is behind the replay when whoever replays has waited for it
            self.wait(copy)
        else:
            self._engine.join(copy.end)

    def slot(self, num_bytes: int) -> Slot:
        slot = super().slot(num_bytes)
        if self._engine.capturing():
            in_graphs.append(slot.memory)
        return slot

    def _copy(self, pairs: Pairs, *, up: bool, timing: bool) -> HostCopy:
        engine, stream = self._engine, self._up if up else self._down
        captured = engine.capturing()
        ready, begin, end = engine.event(), engine.event(timing=timing), engine.event(timing=timing)
        ready.record(engine.current())
        stream.wait_event(ready)
        begin.record(stream)
        for into, source in pairs:
            engine.copy(stream, into, source)
        end.record(stream)
        if not captured:
            for into, source in pairs:
                engine.keep(into if up else source, stream)
        return HostCopy(begin, end)


class EmulatedHostLink(HostLink):
    """The same on a CPU: both ends are ordinary memory, and each direction moves so many bytes a second.

    bytes_per_s: of each direction; None: as fast as the copy itself. Raises ConfigError for a rate that is none.
    """

    def __init__(self, bytes_per_s: float | None = None, *, device_limit_bytes: int | None = None) -> None:
        super().__init__(device_limit_bytes=device_limit_bytes)
        number = isinstance(bytes_per_s, int | float) and not isinstance(bytes_per_s, bool)
        if bytes_per_s is not None and not (number and math.isfinite(bytes_per_s) and bytes_per_s > 0):
            raise ConfigError("bytes_per_s", bytes_per_s, "None or a finite number above 0")
        self.device = torch.device("cpu")
        self.bytes_per_s = math.inf if bytes_per_s is None else float(bytes_per_s)
        self.text = f"emulated, {self.bytes_per_s} bytes/s"
        self._busy_s = {True: 0.0, False: 0.0}

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def pin(self, weight: torch.Tensor) -> None:
        """Nothing to do: no engine reads it."""

    def wait(self, copy: HostCopy) -> None:
        time.sleep(max(0.0, copy.end - time.perf_counter()))

    join = wait

    def _copy(self, pairs: Pairs, *, up: bool, timing: bool) -> HostCopy:
        begin = max(time.perf_counter(), self._busy_s[up])
        for into, source in pairs:
            into.copy_(source)
        end = begin + sum(source.nbytes for _, source in pairs) / self.bytes_per_s
        self._busy_s[up] = end
        return HostCopy(begin, end)


def host_memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def open_host_link(device: torch.device) -> HostLink:
    """The link of a device. One for all layers on a CUDA device, which then share its slots."""
    if device.type != "cuda":
        return EmulatedHostLink()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _links:
        _links[index] = CudaHostLink(torch.device("cuda", index))
    return _links[index]


_links: dict[int, HostLink] = {}
