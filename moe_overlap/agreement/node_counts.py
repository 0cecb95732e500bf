"""Which rows cross nodes and which are passed on inside them, as tables of counts like those of the step's other rows.

Letters as in `plan.py`; L ranks in a row share a node, N nodes; rank (m, l) is the l-th of node m. For each (token,
node) pair of another node n, (m, l) has one row, which goes to (n, l), its gateway there, with the first group of
experts that any rank of n needs it in, and comes back with the last. So pairs are counted at the lowest and at the
highest place of the token's slots on their ranks. All tables here follow from these and from the (token, rank) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import Counts


@dataclass(frozen=True, eq=False, kw_only=True)
class NodeCounts:
    """By lowest and by highest place. across: rows that go to another rank of the node, or to a gateway, as if to its
    own slots. inside: rows that a gateway passes on, to its own experts too."""

    across: tuple[Counts, Counts]
    inside: tuple[Counts, Counts]

    @classmethod
    def of(cls, pairs: np.ndarray, rows: Sequence[np.ndarray], rank: int) -> NodeCounts:
        """From what all ranks said: (token, node) pairs, int64 [W, 2, BLOCKS, N e], and (token, rank) pairs, twice
        [W, BLOCKS, P]."""
        world = len(pairs)
        nodes = pairs.shape[3] * world // rows[0].shape[2]
        across = [sent_across(one, pairs[:, way], range(world), world) for way, one in enumerate(rows)]
        tables = [Counts.of(table, rank) for table in (*across, *(_passed_on(one, nodes) for one in rows))]
        return cls(across=(tables[0], tables[1]), inside=(tables[2], tables[3]))


def sent_across(rows: np.ndarray, pairs: np.ndarray, sources: Sequence[int], world: int) -> np.ndarray:
    """int64 [S, BLOCKS, P]: what the ranks `sources` send across, from their (token, rank) pairs [S, BLOCKS, P] and
    (token, node) pairs [S, BLOCKS, N e]."""
    local = rows.shape[2] // world
    nodes = pairs.shape[2] // local
    size = world // nodes
    found = np.zeros((len(sources), BLOCKS, nodes, size, local), dtype=np.int64)
    for place, (one, source) in enumerate(zip(found, sources, strict=True)):
        one[:, :, source % size] = pairs[place].reshape(BLOCKS, nodes, local)
        one[:, source // size] = rows[place].reshape(BLOCKS, nodes, size, local)[:, source // size]
    return found.reshape(rows.shape)


def _passed_on(rows: np.ndarray, nodes: int) -> np.ndarray:
    """int64 [W, BLOCKS, P]: what every gateway passes on, from the (token, rank) pairs of all ranks [W, BLOCKS, P]."""
    world = len(rows)
    by_node = rows.reshape(nodes, world // nodes, BLOCKS, nodes, -1)
    found = np.zeros_like(by_node)
    for node in range(nodes):
        found[node, :, :, node] = by_node[:, :, :, node].sum(axis=0) - by_node[node, :, :, node]
    return found.reshape(rows.shape)


# ---------------------------------------------------------------- where no rank hears all counts


def parts_of(rows: Sequence[np.ndarray], nodes: int, rank: int, world: int) -> np.ndarray:
    """int64 [W, 2 BLOCKS L e]: what a rank says to its gateways, those of the other nodes in its own place, of the rows
    that they will pass on; zeros to others. rows: its (token, rank) pairs, twice [BLOCKS, P]."""
    by_node = np.stack([one.reshape(BLOCKS, nodes, -1) for one in rows])  # [2, BLOCKS, N, L e]
    size = world // nodes
    found = np.zeros((nodes, size, 2 * BLOCKS * by_node.shape[3]), dtype=np.int64)
    found[:, rank % size] = by_node.transpose(2, 0, 1, 3).reshape(nodes, -1)
    found[rank // size] = 0
    return found.reshape(world, -1)


def heard_inside(
    parts: np.ndarray, received: Sequence[np.ndarray], nodes: int, rank: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """This rank's (sent, received) of both tables `inside`, int64 [BLOCKS, P] and [W, BLOCKS, e]: from the `parts_of`
    all ranks, [W, n], and their (token, rank) pairs for its own slots, twice [W, BLOCKS, e]."""
    world = len(parts)
    size, local = world // nodes, received[0].shape[2]
    node = rank // size
    found = []
    for way, rows in enumerate(received):
        sent = np.zeros((BLOCKS, nodes, size * local), dtype=np.int64)
        sent[:, node] = parts.reshape(world, 2, BLOCKS, -1)[:, way].sum(axis=0)
        by_node = rows.reshape(nodes, size, BLOCKS, local)
        arrives = np.zeros_like(by_node)
        arrives[node] = by_node.sum(axis=0) - by_node[node]
        found.append((sent.reshape(BLOCKS, -1), arrives.reshape(rows.shape)))
    return found


def doubted(parts: np.ndarray, across: Sequence[np.ndarray], nodes: int, rank: int) -> np.ndarray:
    """bool [W]: the ranks whose pairs for this rank as their gateway cannot be. parts: `parts_of` all ranks, [W, n];
    across: what they send across to it, twice [W, BLOCKS, e]."""
    world, _, local = across[0].shape
    size = world // nodes
    rows = parts.reshape(world, 2, BLOCKS, 1, size, local)
    pairs = np.stack(across, axis=1)[:, :, :, None]
    of_node = np.arange(world) // size == rank // size
    found: np.ndarray = _impossible(pairs, rows) & ~of_node
    return found


# ---------------------------------------------------------------- what cannot be


def impossible(pairs: np.ndarray, rows: Sequence[np.ndarray]) -> np.ndarray:
    """bool [W]: the ranks whose (token, node) pairs do not go with their (token, rank) pairs; shapes as for
    `NodeCounts.of`."""
    world, local = len(pairs), rows[0].shape[2] // len(pairs)
    nodes = pairs.shape[3] // local
    by_node = np.stack(rows, axis=1).reshape(world, 2, BLOCKS, nodes, -1, local)
    return _impossible(pairs.reshape(world, 2, BLOCKS, nodes, local), by_node)


def _impossible(pairs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """int64 [W, 2, BLOCKS, N, e] and [W, 2, BLOCKS, N, L, e]. A token on a node is on one of its ranks or on several:
    so are those that begin there up to some place, and those that end from some place on."""
    bad = (pairs < 0).any(axis=(1, 2, 3, 4)) | (pairs[:, 0].sum(axis=3) != pairs[:, 1].sum(axis=3)).any(axis=(1, 2))
    for way, order in enumerate((slice(None), slice(None, None, -1))):
        some, ranks = (one[:, way, ..., order].cumsum(axis=-1) for one in (pairs, rows))
        bad |= ((some < ranks.max(axis=3)) | (some > ranks.sum(axis=3))).any(axis=(1, 2, 3))
    return np.asarray(bad)
