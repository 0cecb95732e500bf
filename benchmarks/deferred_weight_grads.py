"""Weight gradients beside the last exchange of backward, or before it: what the deferral saves.

    python benchmarks/deferred_weight_grads.py --out out/deferred.jsonl

Two ranks, one layer, the backward alone. With exchanges a, input gradients d and weight gradients w of one chunk, the
layer's backward takes 2a + d + w without deferral and a + d + max(a, w) with it: 4/3 where a = d = w. The emulated link
is given the rate at which one exchange takes as long as the weight gradient took without a link, times --balance.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moe_overlap import MoELayer
from moe_overlap.launch.launch import World, spawn
from moe_overlap.measure.machine import commit, hardware
from moe_overlap.measure.report import write_jsonl
from moe_overlap.schedule.builders import chunked
from moe_overlap.transport.emulated_link import EmulatedLinkTransport
from moe_overlap.transport.link import LinkSpec, NodeTopology
from moe_overlap.transport.process_group import ProcessGroupTransport

CHUNKS = (1, 2)
WARMUP = 2
NOISY = 1.3


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1024), ("hidden", 512), ("ffn", 4096), ("experts", 8), ("top-k", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--balance", type=float, default=1.0, help="time of an exchange over that of the weight gradient"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the rows to this .jsonl file")
    return parser.parse_args(argv)


def backward_of(
    layer: MoELayer, x_TD: torch.Tensor, dy_TD: torch.Tensor, world: World
) -> tuple[float, float, list[torch.Tensor]]:
    """(seconds of the backward, the slowest rank's; seconds of the weight gradient here; gradients)."""
    layer.zero_grad(set_to_none=True)
    x_TD = x_TD.detach().requires_grad_()
    y_TD = layer(x_TD)
    world.barrier()
    start_s = time.perf_counter()
    y_TD.backward(dy_TD)
    own = torch.tensor([time.perf_counter() - start_s])
    weight_s = sum(e.end_s - e.start_s for e in layer.last_events if e.action == "Ew0")
    assert x_TD.grad is not None
    grads = [x_TD.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    return max(float(one) for one in world.gather(own)), weight_s, grads


def run_rank(world: World, argv: Sequence[str]) -> int:
    """What both ranks do; rank 0 prints and writes."""
    options = parse(argv)
    torch.set_num_threads(1)
    torch.manual_seed(world.rank)
    assert world.group is not None
    x_TD, dy_TD = (torch.randn(options.tokens, options.hidden).bfloat16() for _ in range(2))

    def layer_on(link: LinkSpec | None, **schedule: Any) -> MoELayer:
        transport: Any = ProcessGroupTransport(world.group)
        if link is not None:
            transport = EmulatedLinkTransport(transport, link, NodeTopology(world_size=world.size, ranks_per_node=1))
        torch.manual_seed(7)
        return MoELayer(options.hidden, options.ffn, options.experts, options.top_k, transport=transport,
                        schedule=chunked(**schedule), dtype=torch.bfloat16)  # fmt: skip

    bare = layer_on(None, chunks=1)
    alone = [backward_of(bare, x_TD, dy_TD, world)[1] for _ in range(WARMUP + 5)][WARMUP:]
    rows_sent = options.tokens * options.top_k * (world.size - 1) / world.size
    times = torch.stack(world.gather(torch.tensor([statistics.median(alone)])))
    link = LinkSpec(
        bytes_per_s=rows_sent * options.hidden * 2 / (options.balance * float(times.max())), latency_s=50e-6
    )
    layers = {
        (chunks, defer): layer_on(link, chunks=chunks, defer_weight_grads=defer)
        for chunks in CHUNKS
        for defer in (True, False)
    }
    seconds: dict[Key, list[float]] = {key: [] for key in layers}
    grads: dict[Key, list[torch.Tensor]] = {}
    for i in range(WARMUP + options.repeats):
        for key in layers if i % 2 else reversed(layers):
            taken_s, _, grads[key] = backward_of(layers[key], x_TD, dy_TD, world)
            if i >= WARMUP:
                seconds[key].append(taken_s)
    rows = [row_of(options, link, key, seconds, grads) for key in layers]
    if world.rank == 0:
        for row in rows:
            times_text = " ".join(f"{row[key]:8.2f} ms" for key in ("time_ms_median", "time_ms_p10", "time_ms_p90"))
            print(f"chunks {row['chunks']}, deferred {row['deferred']!s:5}: {times_text}  x {row['speedup']:.3f} "
                  f"{row['flagged'] or ''}")  # fmt: skip
        if options.out is not None:
            write_jsonl(options.out, rows)
    return 0


Key = tuple[int, bool]  # chunks, deferred


def row_of(
    options: argparse.Namespace,
    link: LinkSpec,
    key: Key,
    seconds: dict[Key, list[float]],
    grads: dict[Key, list[torch.Tensor]],
) -> dict[str, Any]:
    """One row; `speedup` over the same chunks without deferral."""
    chunks, deferred = key
    tenths = statistics.quantiles(seconds[key], n=10)
    median_s = statistics.median(seconds[key])
    same = all(torch.equal(a, b) for a, b in zip(grads[key], grads[chunks, not deferred], strict=True))
    return {
        "unit": "backward of one layer", "chunks": chunks, "deferred": deferred, "time_ms_median": 1e3 * median_s,
        "time_ms_p10": 1e3 * tenths[0], "time_ms_p90": 1e3 * tenths[-1],
        "speedup": statistics.median(seconds[chunks, False]) / median_s, "bit_equal": same,
        "flagged": "noisy" if tenths[-1] > NOISY * tenths[0] else None, "link": f"emulated {link}", "ranks": 2,
        "threads": 1, "tokens": options.tokens, "hidden": options.hidden, "ffn": options.ffn,
        "experts": options.experts, "top_k": options.top_k, "dtype": "bf16", "repeats": options.repeats,
        "balance": options.balance, "hardware": hardware(), "torch": torch.__version__, "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(spawn(run_rank, sys.argv[1:], 2, timeout_s=120.0, program="deferred_weight_grads"))
