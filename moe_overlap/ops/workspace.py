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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils import deterministic
from torch.utils._python_dispatch import _get_current_dispatch_mode

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

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor with undefined contents, 64-byte aligned, like torch.empty."""
        numel = math.prod(shape)
        size_bytes = numel * dtype.itemsize
        if (
            size_bytes < SMALLEST_BYTES
            or device.type != "cpu"
            or _use_count is None
            or torch.compiler.is_compiling()
            or _get_current_dispatch_mode() is not None  # torch's own flag of it stays set after some errors
        ):
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


def empty(shape: Sequence[int], *, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised contiguous tensor from the process-wide pool, with the device (and dtype) of `like`."""
    return POOL.empty(shape, dtype or like.dtype, like.device)
