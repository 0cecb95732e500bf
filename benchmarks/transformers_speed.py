"""The experts of one process: this library against transformers' own implementations, interleaved.

    python benchmarks/transformers_speed.py [--out rows.jsonl] [--seconds 180] [--dtypes fp32,bf16]

A Qwen3-MoE experts module (T 1024, D 512, F 1024, E 16, k 2) with the same weights and routing, as "moe_overlap",
"grouped_mm" and "eager", in float32 and bfloat16: forward, forward and backward, and one token forward. Each round
calls every way once, in an order that turns; a row has the medians of the ratios of a round, above 1 = this library is
faster. Needs transformers (constraints.txt has the version).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_overlap.integrations import transformers as ours
from moe_overlap.measure.machine import commit, hardware

T, D, F, E, K = 1024, 512, 1024, 16, 2
WAYS = ("moe_overlap", "grouped_mm", "eager")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CALLS = {"forward": (T, False), "forward+backward": (T, True), "one token, forward": (1, False)}
WARM = 2


def experts_of(way: str, dtype: torch.dtype) -> Any:
    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = way
    experts = Qwen3MoeExperts(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return experts


def call_of(experts: Any, tokens: int, train: bool, dtype: torch.dtype) -> Any:
    """A function that runs the module once."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, D, generator=generator).to(dtype).requires_grad_(train)
    ids = torch.rand(tokens, E, generator=generator).argsort(dim=1)[:, :K]
    weights = torch.rand(tokens, K, generator=generator).to(dtype).requires_grad_(train)

    def call() -> torch.Tensor:
        with torch.set_grad_enabled(train):
            y: torch.Tensor = experts(x, ids, weights)
            if train:
                torch.autograd.grad(y.float().square().mean(), [x, weights, *experts.parameters()])
        return y.detach()

    return call


def measured(calls: dict[str, Any], seconds: float) -> dict[str, list[float]]:
    """Seconds of every round of each way; as many rounds as fit, seven at least."""
    taken: dict[str, list[float]] = {way: [] for way in calls}
    names, until_s, rounds = list(calls), time.perf_counter() + seconds, 0
    while rounds < WARM + 7 or time.perf_counter() < until_s:
        for way in names[rounds % len(names) :] + names[: rounds % len(names)]:
            start_s = time.perf_counter()
            calls[way]()
            if rounds >= WARM:
                taken[way].append(time.perf_counter() - start_s)
        rounds += 1
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the rows here")
    parser.add_argument("--seconds", type=float, default=180.0, help="of all measurements, about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--calls", default=";".join(CALLS), help="separated by semicolons")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours.register(schedule="serial")
    shares = {"forward": 0.2, "forward+backward": 0.25, "one token, forward": 0.05}  # of the time, for each dtype
    for name in options.dtypes.split(","):
        dtype = DTYPES[name]
        modules = {way: experts_of(way, dtype) for way in WAYS}
        for what in options.calls.split(";"):
            tokens, train = CALLS[what]
            calls = {way: call_of(module, tokens, train, dtype) for way, module in modules.items()}
            results = {way: call() for way, call in calls.items()}
            far = max(float((results[way] - results[WAYS[0]]).abs().max() / results[WAYS[0]].abs().max())
                      for way in WAYS)  # fmt: skip
            if far > (1e-5 if dtype == torch.float32 else 3e-2):
                sys.exit(f"{what}, {name}: results differ by {far:.1e}")
            taken = measured(calls, options.seconds * shares[what])
            row: dict[str, Any] = {"what": what, "dtype": name, "rounds": len(taken[WAYS[0]]), "max_rel_err": far}
            row |= {f"{way}_ms": round(1e3 * median(found), 3) for way, found in taken.items()}
            for way in WAYS[1:]:
                ratios = [other / own for other, own in zip(taken[way], taken[WAYS[0]], strict=True)]
                row[f"x_{way}"] = round(median(ratios), 3)
            row |= {"threads": options.threads, "sizes": f"T {tokens} D {D} F {F} E {E} k {K}", "hardware": hardware(),
                    "torch": torch.__version__, "commit": commit(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip
            print(f"{what:20s} {name}  " + "  ".join(f"{key} {row[key]}" for key in row if key.endswith("_ms") or
                                                       key.startswith("x_")), flush=True)  # fmt: skip
            if options.out is not None:
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
