"""Whether what every rank has whole (router, shared expert, projections of latents) is the same on all of them.

A rank says three numbers of its own, which are compared to a tolerance: after one more way of summing, or on another
kind of processor, weights that were trained alike differ in their last bits; those that were not soon differ in more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

TOLERANCE = 1e-3
"""Of the norm: what may be between weights that count as equal. Those drawn from two seeds differ by about their norm,
those that a step of Adam has moved apart by about its learning rate over their mean size."""
WORDS = 3
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CLASSES: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter)


def is_compared(call: int) -> bool:
    """Whether the ranks compare weights in the `call`-th forward call since their transport opened: in the 1st, 2nd,
    4th, 8th, and so on, so that it costs next to nothing."""
    return call > 0 and call & (call - 1) == 0


@torch.no_grad()
def fingerprint(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """int64 [WORDS] on `device`, the bits of float64 numbers: one more than the norm of `tensors`, and two sums of all
    their numbers, each times a factor that its place gives it. Left out are other dtypes than FLOATS, and tensors of
    other classes: of a DTensor a rank may have a part, and not every class can be summed. Zeros of none at all, and
    where some are not here (on "meta", as where a wrapper brings them for each call of their module)."""
    total: torch.Tensor | None = None
    with _disable_current_modes():  # a recompute, which compares nothing, would take results kept of this for others
        for number, tensor in enumerate(tensors):
            if type(tensor) not in CLASSES or tensor.dtype not in FLOATS or not tensor.numel():
                continue
            if tensor.is_meta:
                total = None
                break
            # One of the two is large, however many tensors there are.
            here = _numbers(tensor.detach(), math.cos(number + 0.7), math.sin(number + 0.7))
            total = here if total is None else total + here.to(total.device)
        if total is None:
            return torch.zeros(WORDS, dtype=torch.int64, device=device)
        return torch.cat([total[:1].sqrt() + 1.0, total[1:]]).to(device).view(torch.int64)


def _numbers(tensor: torch.Tensor, *factors: float) -> torch.Tensor:
    """float64 [WORDS] of one tensor: its squared norm, and the sums times `factors`. Nothing waits for a device."""
    table = tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)
    # Rows and columns: no temporary of the size of all weights. In float64 they would take 20 times as long.
    kind = torch.float64 if table.dtype == torch.float64 else torch.float32
    if table.device.type == "cpu":
        table = table.to(kind)  # of one tensor: sums of half numbers are 5 times as slow there
    rows, columns = (table.sum(dim=dim, dtype=kind).double() for dim in (1, 0))
    # By rows too: of a million numbers at once a norm in float32 is a thousandth too small.
    norm = torch.linalg.vector_norm(table, dim=1, dtype=kind).double()
    along, across = (torch.arange(1, one.numel() + 1, dtype=torch.float64, device=table.device)
                     for one in (rows, columns))  # fmt: skip
    sums = [factor * (rows @ (along * a).cos() + columns @ (across * b).cos())
            for factor, a, b in zip(factors, (1.0, 2.3), (1.7, 0.6), strict=True)]  # fmt: skip
    return torch.stack([norm.square().sum(), *sums])


def differing(words: np.ndarray) -> tuple[int, int, float] | None:
    """Of int64 [W, WORDS], what the ranks said (zeros: nothing): two ranks whose weights differ, and by how much of the
    norm; None where all are alike. NaN is alike NaN."""
    said = np.flatnonzero(words[:, 0])
    if len(said) < 2:
        return None
    numbers = np.ascontiguousarray(words[said]).view(np.float64)
    first = numbers[0]
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.maximum(np.maximum(np.abs(first[0]), np.abs(numbers[:, 0])) - 1.0, np.finfo(np.float64).tiny)
        apart = np.abs(numbers - first) / scale[:, None]
    apart[(numbers == first) | (np.isnan(numbers) & np.isnan(first))] = 0.0
    most = np.where(np.isnan(apart), np.inf, apart).max(axis=1)
    bad = np.flatnonzero(most > TOLERANCE)
    return (int(said[0]), int(said[bad[0]]), float(most[bad[0]])) if len(bad) else None
