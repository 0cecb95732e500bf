"""What planners plan for, checked: loads of experts, traffic of ranks, and how evenly a placement carries them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_overlap.errors import ConfigError
from moe_overlap.placement.placement import Placement
from moe_overlap.placement.topology import Topology

MOST_COUNT = 2**40  # of one expert, so that sums stay exact in float64


def checked_traffic(demand: object, topology: Topology) -> np.ndarray:
    """int64 [W, E]: tokens of each rank for each expert, from that or from a load [E], which all ranks then have equal
    parts of. Raises ConfigError("demand") for anything but integers of at least 0."""
    try:
        table = np.asarray(demand)
    except (TypeError, ValueError, OverflowError):
        table = np.empty(0, dtype=object)
    if table.ndim not in (1, 2) or not table.size or not np.issubdtype(table.dtype, np.integer):
        raise ConfigError("demand", demand, "integers [E], or [W, E] by rank")
    if int(table.min()) < 0 or int(table.max()) > MOST_COUNT:
        raise ConfigError("demand", int(table.min() if table.min() < 0 else table.max()), f"from 0 to {MOST_COUNT}")
    ranks = topology.world_size
    if table.ndim == 2:
        if table.shape[0] != ranks:
            raise ConfigError("demand", table.shape, f"a row for each of {ranks} ranks")
        return table.astype(np.int64)
    source = np.arange(ranks)[:, None]
    return (table[None, :] * (source + 1)) // ranks - (table[None, :] * source) // ranks


def checked_slots(slots: int | Sequence[int], num_experts: int, topology: Topology) -> tuple[int, ...]:
    """The slots of each rank, from that or from one number for all. ConfigError where they cannot hold the experts."""
    ranks = topology.world_size
    by_rank = (slots,) * ranks if isinstance(slots, int) else slots
    if not isinstance(by_rank, list | tuple) or len(by_rank) != ranks:
        raise ConfigError("slots", slots, f"a number of slots, or one for each of {ranks} ranks")
    if any(isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= 2**20 for one in by_rank):
        raise ConfigError("slots", slots, "integers of at least 0")
    if sum(by_rank) < num_experts:
        raise ConfigError("slots", slots, f"at least {num_experts} together, one for each expert")
    return tuple(by_rank)


def checked_current(
    current: Placement | None, num_experts: int, slots: tuple[int, ...], topology: Topology
) -> Placement | None:
    """The placement to start from. ConfigError where it is of other experts or ranks, or has more slots than there
    are."""
    if current is None:
        return None
    if not isinstance(current, Placement) or (current.num_experts, current.world_size) != (num_experts, len(slots)):
        raise ConfigError("current", current, f"a Placement of {num_experts} experts on {len(slots)} ranks")
    if any(has > most for has, most in zip(current.slots_by_rank, slots, strict=True)):
        raise ConfigError("current", current.slots_by_rank, f"at most {slots} slots on the ranks")
    return current


def checked_budget(budget: int | None) -> int | None:
    """Expert weights that may cross a link; None: any number."""
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
        raise ConfigError("budget", budget, "None, or a number of moves of at least 0")
    return budget


def rank_traffic(placement: Placement, traffic: np.ndarray) -> np.ndarray:
    """float64 [W, W]: tokens from rank to rank, as the placement's selector shares them out, not rounded. traffic:
    int64 [W, E]."""
    shares = placement.selector.shares(placement).astype(np.float64)  # [W, P]
    total = _summed(shares, placement.expert_of_slot, traffic.shape[1])
    by_slot = traffic[:, placement.expert_of_slot] * (shares / total[:, placement.expert_of_slot])
    return _summed(by_slot, placement.rank_of_slots, placement.world_size)


def _summed(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """float64 [W, groups]: the columns of `values`, [W, P], of each group, added up in their order. `np.add.at` does
    the same and takes a hundred times as long for many ranks."""
    found = np.zeros((groups, len(values)))
    for one, column in zip(group.tolist(), np.ascontiguousarray(values.T), strict=True):
        found[one] += column
    return np.ascontiguousarray(found.T)


def rank_load(placement: Placement, traffic: np.ndarray) -> np.ndarray:
    """float64 [W]: tokens that each rank's experts get."""
    found: np.ndarray = rank_traffic(placement, traffic).sum(axis=0)
    return found


def balance_ratio(load: np.ndarray) -> float:
    """The most over the mean (FlexMoE, SIGMOD 2023, equation 6); 1 where there is nothing."""
    mean = float(load.mean())
    return float(load.max()) / mean if mean > 0 else 1.0


def step_s(placement: Placement, traffic: np.ndarray, topology: Topology, *, shared: bool = True) -> float:
    """Predicted seconds of one training step of the layer, nothing overlapped: of the slowest rank, its experts forward
    and backward (3 forwards), its rows in dispatch, combine and their adjoints (4 times, the busier of what it sends
    and what it receives), and, if `shared`, for its experts with slots on several ranks an exchange of gradients, at
    the slowest link among these (FlexMoE, equations 5 and 7 to 9)."""
    pairs = rank_traffic(placement, traffic)
    bytes_s = topology.byte_s * topology.row_bytes
    wire = np.maximum((pairs * bytes_s).sum(axis=0), (pairs * bytes_s).sum(axis=1))
    seconds = 3 * topology.row_s * pairs.sum(axis=0) + 4 * wire
    if shared:
        for slots in placement.slots_of_expert:
            ranks = sorted(set(placement.rank_of_slots[list(slots)].tolist()))
            seconds[ranks] += sync_s(ranks, topology)
    return float(seconds.max())


def sync_s(ranks: Sequence[int], topology: Topology) -> float:
    """Seconds of the exchange of one expert's gradients among its ranks: 2 (n - 1) / n of its bytes (a ring)."""
    count = len(ranks)
    if count < 2:
        return 0.0
    one_node = ranks[0] // topology.node_size == ranks[-1] // topology.node_size
    rate = topology.intra_bytes_per_s if one_node else topology.inter_bytes_per_s
    return 2 * (count - 1) / count * topology.expert_bytes / rate
