"""Experts in host memory on one card: from how many rows an expert on are the copies of its weights hidden?

    python benchmarks/gpu_offload.py [--out FILE] [--rows 512,2048,4096,8192,16384]

A layer of EXPERTS experts in bfloat16, forward and backward, in as many chunks by experts: `away` with its weights in
pinned memory, whose gradients come down again, beside the same schedule with all of it on the card. Results are
compared bit for bit first; what differs has no time. Rows, kind "offload": before anything is timed the crossover
that a recorded step predicts (`MoELayer.explain` says the same); for each number of rows an expert the time of both,
and whether the copies were `hidden`, all but those of the first weights of each phase and the last gradients, which
nothing can hide; last the numbers of rows between which copies began to hide. There is no optimizer step in it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_process, gpu_timing  # noqa: E402
from moe_overlap import MoELayer  # noqa: E402
from moe_overlap.layer.offload_text import measured_shape  # noqa: E402
from moe_overlap.measure.timeline import record  # noqa: E402
from moe_overlap.planning.offload import OffloadShape  # noqa: E402

DEVICE, DTYPE = "cuda", torch.bfloat16
HIDDEN, FFN, EXPERTS, TOP_K = 4096, 4096, 8, 2
ROWS = (512, 2048, 4096, 8192, 16384)
BARE, SLACK = 3, 1.25
"""Groups whose copies stay bare in a step, and how many times as long as these `away` may take more to be hidden."""


class Pair:
    """The same layer twice, its weights on the host and on the card."""

    def __init__(self) -> None:
        options: dict[str, Any] = {"schedule": f"chunked({EXPERTS},experts)", "device": DEVICE, "dtype": DTYPE}
        torch.manual_seed(0)
        self.resident = MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, **options)
        self.away = MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, expert_offload="host", **options)
        self.away.load_state_dict(self.resident.state_dict())

    def inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x and the gradient of y, of so many tokens that an expert has `rows` rows on average."""
        generator = torch.Generator(device=DEVICE).manual_seed(rows)
        shape = rows * EXPERTS // TOP_K, HIDDEN
        x, dy = (torch.randn(shape, device=DEVICE, generator=generator).to(DTYPE) for _ in range(2))
        return x, dy

    def check(self, rows: int) -> None:
        """Raises ValueError unless both have the same bits."""
        x, dy = self.inputs(rows)
        found = [[out.detach(), *back] for out, *back in (step(layer, x, dy) for layer in (self.resident, self.away))]
        for place, (one, other) in enumerate(zip(*found, strict=True)):
            if not torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8)):
                raise ValueError(
                    f"result {place} (y, dx, gradients of parameters) has not the bits of the layer at home"
                )

    def predicted(self, rows: int) -> OffloadShape:
        """What a recorded forward says of copies and rows. Raises ValueError where it says nothing."""
        x, _ = self.inputs(rows)
        with torch.no_grad(), record():
            self.away(x)
        last = self.away._last_step
        shape = None if last is None else measured_shape(self.away.expert_weights, last)
        if shape is None:
            raise ValueError("the recorded step has no copies or no rows")
        return shape


def phases(layer: MoELayer, x: torch.Tensor, dy: torch.Tensor) -> gpu_timing.Phases:
    """(forward, backward) of a layer: the gradients of x and of all parameters."""
    parameters = list(layer.parameters())

    def forward() -> tuple[torch.Tensor, Any]:
        leaf = x.detach().requires_grad_()
        out = layer(leaf)
        return out, (leaf, out)

    def backward(saved: Any) -> tuple[torch.Tensor, ...]:
        leaf, out = saved
        return torch.autograd.grad(out, [leaf, *parameters], dy)

    return forward, backward


def step(layer: MoELayer, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    forward, backward = phases(layer, x, dy)
    out, saved = forward()
    return out, *backward(saved)


def measure(pair: Pair, rows: int, copy_s: float) -> dict[str, Any]:
    """The row of one number of rows. copy_s: seconds in which a group of experts comes up."""
    pair.check(rows)
    x, dy = pair.inputs(rows)
    times = gpu_timing.two_phases({name: phases(getattr(pair, name), x, dy) for name in ("resident", "away")})
    total = {name: sum(phase.median_s for phase in both) for name, both in times.items()}
    bare_s = BARE * copy_s
    return {
        "ms": round(total["away"] * 1e3, 3),
        "resident_ms": round(total["resident"] * 1e3, 3),
        "bare_ms": round(bare_s * 1e3, 3),
        "hidden": total["away"] - total["resident"] <= SLACK * bare_s,
    }


def crossover(hidden: dict[int, bool]) -> dict[str, int | None]:
    """Between which numbers of rows copies began to hide: the last with which they did not, the first from which on
    they always did; None where there is none."""
    bare = [rows for rows, well in hidden.items() if not well]
    above = [rows for rows in hidden if not bare or rows > max(bare)]
    return {"not_hidden_rows": max(bare, default=None), "hidden_rows": min(above, default=None)}


def main(argv: Sequence[str] | None = None) -> int:
    found = gpu_timing.options(__doc__.splitlines()[0], argv, rows=",".join(map(str, ROWS)))
    if reason := gpu_process.no_gpu():
        print(f"gpu_offload: not run: {reason}", file=sys.stderr)
        return 2
    results, about = gpu_timing.Results(found.out), {"kind": "offload", "case": f"{EXPERTS} experts {HIDDEN}x{FFN}"}
    asked = sorted(int(word) for word in found.rows.split(","))
    pair = Pair()
    pair.predicted(asked[0])  # compiles
    shape = pair.predicted(asked[len(asked) // 2])
    copy_s = shape.bytes_per_expert / shape.bytes_per_s
    results.row(**about, predicted_rows=round(shape.crossover_rows), bytes_per_s=round(shape.bytes_per_s),
                row_us=round(shape.row_s * 1e6, 3))  # fmt: skip
    hidden: dict[int, bool] = {}
    for rows in asked:
        try:
            if time.monotonic() > found.end_s:
                raise TimeoutError("the time is over")
            row = measure(pair, rows, copy_s)
            hidden[rows] = row["hidden"]
        except Exception as error:  # the others go on
            row = {"result": f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        results.row(**about, rows_per_expert=rows, **row)
    results.row(**about, predicted_rows=round(shape.crossover_rows), **crossover(hidden))
    return 0


if __name__ == "__main__":
    sys.exit(main())
