"""Which ranks share a node, and what a row, an expert and a byte cost: what planners know of a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moe_overlap.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Topology:
    """W ranks, of which `ranks_per_node` in a row share a node (0: all of them).

    Seconds follow from: row_s, an expert's forward on one row; row_bytes and expert_bytes, of a row and of one expert's
    weights; intra_bytes_per_s and inter_bytes_per_s, the speed of a rank's link inside its node and to others. The
    defaults are those of a small expert (H 1024, F 4096, 2 matmuls, bfloat16) on a GPU of 100 TFLOP/s with NVLink and
    400 Gbit/s: replace them by measured ones.
    """

    world_size: int
    ranks_per_node: int = 0
    row_s: float = 1.7e-7
    row_bytes: int = 2048
    expert_bytes: int = 16 * 2**20
    intra_bytes_per_s: float = 450e9
    inter_bytes_per_s: float = 50e9

    def __post_init__(self) -> None:
        for name, least in (("world_size", 1), ("ranks_per_node", 0), ("row_bytes", 1), ("expert_bytes", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(name, value, f"an integer of at least {least}")
        if self.world_size % (self.ranks_per_node or self.world_size):
            raise ConfigError("ranks_per_node", self.ranks_per_node, f"a divisor of world_size ({self.world_size})")
        for name in ("row_s", "intra_bytes_per_s", "inter_bytes_per_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(name, value, "a finite number above 0")

    @property
    def node_size(self) -> int:
        return self.ranks_per_node or self.world_size

    @property
    def nodes(self) -> int:
        return self.world_size // self.node_size

    @property
    def node_of_ranks(self) -> np.ndarray:
        """int64 [W]."""
        return np.arange(self.world_size) // self.node_size

    @property
    def byte_s(self) -> np.ndarray:
        """float64 [W, W]: seconds of a byte from rank to rank; 0 to itself."""
        node = self.node_of_ranks
        found = np.where(node[:, None] == node[None, :], 1 / self.intra_bytes_per_s, 1 / self.inter_bytes_per_s)
        np.fill_diagonal(found, 0.0)
        return found
