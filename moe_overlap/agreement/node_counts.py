"""What a rank knows of the (token, node) pairs of a step: its own, and those of all ranks for its node.

With these it knows which rows it will be sent to pass on, and how many of them go to each rank of its node. Letters as
in `plan.py`; L ranks of a node, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_overlap.agreement.counts import BLOCKS


@dataclass(frozen=True, eq=False, kw_only=True)
class NodeCounts:
    """sent: int64 [BLOCKS, N], pairs of this rank. received: int64 [W, BLOCKS], pairs of each rank for this node.
    inside: int64 [W, BLOCKS, L], of each rank the (token, rank) pairs for each rank of this node."""

    sent: np.ndarray
    received: np.ndarray
    inside: np.ndarray

    @classmethod
    def of(cls, node_rows: np.ndarray, rank_rows: np.ndarray, rank: int) -> NodeCounts:
        """From the pairs of all ranks, int64 [W, BLOCKS, N] and, by rank, [W, BLOCKS, W]."""
        nodes = node_rows.shape[2]
        node = rank * nodes // len(node_rows)
        return cls(sent=node_rows[rank], received=node_rows[:, :, node], inside=_by_node(rank_rows, nodes)[:, :, node])

    @classmethod
    def heard(cls, node_rows: np.ndarray, parts: np.ndarray) -> NodeCounts:
        """From this rank's own pairs [BLOCKS, N] and what all ranks said to it (`parts_of`), int64 [W, n]."""
        both = parts.reshape(len(parts), BLOCKS, -1)
        return cls(sent=node_rows, received=both[:, :, 0], inside=both[:, :, 1:])

    def impossible(self) -> np.ndarray:
        """bool [W]: the ranks whose pairs for this node cannot be."""
        return _impossible(self.received[:, :, None], self.inside[:, :, None])


def parts_of(node_rows: np.ndarray, rank_rows: np.ndarray) -> np.ndarray:
    """int64 [W, BLOCKS * (1 + L)]: what one rank says to every rank, from its pairs [BLOCKS, N] and [BLOCKS, W]."""
    rows = _by_node(rank_rows[None], node_rows.shape[1])[0]
    both = np.concatenate([node_rows[:, :, None], rows], axis=2).transpose(1, 0, 2)  # [N, BLOCKS, 1 + L]
    return np.repeat(both.reshape(len(both), -1), rows.shape[2], axis=0)


def impossible(node_rows: np.ndarray, rank_rows: np.ndarray) -> np.ndarray:
    """bool [W]: the ranks whose (token, node) pairs, int64 [W, BLOCKS, N], do not go with their (token, rank) pairs,
    int64 [W, BLOCKS, W]."""
    return _impossible(node_rows, _by_node(rank_rows, node_rows.shape[2]))


def _by_node(rank_rows: np.ndarray, nodes: int) -> np.ndarray:
    """int64 [..., BLOCKS, N, L] of [..., BLOCKS, W]."""
    return rank_rows.reshape(*rank_rows.shape[:-1], nodes, -1)


def _impossible(node_rows: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A token on a node is on one of its ranks or on several: int64 [W, BLOCKS, N] and [W, BLOCKS, N, L]."""
    found: np.ndarray = ((node_rows < rows.max(axis=3)) | (node_rows > rows.sum(axis=3))).any(axis=(1, 2))
    return found
