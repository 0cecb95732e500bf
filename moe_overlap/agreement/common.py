"""Whether what every rank has whole (router, shared expert, projections of latents) is the same on all of them.

A rank says three numbers of its own, which are compared to a tolerance: after one more way of summing, or on another
kind of processor, weights that were trained alike differ in their last bits; those that were not soon differ in more.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

TOLERANCE = 1e-3
"""Of the norm: what may be between weights that count as equal. Those drawn from two seeds differ by about their norm,
those that a step of Adam has moved apart by about its learning rate over their mean size."""
WORDS = 3
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_compared(step: int) -> bool:
    """Whether the ranks compare weights in the `step`-th forward call since their transport opened: in the 1st, 2nd,
    4th, 8th, and so on, so that it costs next to nothing."""
    return step > 0 and step & (step - 1) == 0


@torch.no_grad()
def fingerprint(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """int64 [WORDS] on `device`, the bits of float64 numbers: one more than the norm of `tensors`, and two sums of all
    their numbers, each times a factor that its place gives it. Left out are other dtypes than FLOATS, and tensors of
    other classes: of a DTensor a rank may have a part, and not every class can be summed. Of none at all zeros."""
    total: torch.Tensor | None = None
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.dtype not in FLOATS or not tensor.numel():
            continue
        table = tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1)
        # Rows and columns: no temporary of the size of the weights. In float64 they would take 20 times as long.
        kind = torch.float64 if table.dtype == torch.float64 else torch.float32
        rows, columns = (table.sum(dim=dim, dtype=kind).double() for dim in (1, 0))
        norm = torch.linalg.vector_norm(table, dtype=kind).double()
        along, across = (torch.arange(1, one.numel() + 1, dtype=torch.float64, device=table.device)
                         for one in (rows, columns))  # fmt: skip
        sums = [rows @ (along * a).cos() + columns @ (across * b).cos() for a, b in ((1.0, 1.7), (2.3, 0.6))]
        one = torch.stack([norm.square(), *sums])
        total = one if total is None else total * one.new_tensor([1.0, 0.8, -0.9]) + one
    if total is None:
        return torch.zeros(WORDS, dtype=torch.int64, device=device)
    return torch.cat([total[:1].sqrt() + 1.0, total[1:]]).to(device).view(torch.int64)


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
