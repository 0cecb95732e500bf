"""From what a layer's tokens want to where its experts go: planners of one signature.

    planner(demand, topology, slots=, current=, budget=) -> Placement

demand: integers, the load of each expert [E] or the traffic of each rank [W, E]. slots: how many slots a rank has, one
number or one for each. current: the placement now, of which planners keep what can stay; a home leaves its rank only
where its rank has no slot of the expert any more. budget: how many experts' weights may cross a link
(`MigrationPlan.moves`); None: any number. The same arguments give the same placement on every rank: sums of integers
and one order of operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moe_overlap.errors import ConfigError
from moe_overlap.placement import packing
from moe_overlap.placement.churn import Cost, Ranks, settle
from moe_overlap.placement.demand import checked_budget, checked_current, checked_slots, checked_traffic
from moe_overlap.placement.flex import Flow, flex_slots
from moe_overlap.placement.placement import Placement
from moe_overlap.placement.selectors import LocalFirst
from moe_overlap.placement.topology import Topology

Slots = int | Sequence[int]


@dataclass(frozen=True)
class Asked:
    """What a planner was asked, checked: traffic int64 [W, E]."""

    traffic: np.ndarray
    topology: Topology
    slots: tuple[int, ...]
    current: Placement | None
    budget: int | None

    @property
    def num_experts(self) -> int:
        return int(self.traffic.shape[1])

    def settled(self, wanted: Ranks, *, interchange: bool = True, cost: Cost | None = None) -> Placement:
        return settle(
            wanted, self.traffic, self.topology, self.current, self.budget, interchange=interchange, cost=cost
        )

    def crossing(self, table: np.ndarray) -> float:
        """Rows that leave their rank, of a map int64 [W, E]."""
        return float(self.traffic[table == 0].sum())

    def start(self) -> Placement:
        """The current placement, or the experts spread over the slots in their order."""
        return self.current or spread(self.num_experts, self.slots)

    def homes(self, keep: bool) -> tuple[int, ...]:
        """The rank that has to have a slot of each expert; none where homes may move."""
        return self.start().home_ranks if keep else ()


def asked(demand: object, topology: Topology, slots: Slots, current: Placement | None, budget: int | None) -> Asked:
    """The arguments of a planner, checked. Raises ConfigError."""
    if not isinstance(topology, Topology):
        raise ConfigError("topology", topology, "a Topology")
    traffic = checked_traffic(demand, topology)
    experts = int(traffic.shape[1])
    by_rank = checked_slots(slots, experts, topology)
    return Asked(
        traffic, topology, by_rank, checked_current(current, experts, by_rank, topology), checked_budget(budget)
    )


def spread(num_experts: int, slots: Sequence[int]) -> Placement:
    """Expert i in the i-th slot, where every rank has as many experts as an even spread gives it, and room for."""
    return _spread(num_experts, tuple(slots))


@lru_cache(maxsize=16)  # equal for all layers of a model
def _spread(num_experts: int, slots: tuple[int, ...]) -> Placement:
    given = [0] * len(slots)
    while sum(given) < num_experts:
        free = [rank for rank, most in enumerate(slots) if given[rank] < most]
        for rank in free[: num_experts - sum(given)]:
            given[rank] += 1
    experts = iter(range(num_experts))
    return Placement.of_ranks([[next(experts) for _ in range(count)] for count in given])


@dataclass(frozen=True)
class Identity:
    """Every expert once, in order: no replica."""

    def __call__(self, demand: object, topology: Topology, *, slots: Slots, current: Placement | None = None,
                 budget: int | None = None) -> Placement:  # fmt: skip
        one = asked(demand, topology, slots, current, budget)
        return one.settled(spread(one.num_experts, one.slots).experts_of_ranks(), interchange=False)


@dataclass(frozen=True, kw_only=True)
class _Packed(ABC):
    """What plans many layers in one go. keep_homes: every home keeps its slot."""

    keep_homes: bool = False

    def __call__(self, demand: object, topology: Topology, *, slots: Slots, current: Placement | None = None,
                 budget: int | None = None) -> Placement:  # fmt: skip
        one = asked(demand, topology, slots, current, budget)
        return one.settled(self._wanted([one])[0], interchange=not self.keep_homes)

    def layers(self, loads: Sequence[object], topology: Topology, *, slots: Slots,
               current: Sequence[Placement] | None = None,
               budget: int | None = None) -> tuple[Placement, ...]:  # fmt: skip
        """One placement for each of the loads: the same as one call for each, in one go."""
        layers = _layers(loads, topology, slots, current, budget)
        wanted = self._wanted(layers)
        return tuple(one.settled(ranks, interchange=not self.keep_homes)
                     for one, ranks in zip(layers, wanted, strict=True))  # fmt: skip

    @abstractmethod
    def _wanted(self, layers: Sequence[Asked]) -> list[Ranks]:
        """The experts of each rank, for each of the layers."""


@dataclass(frozen=True)
class Eplb(_Packed):
    """EPLB: replicas by load, packed. groups: of experts in a row, each on one node, as many on all: its hierarchical
    policy, where ranks have equally many slots and nodes divide the groups and groups the experts. Otherwise, and where
    homes are kept, its global one: all ranks are one node. keep_homes: every home keeps its slot."""

    groups: int = 1

    def _wanted(self, layers: Sequence[Asked]) -> list[Ranks]:
        nodes, groups = self._nodes(layers[0])
        found = []
        for same in _by_homes(layers, self.keep_homes):
            loads = [layer.traffic.sum(axis=0).astype(np.float64).tolist() for layer in same]
            found += packing.eplb(loads, same[0].slots, same[0].homes(self.keep_homes), nodes=nodes, groups=groups,
                                  distinct=True)  # fmt: skip
        return [_split(flat, layers[0].slots) for flat in found]

    def _nodes(self, one: Asked) -> tuple[int, int]:
        nodes, experts, groups = one.topology.nodes, one.num_experts, self.groups
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ConfigError("groups", groups, "an integer of at least 1")
        fits = experts % groups == 0 and groups % nodes == 0 and len(set(one.slots)) == 1
        return (nodes, groups) if fits and not self.keep_homes else (1, 1)


@dataclass(frozen=True)
class Proportional(_Packed):
    """SYMI: as many slots as the expert's share of the tokens. contiguous: slots are filled expert by expert, as in the
    paper; else packed by load, none twice on a rank. keep_homes: every home keeps its slot."""

    contiguous: bool = False

    def _wanted(self, layers: Sequence[Asked]) -> list[Ranks]:
        if self.contiguous and self.keep_homes:
            raise ConfigError("keep_homes", True, "False where slots are filled expert by expert")
        found = []
        for same in _by_homes(layers, self.keep_homes):
            loads = [layer.traffic.sum(axis=0).astype(np.float64).tolist() for layer in same]
            found += packing.proportional(loads, same[0].slots, same[0].homes(self.keep_homes),
                                          contiguous=self.contiguous)  # fmt: skip
        return [_split(flat, layers[0].slots) for flat in found]


@dataclass(frozen=True)
class Flex:
    """FlexMoE: one change at a time while the balance ratio is above `threshold` (`flex.py`). keep_homes: every home
    keeps its slot, which takes more slots."""

    threshold: float = 1.2
    keep_homes: bool = False

    def __call__(self, demand: object, topology: Topology, *, slots: Slots, current: Placement | None = None,
                 budget: int | None = None) -> Placement:  # fmt: skip
        one = asked(demand, topology, slots, current, budget)
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not self.threshold >= 1:
            raise ConfigError("threshold", self.threshold, "a ratio of at least 1")
        start = one.start()
        table = np.array([np.bincount(np.array(own, dtype=np.int64), minlength=one.num_experts)
                          for own in start.experts_of_ranks()])  # fmt: skip
        flow = Flow.of(table, np.array(one.slots), one.traffic, topology, self.threshold)
        found = flex_slots(flow, np.array(start.home_ranks), threshold=self.threshold, budget=one.budget,
                           keep_homes=self.keep_homes)  # fmt: skip
        wanted = [np.repeat(np.arange(one.num_experts), row).tolist() for row in found]
        return settle(wanted, one.traffic, topology, start, None, interchange=False)


@dataclass(frozen=True)
class Affinity:
    """ExFlow (arXiv 2401.08383): every expert once, where most of its tokens are; needs the traffic [W, E] of ranks.
    The assignment is exact; where it ties, experts stay. `planners.affinity_layers` does it for a trace."""

    def __call__(self, demand: object, topology: Topology, *, slots: Slots, current: Placement | None = None,
                 budget: int | None = None) -> Placement:  # fmt: skip
        one = asked(demand, topology, slots, current, budget)
        experts = one.num_experts
        room = spread(experts, one.slots).slots_by_rank
        seat_rank = np.repeat(np.arange(len(room)), room)
        worth = one.traffic.T[:, seat_rank] * (experts + 1)  # [E, seats]
        if one.current is not None:
            worth += np.array(one.current.home_ranks)[:, None] == seat_rank[None, :]
        wanted: Ranks = [[] for _ in room]
        for expert, seat in enumerate(packing.assign(-worth)):
            wanted[seat_rank[seat]].append(expert)
        return one.settled(wanted, interchange=False, cost=one.crossing)


@dataclass(frozen=True)
class Shadow:
    """FasterMoE's shadows (PPoPP 2022): the k hottest experts get a slot on every rank, where tokens stay then. k is
    the first after which one more does not make its model's time less: with B_i the tokens, over all ranks, of the i-th
    hottest expert, that is 3 c B_k + 4 f B_k + k m, where c and f are the seconds of a token's forward and of its
    row, m those of an expert's weights. Figures: of the topology; as published, `Shadow.published`."""

    token_s: float | None = None
    row_s: float | None = None
    weights_s: float | None = None

    @classmethod
    def published(cls, hidden: int = 2048, alpha: float = 2.0, flops: float = 11.5e12, rate: float = 6.25e9) -> Shadow:
        """The figures of its public code: float32 rows, two matmuls at `flops` per second, `rate` bytes per second."""
        return cls(4 * alpha * hidden**2 / flops, 4 * hidden / rate, 8 * alpha * hidden**2 / rate)

    def __call__(self, demand: object, topology: Topology, *, slots: Slots, current: Placement | None = None,
                 budget: int | None = None) -> Placement:  # fmt: skip
        one = asked(demand, topology, slots, current, budget)
        load = one.traffic.sum(axis=0)
        start = spread(one.num_experts, one.slots)
        free = min(most - has for most, has in zip(one.slots, start.slots_by_rank, strict=True))
        hottest = np.argsort(-load, kind="stable")[: min(self.count(load, topology)[0], free)].tolist()
        wanted = [own + [expert for expert in hottest if expert not in own] for own in start.experts_of_ranks()]
        return settle(wanted, one.traffic, topology, one.current, one.budget, interchange=False, selector=LocalFirst())

    def count(self, load: np.ndarray, topology: Topology) -> tuple[int, float]:
        """(k, the model's time without shadows over that with them). load: [E]."""
        slow = 1.0 / topology.inter_bytes_per_s if topology.nodes > 1 else 1.0 / topology.intra_bytes_per_s
        token = topology.row_s if self.token_s is None else self.token_s
        row = topology.row_bytes * slow if self.row_s is None else self.row_s
        weights = topology.expert_bytes * slow if self.weights_s is None else self.weights_s
        times = [(3 * token + 4 * row) * int(tokens) + k * weights for k, tokens in enumerate(sorted(load)[::-1])]
        k = next((k for k in range(len(times) - 1) if times[k + 1] >= times[k]), len(times) - 1)
        return k, times[0] / times[k] if times[k] else 1.0


def affinity_layers(ids: object, num_experts: int, topology: Topology, *, slots: Slots,
                    current: Sequence[Placement] | None = None,
                    budget: int | None = None) -> tuple[Placement, ...]:  # fmt: skip
    """A placement for each layer of a trace: each expert where most of its tokens were one layer before (ExFlow).

    ids: integers [L, N], the first choice of N tokens in L layers. The first layer keeps its current placement, or has
    its experts in order.
    """
    table = np.asarray(ids)
    if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.integer):
        raise ConfigError("trace", getattr(table, "shape", None), "integers [layers, tokens]")
    if int(table.min()) < 0 or int(table.max()) >= num_experts:
        raise ConfigError("trace", int(table.max()), f"experts from 0 to {num_experts - 1}")
    if current is not None and len(current) != len(table):
        raise ConfigError("current", len(current), f"a placement for each of {len(table)} layers")
    found = [Identity()(np.bincount(table[0], minlength=num_experts), topology, slots=slots)
             if current is None else current[0]]  # fmt: skip
    for layer in range(1, len(table)):
        traffic = np.zeros((topology.world_size, num_experts), dtype=np.int64)
        np.add.at(traffic, (np.array(found[-1].home_ranks)[table[layer - 1]], table[layer]), 1)
        before = None if current is None else current[layer]
        found.append(Affinity()(traffic, topology, slots=slots, current=before, budget=budget))
    return tuple(found)


def _layers(loads: Sequence[object], topology: Topology, slots: Slots, current: Sequence[Placement] | None,
            budget: int | None) -> list[Asked]:  # fmt: skip
    if not len(loads):
        raise ConfigError("loads", loads, "a load for each of at least one layer")
    if current is not None and len(current) != len(loads):
        raise ConfigError("current", len(current), f"a placement for each of {len(loads)} layers")
    found = [asked(load, topology, slots, None if current is None else current[i], budget)
             for i, load in enumerate(loads)]  # fmt: skip
    if len({layer.num_experts for layer in found}) != 1:
        raise ConfigError("loads", [layer.num_experts for layer in found], "as many experts in every layer")
    return found


def _by_homes(layers: Sequence[Asked], keep: bool) -> list[list[Asked]]:
    """Runs of layers that one call of the compiled part can plan: all, unless each has homes of its own."""
    return [[layer] for layer in layers] if keep else [list(layers)]


def _split(flat: Sequence[int], slots: Sequence[int]) -> Ranks:
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in slots]


Planner = Callable[..., Placement]
PLANNERS: dict[str, Planner] = {
    "identity": Identity(), "flex": Flex(), "eplb": Eplb(), "proportional": Proportional(), "affinity": Affinity(),
    "shadow": Shadow(),
}  # fmt: skip
