"""What an all-gather of rows could save where a token chooses more experts than there are ranks.

    python benchmarks/gather_form.py --out out/gather.jsonl

The third way beside plain and deduplicated exchanges (MegaScale-MoE, arXiv 2505.11432): every rank gets all tokens of
all others, computes what it has experts for, and the partial sums are added up in the order of ranks on their way back.
It needs no histograms of distinct rows, no maps of the sender's rows and no copies of them; ids, weights, the maps of
the experts and the sums over a row's experts are the same. What it sends more follows from
1 - C(E - E/W, k) / C(E, k), the chance that a token has an expert on a rank.

Measured on one rank, one thread: the parts that it would do without (`histograms_ms`, `maps_ms`, `copies_ms`, and
`sum_ms` less what a sum without maps takes, `plain_sum_ms`) beside the experts of the step, `experts_ms`; so
`saved` = saved parts / experts is what a step in which everything else took no time could gain at best. `more_bytes`:
rows it would send beyond the deduplicated ones, as a part of these.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from moe_overlap import ops
from moe_overlap.agreement.counts import block_counts, block_counts_of_rows
from moe_overlap.agreement.distinct import DistinctPlan, distinct_plan
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.measure.machine import hardware
from moe_overlap.measure.report import write_jsonl
from moe_overlap.planning.shapes import distinct_ranks
from moe_overlap.schedule.distinct_maps import TokenMaps

TOKENS, HIDDEN, FFN, EXPERTS, TOP_K = 1024, 512, 2048, 32, 8
WORLDS = (2, 4)
REPEATS = 30


def ms(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median milliseconds, after a first run."""
    work()
    found = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        work()
        found.append(time.perf_counter() - start_s)
    return round(1e3 * median(found), 4)


def plan_of(ids: Sequence[torch.Tensor], experts: int) -> DistinctPlan:
    """Of rank 0, in one chunk; ids: int32 [T, K] of each rank."""
    tables = [[one.numpy() for one in block_counts_of_rows(mine, experts, len(ids))] for mine in ids]
    counts, first, last = (Counts.of(np.stack(found), 0) for found in zip(*tables, strict=True))
    exchange = ExchangePlan(rank=0, world_size=len(ids), step=1, phase="forward", grad_enabled=False,
                            x_requires_grad=False, counts=counts, dedup=1, first=first, last=last)  # fmt: skip
    return distinct_plan(exchange, 1)


def measure(world: int, repeats: int = REPEATS) -> dict[str, Any]:
    """One row of the table."""
    draw = torch.Generator().manual_seed(world)
    ids = [torch.rand(TOKENS, EXPERTS, generator=draw).topk(TOP_K).indices.to(torch.int32) for _ in range(world)]
    plan, mine = plan_of(ids, EXPERTS), ids[0]
    x = torch.randn(TOKENS, HIDDEN, generator=draw).bfloat16()
    maps = TokenMaps(plan, mine)
    rows, back = plan.outgoing_rows + plan.own_rows, maps.returning
    returned = x[maps.outgoing[1]]
    everyone = torch.arange(world * TOKENS, dtype=torch.int32).view(world, TOKENS).T.contiguous()
    partial = torch.randn(world * TOKENS, HIDDEN, generator=draw).bfloat16()
    local = EXPERTS // world
    w_in = torch.randn(local, 2 * FFN, HIDDEN, generator=draw).bfloat16()
    w_out = torch.randn(local, HIDDEN, FFN, generator=draw).bfloat16()
    total = plan.expert_total
    at_expert = torch.randn(total, HIDDEN, generator=draw).bfloat16()
    ends = torch.arange(1, local + 1, dtype=torch.int32) * (total // local)

    def make_maps() -> None:
        made = TokenMaps(plan, mine)
        _ = made.outgoing, made.returning

    row: dict[str, Any] = {
        "ranks": world, "tokens": TOKENS, "hidden": HIDDEN, "ffn": FFN, "experts": EXPERTS, "top_k": TOP_K,
        "dtype": "bf16", "repeats": repeats, "hardware": hardware(),
        "histograms_ms": round(ms(lambda: block_counts_of_rows(mine, EXPERTS, world), repeats)
                               - ms(lambda: block_counts(mine, EXPERTS), repeats), 4),
        "maps_ms": ms(make_maps, repeats),
        "copies_ms": ms(lambda: ops.pack(x, maps.outgoing[1][:rows]), repeats),
        "sum_ms": ms(lambda: ops.combine(returned, back), repeats),
        "plain_sum_ms": ms(lambda: ops.combine(partial, everyone), repeats),
        "experts_ms": ms(lambda: ops.expert_mlp(at_expert, w_in, w_out, ends, kind="swiglu"), max(3, repeats // 10)),
    }  # fmt: skip
    saved_ms = row["histograms_ms"] + row["maps_ms"] + row["copies_ms"] + max(0.0, row["sum_ms"] - row["plain_sum_ms"])
    return row | {
        "saved": round(saved_ms / row["experts_ms"], 5),
        "more_bytes": round((world - 1) / distinct_ranks(EXPERTS, world, TOP_K) - 1, 5),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gather.jsonl"), help="JSONL file of the rows")
    out = parser.parse_args(argv).out
    torch.set_num_threads(1)
    rows = []
    for world in WORLDS:
        rows.append(measure(world))
        write_jsonl(out, rows)  # so far
        print(rows[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
