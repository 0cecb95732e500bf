"""A whole MoE layer on one card, forward and backward, beside what one would use otherwise, in one process.

    python benchmarks/gpu_layer.py [--out FILE] [--ways ours,plain,transformers,compile] [--profile]

Qwen3-30B-A3B's layer (128 experts, top-8, 2048 x 768) on 8192 tokens in bfloat16, the weights the same for all: `ours`
(MoELayer, one rank), `chunked` (ours in four chunks), `transformers` (its Qwen3 block with `grouped_mm` experts),
`plain` (as one writes it with torch's grouped matmul), `compile` (that under torch.compile) and `graph` (ours, as CUDA
graphs of forward and backward: torch.cuda.make_graphed_callables), `static` (chunked with mode="static", of the first
of a few capacities that holds all rows) and `static-graph` (that in graphs). Each is compared with float64 first: the
median over tokens of the relative error, forward and of x's gradient; routers round differently, so a few tokens may
take another expert. A wrong one has no time. Rows: milliseconds of each phase and of both, time over ours and over our
graphs, `met_by`: which of these two has the target, memory.
--profile: rows with the time of every kernel, and what the host is busy with.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import moe_overlap  # noqa: E402
from benchmarks import gpu_timing  # noqa: E402
from moe_overlap.routing import LinearRouter  # noqa: E402

DEVICE, DTYPE = "cuda", torch.bfloat16
TOKENS, HIDDEN, FFN, EXPERTS, TOP_K = 8192, 2048, 768, 128, 8
STAGES = (("ours", "graph"), ("plain", "transformers"), ("chunked", "static", "static-graph"), ("compile",))
"""Rows of a stage are written before the next one begins. What no card has run may take the process down, so it comes
behind what one has; `compile` last, as it may take longer than the part has."""
WAYS = tuple(way for stage in STAGES for way in stage)
TARGETS = {"transformers": 1.25, "compile": 1.2}
"""How many times as long as ours they are to take."""
CASE = "Qwen3-30B-A3B T=8192"
CAPACITIES = (1.25, 1.5, 2.0, 3.0, 4.0)
MOST_ERROR, MOST_ODD = 2e-2, 0.05
"""Of the median token; share of tokens that may be further off, as another expert was chosen."""


class Weights:
    """router [E, D], w_in [E, 2F, D] (gate, up), w_out [E, D, F]."""

    def __init__(self) -> None:
        generator = torch.Generator(device=DEVICE).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            std = size[-1] ** -0.5
            return torch.empty(size, device=DEVICE, dtype=DTYPE).normal_(std=std, generator=generator)

        self.router, self.w_in = normal(EXPERTS, HIDDEN), normal(EXPERTS, 2 * FFN, HIDDEN)
        self.w_out = normal(EXPERTS, HIDDEN, FFN)
        self.x, self.dout = (
            torch.empty(TOKENS, HIDDEN, device=DEVICE, dtype=DTYPE).normal_(generator=generator) for _ in range(2)
        )


class Plain(nn.Module):
    """A layer as one writes it with torch's grouped matmul."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.router = nn.Parameter(weights.router)
        self.w_in = nn.Parameter(weights.w_in)
        self.w_out = nn.Parameter(weights.w_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.reshape(-1, HIDDEN)
        probs_TE = functional.linear(x_TD.float(), self.router.float()).softmax(dim=-1)
        weights_TK, ids_TK = probs_TE.topk(TOP_K, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        order_R = ids_TK.flatten().argsort(stable=True)
        counts_E = torch.histc(ids_TK.flatten().float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
        offs_E = counts_E.cumsum(0).int()
        x_RD = x_TD[order_R // TOP_K]
        gate_RF, up_RF = self._grouped(x_RD, self.w_in, offs_E).chunk(2, dim=-1)
        y_RD = self._grouped(functional.silu(gate_RF) * up_RF, self.w_out, offs_E)
        y_RD = y_RD * weights_TK.flatten()[order_R].unsqueeze(1).to(y_RD.dtype)
        back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        return y_RD[back_R].view(-1, TOP_K, HIDDEN).sum(dim=1).view(x.shape)

    @staticmethod
    def _grouped(x_RD: torch.Tensor, w_EFD: torch.Tensor, offs_E: torch.Tensor) -> torch.Tensor:
        return functional.grouped_mm(x_RD, w_EFD.transpose(1, 2), offs=offs_E)


class Exact(Plain):
    """The same in float64, a loop of matmuls."""

    @staticmethod
    def _grouped(x_RD: torch.Tensor, w_EFD: torch.Tensor, offs_E: torch.Tensor) -> torch.Tensor:
        parts = x_RD.tensor_split(offs_E[:-1].tolist())
        return torch.cat([part @ w_FD.T for part, w_FD in zip(parts, w_EFD, strict=True)])


def ours(weights: Weights, schedule: str = "serial", **options: Any) -> nn.Module:
    router = LinearRouter(HIDDEN, EXPERTS, TOP_K, renormalize=True, device=DEVICE, dtype=DTYPE)
    layer = moe_overlap.MoELayer(
        HIDDEN,
        FFN,
        EXPERTS,
        TOP_K,
        router=router,
        schedule=schedule,
        device=DEVICE,
        dtype=DTYPE,
        **options,
    )
    with torch.no_grad():
        router.weight.copy_(weights.router)
        layer.experts.gate_up_proj.copy_(weights.w_in)
        layer.experts.down_proj.copy_(weights.w_out)
    return layer


def transformers_block(weights: Weights) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=FFN, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        norm_topk_prob=True, experts_implementation="grouped_mm",
    )  # fmt: skip
    block = Qwen3MoeSparseMoeBlock(config).to(DEVICE, DTYPE)
    with torch.no_grad():
        block.gate.weight.copy_(weights.router)
        block.experts.gate_up_proj.copy_(weights.w_in)
        block.experts.down_proj.copy_(weights.w_out)
    return block


def graphed(module: nn.Module, weights: Weights) -> nn.Module:
    sample = weights.x.detach().clone()[None].requires_grad_()
    result: nn.Module = torch.cuda.make_graphed_callables(module, (sample,))
    return result


def static(weights: Weights) -> nn.Module:
    for capacity in CAPACITIES:
        layer = ours(weights, "chunked(4)", mode="static", static_capacity=capacity)
        with torch.no_grad():
            layer(weights.x)
        try:
            layer.check_static()
        except moe_overlap.CapacityExceeded:
            continue
        print(f"static: capacity {capacity}")
        return layer
    raise ValueError(f"rows did not fit with any capacity of {CAPACITIES}")


def make(way: str, weights: Weights) -> nn.Module:
    if way == "ours":
        return ours(weights)
    if way == "graph":
        return graphed(ours(weights), weights)
    if way in ("static", "static-graph"):
        layer = static(weights)
        return layer if way == "static" else graphed(layer, weights)
    if way == "chunked":
        return ours(weights, "chunked(4)")
    if way == "transformers":
        return transformers_block(weights)
    return torch.compile(Plain(weights), dynamic=False) if way == "compile" else Plain(weights)


def phases(module: nn.Module, weights: Weights) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """(forward, backward) of the layer: the gradients of x and of all parameters."""
    parameters = list(module.parameters())

    def forward() -> tuple[torch.Tensor, Any]:
        x = weights.x.detach().requires_grad_()
        out = module(x[None])
        return out, (x, out)

    def backward(saved: Any) -> torch.Tensor:
        x, out = saved
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, [x, *parameters], weights.dout.view(out.shape).to(out.dtype))[0]

    return forward, backward


def token_errors(got_TD: torch.Tensor, want_TD: torch.Tensor) -> tuple[float, float]:
    """(relative error of the median token, share of tokens beyond MOST_ERROR); NaN is beyond."""
    error_T = (got_TD.double() - want_TD).norm(dim=1) / want_TD.norm(dim=1)
    error_T = error_T.nan_to_num(nan=float("inf"))
    return error_T.median().item(), (error_T > MOST_ERROR).double().mean().item()


def exact(weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, gradient of x) in float64."""
    x = weights.x.double().requires_grad_()
    out = Exact(weights).double()(x)
    return out.detach(), torch.autograd.grad(out, x, weights.dout.double())[0]


@dataclass
class Found:
    """What is right and can be timed, by its way, and what its row says beside its times."""

    results: gpu_timing.Results
    weights: Weights
    want: tuple[torch.Tensor, torch.Tensor]
    profile: bool
    ready: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = field(default_factory=dict)
    about: dict[str, dict[str, float]] = field(default_factory=dict)

    def look(self, way: str, end_s: float) -> None:
        """Make it, compare it; a row where it cannot be timed."""
        try:
            if time.monotonic() > end_s:
                raise TimeoutError("the time is over")
            both = phases(make(way, self.weights), self.weights)

            def once() -> tuple[torch.Tensor, torch.Tensor]:
                out, saved = both[0]()
                dx = both[1](saved)
                out = out[0] if isinstance(out, tuple) else out
                return out.detach().view(TOKENS, HIDDEN), dx.view(TOKENS, HIDDEN)

            once()
            got, peak = gpu_timing.peak_bytes(once)
            errors = [token_errors(have, should) for have, should in zip(got, self.want, strict=True)]
            if any(median > MOST_ERROR or odd > MOST_ODD for median, odd in errors):
                raise ValueError(f"wrong: (error of the median token, share of tokens off) is {errors}")
        except Exception as error:  # the others go on
            reason = f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.results.row(kind="layer", case=CASE, implementation=way, result=reason)
            return
        self.ready[way] = both
        self.about[way] = {
            "peak_gib": round(peak / 2**30, 2),
            "error": round(errors[0][0], 5),
            "odd": round(errors[0][1], 4),
        }
        if self.profile:
            kernels = gpu_timing.kernel_times(once)
            self.results.row(kind="profile", case=CASE, implementation=way,
                             forward_host_ms=round(gpu_timing.host_s(both[0]) * 1e3, 3),
                             both_host_ms=round(gpu_timing.host_s(once) * 1e3, 3),
                             host=gpu_timing.host_profile(both[0]),
                             device_ms=round(sum(us for _, us in kernels.values()) / 1e3, 3),
                             kernels=kernels)  # fmt: skip

    def time(self, ways: Sequence[str]) -> None:
        """A row for each of these, timed in turns with all that is ready."""
        if not any(way in self.ready for way in ways):
            return
        times = gpu_timing.two_phases(self.ready)
        totals = {way: sum(time_s.median_s for time_s in both) for way, both in times.items()}
        for way, (forward, backward) in times.items():
            if way in ways:
                row: dict[str, Any] = {"forward_ms": round(forward.median_s * 1e3, 3)}
                row["backward_ms"] = round(backward.median_s * 1e3, 3)
                over = {name: round(totals[way] / totals[name], 3) for name in ("ours", "graph") if name in totals}
                row |= {f"times_{name}": ratio for name, ratio in over.items()}
                if way in TARGETS:
                    met_by = [name for name, ratio in over.items() if ratio >= TARGETS[way]]
                    row |= {"target": TARGETS[way], "met_by": met_by}
                self.results.row(kind="layer", case=CASE, implementation=way, ms=round(totals[way] * 1e3, 3),
                                 **row, **self.about[way])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = gpu_timing.options(__doc__.splitlines()[0], argv, ways=",".join(WAYS), profile=False)
    weights = Weights()
    found = Found(gpu_timing.Results(options.out), weights, exact(weights), options.profile)
    asked = options.ways.split(",")
    if unknown := set(asked) - set(WAYS):
        raise SystemExit(f"--ways = {options.ways}: expected some of {', '.join(WAYS)}, got {', '.join(unknown)}")
    for stage in STAGES:
        ways = [way for way in asked if way in stage]
        for way in ways:
            found.look(way, options.end_s)
        found.time(ways)
    return 0


if __name__ == "__main__":
    sys.exit(main())
