"""Recycled memory for large CPU tensors.

The C allocator returns large blocks to the system, so each step pays page faults again for the same weight gradients
and activations: an eighth of a backward (docs/notes/2026-11-22-cpu-expert-mlp.md). The pool keeps the storages it has
given out; a storage is free again when nobody but the pool holds it, so nothing is ever handed back by hand and nothing
can be handed back too early. What is given out are ordinary tensors: autograd may keep them as gradients.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils import deterministic
from torch.utils._python_dispatch import _get_current_dispatch_mode

from moe_overlap.errors import ConfigError

SMALLEST_BYTES = 1 << 18
"""Smaller tensors are left to the C allocator, which recycles them itself."""

DEFAULT_LIMIT_BYTES = 2 << 30

# The list entry, the loop variable and the argument of getrefcount.
_POOL_REFERENCES = 3
_STEPS_MORE = 4
_use_count = getattr(torch._C, "_storage_Use_Count", None)


@dataclass(frozen=True)
class WorkspaceStats:
    """Counters since the start and the present size of the pool."""

    reused: int
    created: int
    bypassed: int
    held_bytes: int


class Peak:
    """The most bytes of rows that were held by somebody at once, of those given out since the measurement began.

    Counted are whole storages, so with what a bucket is larger than what was asked for; those below SMALLEST_BYTES and
    beyond the pool's limit too. Left out are gradients of weights (`rows=False`), devices other than the CPU, calls
    that are compiled or under a dispatch mode, and all that does not ask this pool. A storage counts as held while a
    tensor has it. What the pool does not keep is freed when the next tensor is given out, a little later than else.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._held: list[torch.UntypedStorage] = []
        self._lock = threading.Lock()

    def forget_free(self) -> None:
        """Let go of what nobody else holds, so that the pool can give it out again."""
        with self._lock:
            self._held = [storage for storage in self._held if not _only_the_pool_holds(storage)]

    def given(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor of rows, which has just been given out."""
        with self._lock:
            self._held.append(tensor.untyped_storage())
            self.bytes = max(self.bytes, sum(storage.nbytes() for storage in self._held))


class Workspace:
    """A pool of CPU storages, safe to use from several threads.

    A storage is reused when its use count and its Python reference count say that only the pool holds it, its size is
    still what it was (`resize_` may have emptied it) and it was not moved to shared memory (another process may read
    it). Rows of a step vary with the routing, so sizes are rounded up to 1/16 of their power of two, and a storage of
    up to four such steps more is taken where there is one; sizes that are multiples of a step anyway, such as weight
    gradients of usual shapes, are exact.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._storages: dict[int, list[torch.UntypedStorage]] = {}
        self._held_bytes = 0
        self._reused = self._created = self._bypassed = 0
        self._lock = threading.Lock()
        self._peak: Peak | None = None

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, rows: bool = True
    ) -> torch.Tensor:
        """A contiguous tensor with undefined contents, 64-byte aligned, like torch.empty.

        `rows` says whether it counts where a peak is measured.
        """
        peak = self._peak
        if peak is None:
            return self._empty(shape, dtype, device)
        peak.forget_free()
        tensor = self._empty(shape, dtype, device)
        if rows and device.type == "cpu" and not _traced():
            peak.given(tensor)
        return tensor

    @contextmanager
    def measured_peak(self) -> Iterator[Peak]:
        """Inside, the pool counts the rows it gives out, to all threads of the process; read `bytes` afterwards.

        Raises ConfigError inside another measurement, and where this torch does not tell who holds a storage.
        """
        if _use_count is None:
            raise ConfigError("measured_peak", f"torch {torch.__version__}", "a torch that counts users of a storage")
        with self._lock:
            if self._peak is not None:
                raise ConfigError("measured_peak", "a measurement within another", "one at a time in a process")
            peak = self._peak = Peak()
        try:
            yield peak
        finally:
            self._peak = None

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        numel = math.prod(shape)
        size_bytes = numel * dtype.itemsize
        if size_bytes < SMALLEST_BYTES or device.type != "cpu" or _use_count is None or _traced():
            return torch.empty(shape, dtype=dtype, device=device)
        bucket_bytes = _bucket(size_bytes)
        with self._lock:
            storage = self._find(bucket_bytes)
            if storage is None:
                storage = self._create(bucket_bytes)
            tensor = torch.empty(0, dtype=dtype)
            tensor.set_(storage, 0, tuple(shape), _strides(shape))
            del storage
        # torch.empty does the same in this mode.
        if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
            tensor.fill_(math.nan if dtype.is_floating_point else torch.iinfo(dtype).max)
        return tensor

    def clear(self) -> None:
        """Forget every storage. Those in use live on with their tensors."""
        with self._lock:
            self._storages.clear()
            self._held_bytes = 0

    def stats(self) -> WorkspaceStats:
        """Counters and size."""
        with self._lock:
            return WorkspaceStats(self._reused, self._created, self._bypassed, self._held_bytes)

    def _find(self, bucket_bytes: int) -> torch.UntypedStorage | None:
        for size_bytes in range(
            bucket_bytes, bucket_bytes + _STEPS_MORE * _step(bucket_bytes) + 1, _step(bucket_bytes)
        ):
            for storage in self._storages.get(size_bytes, ()):
                if _only_the_pool_holds(storage) and sys.getrefcount(storage) <= _POOL_REFERENCES:
                    if storage.nbytes() == size_bytes and not storage.is_shared():
                        self._reused += 1
                        return storage
        return None

    def _create(self, bucket_bytes: int) -> torch.UntypedStorage:
        storage = torch.empty(bucket_bytes, dtype=torch.uint8).untyped_storage()
        if self._held_bytes + bucket_bytes > self.limit_bytes:
            self._drop_free()
        if self._held_bytes + bucket_bytes > self.limit_bytes:
            self._bypassed += 1
            return storage
        self._storages.setdefault(bucket_bytes, []).append(storage)
        self._held_bytes += bucket_bytes
        self._created += 1
        return storage

    def _drop_free(self) -> None:
        """Forget the storages nobody uses, and those that can never be reused."""
        for bucket_bytes, storages in list(self._storages.items()):
            kept = []
            for storage in storages:
                usable = storage.nbytes() == bucket_bytes and not storage.is_shared()
                if usable and not _only_the_pool_holds(storage):
                    kept.append(storage)
            self._storages[bucket_bytes] = kept
        self._held_bytes = sum(size * len(storages) for size, storages in self._storages.items())


def _traced() -> bool:
    """Whether a tensor may have no memory: under torch.compile or a dispatch mode."""
    # torch's own flag of a mode stays set after some errors.
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def _only_the_pool_holds(storage: torch.UntypedStorage) -> bool:
    assert _use_count is not None
    return int(_use_count(storage._cdata)) == 1


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _step(size_bytes: int) -> int:
    return max(64, 1 << max(0, size_bytes.bit_length() - 5))


def _bucket(size_bytes: int) -> int:
    step = _step(size_bytes)
    return -(-size_bytes // step) * step


POOL = Workspace()


measured_peak = POOL.measured_peak


def empty(
    shape: Sequence[int], *, like: torch.Tensor, dtype: torch.dtype | None = None, rows: bool = True
) -> torch.Tensor:
    """An uninitialised contiguous tensor from the process-wide pool, with the device (and dtype) of `like`.

    rows=False: the gradient of a weight, which is no row and does not count as one in `measured_peak`.
    """
    return POOL.empty(shape, dtype or like.dtype, like.device, rows=rows)
