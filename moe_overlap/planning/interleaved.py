"""Two micro-batches side by side: the exchanges of one under the compute of the other (DualPipe and DeepSeek-V3's
prefill, arXiv 2412.19437; TBO of vLLM and SGLang), in its steady state."""

from __future__ import annotations

from moe_overlap.planning.window import Slowdown


def interleaved_s(compute_s: float, wire_s: float, slowdown: Slowdown) -> float:
    """Seconds of a layer's step for each micro-batch: both lanes start together, each slowed while the other works, and
    the longer one goes on alone. No order within the step is looked at, so it is the least that such a schedule takes.

    >>> interleaved_s(2.0, 1.0, Slowdown(compute=1.5, wire=1.2))    # 1.2 beside each other; 0.8 of compute done
    2.4
    """
    together_s = min(compute_s * slowdown.compute, wire_s * slowdown.wire)
    rest_s = compute_s - together_s / slowdown.compute, wire_s - together_s / slowdown.wire
    return together_s + max(*rest_s)
