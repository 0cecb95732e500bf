"""The order of backward, written into the sequence numbers of autograd nodes.

The engine runs the ready node with the highest number first. Numbers that lie between those of two backbone ops are
reserved there, while the forward runs, by making and dropping that many nodes; at the end each node of the layer gets
the number of its place, wherever it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.schedule.builders import SchedulePair, Schedules
from moe_overlap.schedule.order import Node, backward_groups, split_tail

# How many nodes can run after the router's backward: the waits for the last exchanges (one a chunk), then Pt; the wait
# for the gradients of copies, then Wa.
LAST_NODES = BLOCKS + 1 + 2
# How many nodes deduplication adds: Od and both halves of Mt.
DISTINCT_NODES = 3
# And copies of experts: Wd, both halves of Wg, and Wa.
COPY_NODES = 4
# And experts in host memory: Hb, and Ew and Hg of every group.
HOST_NODES = 3 * BLOCKS
# All that a planned backward can have: five nodes a chunk, Ut, Pt, one Ew, and those of deduplication and copies.
PLANNED_NODES = 5 * BLOCKS + 3 + DISTINCT_NODES + COPY_NODES


class SequenceNumbers:
    """The numbers of one step's nodes. Made before the router makes its own nodes, so that some can run after those.

    `anchor`: a leaf that requires a gradient. `more`: nodes that a step can have beside those of what it was given.
    """

    def __init__(self, anchor: torch.Tensor, *, more: int = 0) -> None:
        self._anchor, self._more = anchor, more
        self._numbers: dict[Node, int] = {}
        self._last = reserve(anchor, LAST_NODES)
        self._early: list[list[int]] = []  # reserved before ops that ran ahead of the agreement

    def before_early_op(self, schedule: Schedules) -> None:
        """As `before_op`, while ranks still agree: as many numbers as `schedule` can need there, whatever is chosen."""
        count = PLANNED_NODES
        if isinstance(schedule, SchedulePair):
            count = len(backward_groups(schedule)[-1 - len(self._early)]) + DISTINCT_NODES + COPY_NODES + self._more
        self._early.append(reserve(self._anchor, count))

    def bind(self, pair: SchedulePair) -> None:
        """The schedules are known: the nodes between the backbone's backwards, first group first, and the last ones."""
        self._groups = list(backward_groups(pair))
        self._groups[-1], tail = split_tail(self._groups[-1], LAST_NODES)
        self._assign(tail, self._last)
        for numbers in self._early:
            group = self._groups.pop()
            assert len(group) <= len(numbers), (len(group), len(numbers))
            self._assign(group, numbers)

    def before_op(self) -> None:
        """A user's op comes next in forward: reserve the numbers of the nodes that run, in backward, right after it."""
        self._reserve_group()

    def write(self, nodes: Mapping[Node, Any]) -> None:
        """Forward is over: reserve the last numbers, those of what runs first, and write all into `nodes`."""
        self._reserve_group()
        for node, number in self._numbers.items():
            nodes[node]._set_sequence_nr(number)

    def _reserve_group(self) -> None:
        group = self._groups.pop()
        self._assign(group, reserve(self._anchor, len(group)))

    def _assign(self, nodes: list[Node], numbers: list[int]) -> None:
        """The first of `nodes` gets the highest of the ascending `numbers`: the engine runs it first."""
        self._numbers.update(zip(nodes, reversed(numbers), strict=False))


def reserve(anchor: torch.Tensor, count: int) -> list[int]:
    """`count` ascending sequence numbers of this thread that no other node has: each belongs to a node thrown away."""
    return [anchor.view(0).grad_fn._sequence_nr() for _ in range(count)]  # type: ignore[union-attr]
