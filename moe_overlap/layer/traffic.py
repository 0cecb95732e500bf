"""What a model's MoE layers send, and how evenly, over many training steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.replay import layers_of
from moe_overlap.layer.shares import SUMS, Shares, choice_sums
from moe_overlap.layer.stats import LastStep
from moe_overlap.measure.heat_map import write_heat_map
from moe_overlap.measure.report import append_jsonl
from moe_overlap.routing.loss_free import max_violation
from moe_overlap.transport.closing import closing_on_error


@dataclass(frozen=True, eq=False, kw_only=True)
class TrafficReport:
    """What all ranks of a layer counted, in `calls` training forwards.

    tokens_per_expert: int64 [E], choices that experts computed. bytes_WW: int64 [W, W], bytes of rows from rank to
    rank, dispatch and combine of the forwards (a backward moves as much again, less where no x needs a gradient), as
    the transports count them. inter_node_bytes: of them those that cross nodes, 0 where nodes are not known
    (`ranks_per_node` 0). max_violation_batch: the mean of the calls' MaxVio. shares: over all tokens (see `Shares`).
    """

    calls: int
    tokens_per_expert: torch.Tensor
    bytes_WW: np.ndarray
    inter_node_bytes: int
    ranks_per_node: int
    max_violation_batch: float
    shares: Shares

    @property
    def payload_bytes(self) -> int:
        return int(self.bytes_WW.sum())

    @property
    def max_violation(self) -> float:
        """MaxVio of the counts of all calls together (MaxVio_global; arXiv 2408.15664, eq. 4)."""
        return max_violation(self.tokens_per_expert)

    @property
    def max_over_mean(self) -> float:
        """Choices of the most wanted expert over the mean."""
        return 1.0 + self.max_violation

    def to_json(self) -> dict[str, Any]:
        """One flat row of numbers and lists."""
        return {
            "calls": self.calls,
            "tokens_per_expert": self.tokens_per_expert.tolist(),
            "max_over_mean": self.max_over_mean,
            "max_violation": self.max_violation,
            "max_violation_batch": self.max_violation_batch,
            "payload_bytes": self.payload_bytes,
            "inter_node_bytes": self.inter_node_bytes,
            "bytes": self.bytes_WW.tolist(),
            "ranks_per_node": self.ranks_per_node,
            "local_share": self.shares.local_share,
            "rank_share": self.shares.rank_share,
            "distinct_ranks": self.shares.distinct_ranks,
            "distinct_nodes": self.shares.distinct_nodes,
        }


class _Counter:
    """The calls of one layer since the last report, of this rank."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.begin()

    def begin(self) -> None:
        placement = self.layer.dispatcher.placement
        self.calls = 0
        self.per_node = 0
        self.inter_node_bytes = 0
        self.to_ranks = np.zeros(placement.world_size, dtype=np.int64)
        self.counts_E = torch.zeros(placement.num_experts, dtype=torch.int64)
        self.violations = torch.zeros((), dtype=torch.float64)
        self.sums = torch.zeros(len(SUMS), dtype=torch.int64)

    @torch.compiler.disable(reason="it counts calls: one graph break")
    def add(self, last: LastStep) -> None:
        """A forward call, unless it is none of training. Nothing here waits for a device."""
        if not (self.layer.training and torch.is_grad_enabled()):
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(last.topk_ids_TK):
            return  # a transform of torch.func, whose values are not there
        placement, (rank, per_node) = self.layer.dispatcher.placement, last.place
        self.calls += 1
        self.per_node = per_node
        self.inter_node_bytes += last.inter_node_bytes
        self.to_ranks += np.array(last.bytes_to_ranks, dtype=np.int64)
        counts_E = last.tokens_per_expert(placement)
        self.counts_E = self.counts_E.to(counts_E.device) + counts_E
        most, mean = counts_E.max().double(), counts_E.double().mean()
        self.violations = self.violations.to(most.device) + torch.where(mean > 0, most / mean - 1, 0.0)
        sums = choice_sums(last.topk_ids_TK, placement, rank, per_node)
        self.sums = self.sums.to(sums.device) + sums

    def report(self) -> TrafficReport:
        """Of all ranks of the layer, which call this together."""
        transport, ranks = self.layer.transport, self.to_ranks.shape[0]
        bytes_WW = torch.zeros(ranks, ranks, dtype=torch.int64)
        bytes_WW[transport.rank] = torch.from_numpy(self.to_ranks)
        inter = torch.tensor([self.inter_node_bytes])
        said = torch.cat([bytes_WW.reshape(-1), inter, self.sums.cpu()]).to(next(self.layer.parameters()).device)
        if ranks > 1:
            with closing_on_error(transport, "traffic"):
                said = transport.all_reduce(said, action="traffic").wait()
        whole, crossing, sums = said.cpu().split([ranks * ranks, 1, len(SUMS)])
        return TrafficReport(
            calls=self.calls,
            tokens_per_expert=self.counts_E.cpu(),
            bytes_WW=whole.reshape(ranks, ranks).numpy(),
            inter_node_bytes=int(crossing),
            ranks_per_node=self.per_node,
            max_violation_batch=float(self.violations) / self.calls if self.calls else 0.0,
            shares=Shares.of(sums, nodes_known=self.per_node > 0),
        )


class TrafficMonitor:
    """Counts what the layers of a model send and compute in training.

        monitor = TrafficMonitor(model, sink="traffic.jsonl")
        ...                                       # training steps
        reports = monitor.report(step=100)        # {name of the layer: TrafficReport}, of all ranks
        monitor.heat_map("traffic.png", reports)

    Each forward call in training mode with gradients enabled counts once: no recompute, no evaluation, no calibration
    of schedule="auto", no call of a copy; padding and dropped choices are in no number. Counting sends nothing and
    waits for nothing; `report` is collective.

    sink: a file to which `report` appends a JSON line for each layer, on the first rank of the layer's group (and of
    its replicas). Raises ConfigError for a model without MoE layers.
    """

    def __init__(self, model: nn.Module, *, sink: str | Path | None = None) -> None:
        self._sink = None if sink is None else Path(sink)
        self._counters: dict[str, _Counter] = {}
        self._watching: list[tuple[MoELayer, Any]] = []
        for name, layer in layers_of(model).items():
            counter = self._counters[name] = _Counter(layer)
            watcher = partial(_Counter.add, counter)
            layer.watch(watcher)
            self._watching.append((layer, watcher))

    def report(self, **marks: object) -> dict[str, TrafficReport]:
        """What has been counted since the last report, over all ranks; the counts begin anew. Collective; raises
        MoeTransportError. marks: what else the lines of the sink say (`step=100`)."""
        reports = {}
        for name, counter in self._counters.items():
            reports[name] = found = counter.report()
            counter.begin()
            if self._sink is not None and _writes(counter.layer):
                append_jsonl(self._sink, [{**marks, "layer": name, **found.to_json()}])
        return reports

    def heat_map(self, path: str | Path, reports: Mapping[str, TrafficReport]) -> None:
        """A PNG of the bytes between each two ranks, summed over the layers of `reports`, by the rank that writes the
        sink. Not collective. Needs matplotlib (the extra `cli`)."""
        layer = next(iter(self._counters.values())).layer
        if not _writes(layer):
            return
        found = list(reports.values())
        title = f"rows of {sum(one.calls for one in found)} training forwards in {len(found)} layer(s)"
        bytes_WW = np.sum([one.bytes_WW for one in found], axis=0)
        write_heat_map(Path(path), bytes_WW, ranks_per_node=found[0].ranks_per_node, title=title)

    def close(self) -> None:
        """Count no more."""
        while self._watching:
            layer, watcher = self._watching.pop()
            layer._left.watchers.remove(watcher)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _writes(layer: MoELayer) -> bool:
    """Whether this rank is the first of the layer's, and of the replicas."""
    replicas = layer.ownership.replicas
    return layer.transport.rank == 0 and (replicas is None or replicas.transport.rank == 0)
