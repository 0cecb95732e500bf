"""A layer alone against the bare matmuls of its experts: what everything that is not a matmul costs.

    python benchmarks/layer_alone.py --threads 2

One process, one rank. "bare" is the expert matmuls and nothing else, on contiguous slices with the same rows per
expert, every result written to memory that exists already: forward x @ w_in.T and a @ w_out.T with the pre-activation
kept, backward the two gradients of rows and the two of weights. "ops" is gate, row_map, permute, expert_mlp and combine
with autograd and fresh gradients; "layer" is MoELayer. All take turns in one loop; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_overlap import MoELayer, ops
from moe_overlap.measure.report import append_jsonl

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
NOISY = 1.3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the layer, in the letters of the documentation."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    kind: str
    dtype: torch.dtype

    @property
    def ffn_rows(self) -> int:
        return self.ffn * (2 if self.kind == "swiglu" else 1)


class Bare:
    """The matmuls of the experts, into buffers that exist."""

    def __init__(self, shape: Shape, w_in: torch.Tensor, w_out: torch.Tensor, ends: list[int]) -> None:
        rows = shape.tokens * shape.top_k
        self.ranges = list(zip([0, *ends[:-1]], ends, strict=True))
        self.w_in, self.w_out = w_in, w_out

        def buffer(width: int) -> torch.Tensor:
            return torch.randn(rows, width).to(shape.dtype)

        self.x, self.y, self.dx, self.dy = (buffer(shape.hidden) for _ in range(4))
        self.h, self.dh = buffer(shape.ffn_rows), buffer(shape.ffn_rows)
        self.a, self.da = buffer(shape.ffn), buffer(shape.ffn)
        self.dw_in, self.dw_out = torch.zeros_like(w_in), torch.zeros_like(w_out)

    def forward(self) -> None:
        for (begin, end), w_in, w_out in zip(self.ranges, self.w_in, self.w_out, strict=True):
            torch.mm(self.x[begin:end], w_in.t(), out=self.h[begin:end])
            torch.mm(self.a[begin:end], w_out.t(), out=self.y[begin:end])

    def backward(self) -> None:
        for i, (begin, end) in enumerate(self.ranges):
            torch.mm(self.dy[begin:end], self.w_out[i], out=self.da[begin:end])
            torch.mm(self.dy[begin:end].t(), self.a[begin:end], out=self.dw_out[i])
            torch.mm(self.dh[begin:end], self.w_in[i], out=self.dx[begin:end])
            torch.mm(self.dh[begin:end].t(), self.x[begin:end], out=self.dw_in[i])


def ops_chain(shape: Shape, x_TD: torch.Tensor, layer: MoELayer) -> torch.Tensor:
    """The layer written out in operators."""
    w_in, w_out = layer.expert_weights
    logits_TE = torch.nn.functional.linear(x_TD.to(layer.router.weight.dtype), layer.router.weight)
    if logits_TE.dtype != torch.float64:
        logits_TE = logits_TE.float()
    weights_TK, ids_TK, _, _ = ops.gate_topk(logits_TE, k=shape.top_k)
    _, offs, slot_to_row_TK, row_to_slot_R = ops.row_map(ids_TK, num_experts=shape.experts)
    x_RD = ops.permute(x_TD, slot_to_row_TK, offs, num_rows=row_to_slot_R.shape[0])
    y_RD = ops.expert_mlp(x_RD, w_in, w_out, offs, kind=shape.kind)
    return ops.combine(y_RD, slot_to_row_TK, weights_TK)


def measure(shape: Shape, repeats: int) -> dict[str, list[float]]:
    """Seconds of each unit in each round."""
    torch.manual_seed(0)
    layer = MoELayer(shape.hidden, shape.ffn, shape.experts, shape.top_k, activation=shape.kind, dtype=shape.dtype)
    x_TD = torch.randn(shape.tokens, shape.hidden).to(shape.dtype).requires_grad_()
    dy_TD = torch.randn(shape.tokens, shape.hidden).to(shape.dtype)
    with torch.no_grad():
        ids_TK = layer.router(x_TD).topk_ids_TK
        ends = ops.row_map(ids_TK, num_experts=shape.experts)[1].tolist()
    w_in, w_out = (weight.detach() for weight in layer.expert_weights)
    bare = Bare(shape, w_in, w_out, ends)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, unit: Callable[[], torch.Tensor | None], keep: bool) -> torch.Tensor | None:
        start = time.perf_counter()
        result = unit()
        if keep:
            seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    forwards = {"ops": lambda: ops_chain(shape, x_TD, layer), "layer": lambda: layer(x_TD)}
    for i in range(repeats + 3):
        keep = i >= 3
        timed("bare forward", bare.forward, keep)
        timed("bare backward", bare.backward, keep)
        for name, forward in forwards.items():
            y_TD = timed(f"{name} forward", forward, keep)
            assert y_TD is not None
            timed(f"{name} backward", lambda y_TD=y_TD: y_TD.backward(dy_TD), keep)
            x_TD.grad = None
            layer.zero_grad(set_to_none=True)
            del y_TD
    return seconds


def report(shape: Shape, seconds: dict[str, list[float]]) -> list[dict[str, object]]:
    """One row per unit, with its ratio to the bare matmuls of the same direction."""
    rows = []
    for name, values in seconds.items():
        contender, direction = name.split()
        tenths = statistics.quantiles(values, n=10)
        rows.append(
            {
                "contender": contender,
                "direction": direction,
                "time_ms_median": 1e3 * statistics.median(values),
                "time_ms_p10": 1e3 * tenths[0],
                "time_ms_p90": 1e3 * tenths[-1],
                "ratio_to_bare": statistics.median(values) / statistics.median(seconds[f"bare {direction}"]),
                "flagged": "noisy" if tenths[-1] > NOISY * tenths[0] else None,
                "tokens": shape.tokens,
                "hidden": shape.hidden,
                "ffn": shape.ffn,
                "experts": shape.experts,
                "top_k": shape.top_k,
                "kind": shape.kind,
                "dtype": str(shape.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "repeats": len(values),
                "torch": torch.__version__,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1024), ("hidden", 512), ("ffn", 2048), ("experts", 8), ("top-k", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kind", choices=("gelu", "relu", "swiglu"), default="gelu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="append the rows to this .jsonl file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = Shape(
        tokens=options.tokens,
        hidden=options.hidden,
        ffn=options.ffn,
        experts=options.experts,
        top_k=options.top_k,
        kind=options.kind,
        dtype=DTYPES[options.dtype],
    )
    rows = report(shape, measure(shape, options.repeats))
    print(f"{'':16s} {'median':>9s} {'p10':>9s} {'p90':>9s}  ratio to bare")
    for row in rows:
        name = f"{row['contender']} {row['direction']}"
        times = " ".join(f"{row[key]:7.2f}ms" for key in ("time_ms_median", "time_ms_p10", "time_ms_p90"))
        print(f"{name:16s} {times}  {row['ratio_to_bare']:.3f} {row['flagged'] or ''}")
    print(f"workspace: {ops.workspace.POOL.stats()}")
    if options.out is not None:
        append_jsonl(options.out, rows)


if __name__ == "__main__":
    main()
