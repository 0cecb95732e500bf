"""The formulas of honest overlap numbers. Any one unit of time per call; `None` where a number has no meaning.

T_serial: one chunk, joined after every exchange. T_nocomm: the same with exchanges replaced by local copies. T_overlap:
what was achieved. All three are the maximum over ranks from a common barrier to the end.

    overlap_eff = 1 - (T_overlap - T_nocomm) / (T_serial - T_nocomm)      0 nothing hidden, 1 all, < 0 overlap hurts

Bounds of one window, from measured terms: a = one exchange of a chunk, e = experts on a chunk, d = their input
gradient, w = the weight gradient of a chunk's rows, r chunks. The chunked forms are those of a pipeline with equal
chunks on two lanes (compute, wire) that issues all dispatches first; exact forward, a lower bound backward, of what
takes exactly so long. Measured chunks do not: `cut_bound` holds for a row whatever its chunks cost. In a window with
ops the shortcut's form is the bound of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

INFLATED_TOLERANCE = 0.05
NOISY_RATIO = 1.3


def overlap_eff(overlapped: float, serial: float, nocomm: float) -> float | None:
    """Share of the serial schedule's communication time that was made to disappear."""
    if serial <= nocomm:
        return None
    return 1.0 - (overlapped - nocomm) / (serial - nocomm)


def comm_share(serial: float, nocomm: float) -> float:
    """Share of the serial time that is communication."""
    return (serial - nocomm) / serial


def headroom(comm: float, compute: float) -> float | None:
    """The largest speed-up that hiding alone can give: (T_comm + T_comp) / max of both."""
    most = max(comm, compute)
    return (comm + compute) / most if most > 0 else None


def is_inflated(serial: float, nocomm: float, exchanges: float, *, tolerance: float = INFLATED_TOLERANCE) -> bool:
    """Whether the serial baseline is not compute plus isolated exchanges: a speed-up over it would prove nothing."""
    return not abs(serial - (nocomm + exchanges)) <= tolerance * serial


def chunked_forward(chunks: int, exchange: float, experts: float) -> float:
    """T(r) = max{2ra, 2a + re, (r+1)a + e}."""
    r, a, e = chunks, exchange, experts
    return max(2 * r * a, 2 * a + r * e, (r + 1) * a + e)


def chunked_backward(chunks: int, exchange: float, dgrad: float, wgrad: float) -> float:
    """max{2ra, 2a + rd, (r+1)a + d, a + r(d + w)}, weight gradients after the last chunk's dgrad."""
    r, a, d, w = chunks, exchange, dgrad, wgrad
    return max(2 * r * a, 2 * a + r * d, (r + 1) * a + d, a + r * (d + w))


def shortcut_bound(experts: float, window: float, dispatch: float, combine: float) -> float:
    """T_exp + max(sum S, T_disp + T_comb): no slot can beat it. `window`: all that may run beside the exchanges."""
    return experts + max(window, dispatch + combine)


def cut_bound(
    nocomm: float, exchanges: float, chunks: int | None, backward_chunks: int | None, *, alone: bool, even: bool = True
) -> float:
    """What no order of a step cut into chunks can beat, from measurements of the whole step in one chunk: its compute
    T_nocomm, so that weights are read once, and its exchanges alone, so that latency is paid once.

    Compute has all of its work to do, and the wire all of its own. `alone`: there is nothing beside the exchanges, so
    compute also waits for the first chunk of forward and of backward, and for the last one of forward (that of backward
    may be beside the weight gradients). chunks, backward_chunks: None where that half is not in the step; of both each
    has half of the exchanges. even: all ranks have equally many rows; else dispatch and combine may load opposite
    directions of the link and run at once, and some rank may wait for less than a chunk's share.
    """
    if not even:
        return max(nocomm, exchanges / 2)
    waits = 0.0
    if alone:
        half = exchanges / (2 if chunks and backward_chunks else 1)
        waits = (half / chunks if chunks else 0.0) + (half / 2 / backward_chunks if backward_chunks else 0.0)
    return max(nocomm + waits, exchanges)


def percentile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, q in 0..1 (numpy's default).

    >>> percentile([1.0, 2.0, 4.0], 0.75)
    3.0
    """
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median(values: Sequence[float]) -> float:
    return percentile(values, 0.5)


def is_noisy(values: Sequence[float]) -> bool:
    """Whether p90 / p10 exceeds 1.3."""
    return percentile(values, 0.9) > NOISY_RATIO * percentile(values, 0.1)
