"""`--compute slept`: backbone ops and experts replaced by sleeps of calibrated length, so that more ranks than cores
can be timed. Honest for schedules and traffic, says nothing about kernels, and every row is labelled.

What is not replaced: the agreement, the permutations, the exchanges.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_overlap import ops
from moe_overlap.commands.bench.cases import ACTIVATION, Attention, Branch
from moe_overlap.commands.bench.options import LayerOptions
from moe_overlap.launch.launch import World
from moe_overlap.measure.overlap import median
from moe_overlap.ops import raw
from moe_overlap.ops.expert_mlp_contract import Dgrad, Forward, Wgrad
from moe_overlap.ops.row_groups import Bounds

REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class ExpertSeconds:
    """Seconds that this machine's experts take for a row: in forward, and in each half of backward."""

    expert_row_s: float
    dgrad_row_s: float
    wgrad_row_s: float


@dataclass(frozen=True, kw_only=True)
class Calibration(ExpertSeconds):
    """And those of the backbone's ops, per call."""

    attention_forward_s: float
    attention_backward_s: float
    mlp_forward_s: float
    mlp_backward_s: float

    def wrap(self, name: str, op: nn.Module) -> nn.Module:
        """The op that sleeps instead of `op`, by its name in the block pair."""
        if name.startswith("attn"):
            return Slept(self.attention_forward_s, self.attention_backward_s)
        return Slept(self.mlp_forward_s, self.mlp_backward_s)


class Slept(nn.Module):
    """h -> h after forward_s seconds; its backward takes backward_s."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, h_TD: torch.Tensor) -> torch.Tensor:
        slept: torch.Tensor = _Sleep.apply(h_TD, self.forward_s, self.backward_s)
        return slept


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, forward_s: float, backward_s: float) -> torch.Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return grad, None, None


def calibrate(world: World, options: LayerOptions) -> Calibration:
    """Measured on rank 0 while the others wait, with its threads; the same numbers on all ranks. Collective."""
    names = [field.name for field in fields(Calibration)]
    seconds = torch.zeros(len(names), dtype=torch.float64)
    if world.rank == 0:
        measured = _measure(options)
        seconds = torch.tensor([measured[name] for name in names], dtype=torch.float64)
    return Calibration(**dict(zip(names, world.gather(seconds)[0].tolist(), strict=True)))


def _measure(options: LayerOptions) -> dict[str, float]:
    dtype, hidden, ffn = options.torch_dtype, options.hidden, options.ffn
    x_TD = torch.randn(options.tokens, hidden).to(dtype)
    found: dict[str, float] = {}
    named = {"attention": Attention(hidden, dtype=dtype), "mlp": Branch(hidden, ffn, dtype=dtype)}
    for name, op in named.items():
        with torch.no_grad():
            found[f"{name}_forward_s"] = median_s(partial(op, x_TD))
        h_TD = x_TD.clone().requires_grad_()

        def both(op: nn.Module = op, h_TD: torch.Tensor = h_TD) -> None:
            op.zero_grad(set_to_none=True)
            op(h_TD).backward(x_TD)

        found[f"{name}_backward_s"] = max(0.0, median_s(both) - found[f"{name}_forward_s"])
    local = options.experts // options.ranks
    rows = max(1, options.tokens // local) * local
    return found | asdict(expert_seconds(rows, local, hidden=hidden, ffn=ffn, dtype=dtype))


def expert_seconds(rows: int, experts: int, *, hidden: int, ffn: int, dtype: torch.dtype) -> ExpertSeconds:
    """Measured here and now, with so many rows on so many experts."""
    ends = [rows // experts * (i + 1) for i in range(experts)]
    w_in, w_out = torch.randn(experts, 2 * ffn, hidden).to(dtype), torch.randn(experts, hidden, ffn).to(dtype)
    x_RD = torch.randn(rows, hidden).to(dtype)
    y, h = ops.expert_mlp_forward(x_RD, w_in, w_out, ends, kind=ACTIVATION)
    dx, dh, a, _ = ops.expert_mlp_dgrad(x_RD, h, w_in, w_out, ends, kind=ACTIVATION)
    dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
    forward_s = median_s(lambda: ops.expert_mlp_forward(x_RD, w_in, w_out, ends, kind=ACTIVATION, y=y, h=h))
    dgrad_s = median_s(lambda: ops.expert_mlp_dgrad(x_RD, h, w_in, w_out, ends, kind=ACTIVATION, dx=dx, dh=dh, a=a))
    wgrad_s = median_s(lambda: ops.expert_mlp_wgrad(x_RD, x_RD, dh, a, ends, dw_in=dw_in, dw_out=dw_out))
    return ExpertSeconds(expert_row_s=forward_s / rows, dgrad_row_s=dgrad_s / rows, wgrad_row_s=wgrad_s / rows)


def median_s(body: Callable[[], object]) -> float:
    """Seconds of `body`, the median of REPEATS calls after one that warms up."""
    body()
    seconds = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        body()
        seconds.append(time.perf_counter() - start_s)
    return median(seconds)


@contextmanager
def slept_experts(calibration: ExpertSeconds | None, sleep: Callable[[float], object] = time.sleep) -> Iterator[None]:
    """Inside, the experts of every scheduled layer of this process `sleep` for seconds; None changes nothing."""
    if calibration is None:
        yield
        return

    def rows_of(ends: Bounds, starts: Bounds | None) -> int:
        return int(ends[-1]) if starts is None else sum(map(int, ends)) - sum(map(int, starts))

    def forward(call: Forward) -> None:
        sleep(calibration.expert_row_s * rows_of(call.ends, call.starts))

    def dgrad(call: Dgrad) -> None:
        sleep(calibration.dgrad_row_s * rows_of(call.ends, call.starts))

    def wgrad(call: Wgrad) -> None:
        asked = slice(*call.experts)
        starts = [0, *call.ends][:-1] if call.starts is None else call.starts
        sleep(calibration.wgrad_row_s * rows_of(call.ends[asked], starts[asked]))

    instead = {"expert_mlp_forward": forward, "expert_mlp_dgrad": dgrad, "expert_mlp_wgrad": wgrad}
    real = {name: getattr(raw, name) for name in instead}
    try:
        for name, slept in instead.items():
            setattr(raw, name, slept)
        yield
    finally:
        for name, kernel in real.items():
            setattr(raw, name, kernel)
