"""The order of backward, written into the sequence numbers of autograd nodes.

The engine runs the ready node with the highest number first. Numbers that lie between those of two backbone ops are
reserved there, while the forward runs, by making and dropping a node; at the end each node of the layer gets the number
of its place, wherever it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class SequenceNumbers:
    """The numbers of one step's nodes, one for each stretch of backward, the last one first. Made before the router
    makes its own nodes, as the last stretch runs after those.

    `anchor`: a leaf that requires a gradient.
    """

    def __init__(self, anchor: torch.Tensor) -> None:
        self._anchor = anchor
        self._numbers = [reserve(anchor)]

    def before_op(self) -> None:
        """A user's op comes next in forward: reserve the number of the stretch that runs, in backward, right after
        it."""
        self._numbers.append(reserve(self._anchor))

    def write(self, nodes: Sequence[Any]) -> None:
        """Forward is over: reserve the number of what runs first, and write all. `nodes`: of each stretch of backward
        from the last one to the first, None for an empty one."""
        self._numbers.append(reserve(self._anchor))
        for node, number in zip(nodes, self._numbers, strict=True):
            if node is not None:
                node._set_sequence_nr(number)


def reserve(anchor: torch.Tensor) -> int:
    """A sequence number of this thread that no other node has: it belongs to a node thrown away."""
    number: int = anchor.view(0).grad_fn._sequence_nr()  # type: ignore[union-attr]
    return number
