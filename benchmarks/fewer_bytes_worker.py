"""One build's two ranks of `fewer_bytes.py`: requests in, answers out, a JSON line each.

Uses only what builds with and without deduplication have in common.
"""

from __future__ import annotations

import json
import queue
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from moe_overlap import MoELayer, ShortcutBlock
from moe_overlap.ops import workspace
from moe_overlap.schedule.builders import chunked
from moe_overlap.transport.accounting import CommCpu
from moe_overlap.transport.emulated_link import EmulatedLinkTransport
from moe_overlap.transport.link import LinkSpec, NodeTopology
from moe_overlap.transport.nocomm import NoCommTransport
from moe_overlap.transport.process_group import ProcessGroupTransport

RANKS = 2
SAMPLES = 64
LIMIT_S = 300.0  # of a request


class Op(nn.Module):
    """A backbone op of about a third of the experts' work."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(a, b, bias=False, dtype=dtype) for a, b in ((hidden, width), (width, hidden)))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.down(torch.nn.functional.silu(self.up(h)))


class Rank:
    """The rows of one rank, each over the link and without a wire, with equal weights in every build."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.dtype = getattr(torch, options["dtype"])
        torch.manual_seed(100 + dist.get_rank())
        x = torch.randn(options["tokens"], options["hidden"])
        self.x, self.dy = x.to(self.dtype), torch.randn_like(x).to(self.dtype)
        self.core = ProcessGroupTransport(timeout_s=120.0)
        self.link: Any = self.core
        self.modules: dict[tuple[str, str], nn.Module] = {}

    def set_link(self, bytes_per_s: float, latency_s: float) -> None:
        spec = LinkSpec(bytes_per_s=bytes_per_s, latency_s=latency_s)
        self.link = EmulatedLinkTransport(
            ProcessGroupTransport(timeout_s=120.0), spec, NodeTopology(world_size=RANKS, ranks_per_node=1)
        )
        self.modules = {key: module for key, module in self.modules.items() if key[1] == "none"}

    def module(self, row: str, wire: str) -> nn.Module:
        if (row, wire) not in self.modules:
            # A transport belongs to one configuration: all rows of one wire share it but for those with another name.
            transport = self.link if wire == "link" else NoCommTransport(self.core)
            self.modules[row, wire] = self._build(row, transport)
        return self.modules[row, wire]

    def _build(self, row: str, transport: Any) -> nn.Module:
        torch.manual_seed(7)  # as all ranks: each keeps its own of the experts
        o = self.options
        name, _, number = row.rstrip(")").partition("(")
        dedup = {"dedup": o["dedup"]} if o["dedup"] else {}
        shared = o["ffn"] if name.startswith("shared") else None
        schedule: Any = row if name in ("serial", "chunked", "shared_expert") else "serial"
        if name == "shared_chunked":
            schedule = chunked(int(number), shared=True)
        layer = MoELayer(o["hidden"], o["ffn"], o["experts"], o["top_k"], transport=transport, schedule=schedule,
                         shared_expert_size=shared, dtype=self.dtype, **dedup)  # fmt: skip
        if name != "shortcut":
            return layer
        ops = [Op(o["hidden"], 4 * o["ffn"], self.dtype) for _ in range(3)]
        return ShortcutBlock(ops, layer, tap=0, slot=int(number))

    def step(self, row: str, phase: str, wire: str) -> list[torch.Tensor | None]:
        """The results of one step."""
        module = self.module(row, wire)
        if phase == "infer":
            with torch.no_grad():
                return [module(self.x)]
        x = self.x.clone().requires_grad_()
        y = module(x)
        y.backward(self.dy)
        results = [y, x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
        for parameter in module.parameters():
            parameter.grad = None
        return results

    def rows_peak(self, row: str, phase: str) -> float:
        """MB of row buffers from the workspace pool at the worst moment of a step; the gradients of weights, which have
        three dimensions, are no rows."""
        pool, real = workspace.POOL, workspace.empty
        of_weights: set[int] = set()
        peak = 0

        def counted(shape: Any, **options: Any) -> torch.Tensor:
            nonlocal peak
            tensor = real(shape, **options)
            pointer = tensor.untyped_storage().data_ptr()
            (of_weights.add if len(shape) == 3 else of_weights.discard)(pointer)
            used = sum(
                size for size, storages in pool._storages.items() for storage in storages
                if not workspace._only_the_pool_holds(storage) and storage.data_ptr() not in of_weights
            )  # fmt: skip
            peak = max(peak, used)
            return tensor

        self.step(row, phase, "link")
        pool.clear()
        workspace.empty = counted
        try:
            self.step(row, phase, "link")
        finally:
            workspace.empty = real
        return peak / 1e6

    def answer(self, request: dict[str, Any]) -> Any:
        if request["do"] == "peak":
            peak = torch.tensor([self.rows_peak(request["row"], request["phase"])], dtype=torch.float64)
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
            return peak.item()
        if request["do"] == "link":
            self.set_link(request["bytes_per_s"], request["latency_s"])
            return None
        row, phase = request["row"], request["phase"]
        if request["do"] == "check":
            self.step(row, phase, "link")
            return _figures(self.step(row, phase, "link"))
        wire = request["wire"]
        stats = (self.link if wire == "link" else self.core).stats
        self.module(row, wire)
        before = (stats.payload_bytes, getattr(stats, "row_meta_bytes", 0))
        dist.barrier()
        start = time.perf_counter()
        with CommCpu() as cpu:
            self.step(row, phase, wire)
        seconds = torch.tensor([time.perf_counter() - start, cpu.seconds], dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        sent = torch.tensor([stats.payload_bytes - before[0], getattr(stats, "row_meta_bytes", 0) - before[1]])
        mean = sent.to(torch.float64)
        dist.all_reduce(mean)
        if wire == "none":  # local copies send nothing: what the plan would have sent
            mean[0] = RANKS * self._planned_bytes(row, phase)
        per_token = mean[0].item() / RANKS / (4 if phase == "train" else 2) / self.x[0].nbytes / len(self.x)
        return {"seconds": seconds[0].item(), "comm_cpu_s": seconds[1].item(), "payload_bytes": mean[0].item() / RANKS,
                "row_meta_bytes": mean[1].item() / RANKS, "rows_per_token": per_token}  # fmt: skip

    def _planned_bytes(self, row: str, phase: str) -> float:
        module = self.module(row, "none")
        layer = module.moe if isinstance(module, ShortcutBlock) else module
        assert isinstance(layer, MoELayer)
        sent = torch.tensor([float(layer.stats().payload_bytes)], dtype=torch.float64)
        dist.all_reduce(sent)
        return sent.item() / RANKS * (2 if phase == "train" else 1)


def _figures(tensors: list[torch.Tensor | None]) -> list[float]:
    """Of each tensor some of its values, from all over it, as parts of its largest."""
    found: list[float] = []
    for tensor in tensors:
        assert tensor is not None
        flat = tensor.detach().double().reshape(-1)
        some = flat[torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long()]
        found += (some / flat.abs().max().clamp(min=1e-30)).tolist()
    return found


def main(rank: int, store_path: str, options: dict[str, Any], requests: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store_path, RANKS), rank=rank, world_size=RANKS)
    ranks = Rank(options)
    while True:
        request = requests[rank].get(timeout=2 * LIMIT_S)
        if request is None:
            break
        answer = ranks.answer(request)
        if rank == 0:
            answers.put(answer)
    dist.destroy_process_group()


if __name__ == "__main__":
    context = mp.get_context("spawn")
    queues, back = [context.Queue() for _ in range(RANKS)], context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/store", json.loads(sys.argv[1]), queues, back)
        world = mp.spawn(main, arguments, nprocs=RANKS, join=False, daemon=True)
        for line in sys.stdin:
            for given in queues:
                given.put(json.loads(line))
            until = time.monotonic() + LIMIT_S
            while True:
                try:
                    print(json.dumps(back.get(timeout=1.0)), flush=True)
                    break
                except queue.Empty:
                    if world.join(0.01) or time.monotonic() > until:
                        sys.exit(f"no answer to {line.strip()}")
        for given in queues:
            given.put(None)
        world.join()
