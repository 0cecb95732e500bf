"""Where experts and tokens are: what a layer tells a router that asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from moe_overlap.errors import ConfigError


@dataclass(frozen=True, eq=False, kw_only=True)
class Nodes:
    """Which node every expert is on, and which one the tokens are on.

    of_expert: the node of each logical expert, as the placement says; all of E, from 0 to num_nodes - 1.
    own: the node of this rank, or int64 [T] with the node of each token, where one process stands for many.

    A bool [E] of the experts nearby would not say which row of a `LocalityBias` is meant: so nodes have numbers.
    """

    of_expert: tuple[int, ...]
    num_nodes: int
    own: int | torch.Tensor

    def __post_init__(self) -> None:
        if not self.of_expert or not all(0 <= node < self.num_nodes for node in self.of_expert):
            raise ConfigError(
                "nodes.of_expert", self.of_expert, f"a node from 0 to {self.num_nodes - 1} for each expert"
            )
        if isinstance(self.own, int) and not 0 <= self.own < self.num_nodes:
            raise ConfigError("nodes.own", self.own, f"a node from 0 to {self.num_nodes - 1}")

    def near(self, device: torch.device) -> torch.Tensor:
        """bool [1, E] or [T, E]: the experts on the node of the token."""
        own_T1 = self.own[:, None] if isinstance(self.own, torch.Tensor) else self.own
        return _table(self.of_expert, device)[None, :] == own_T1

    def is_near(self, device: torch.device) -> torch.Tensor:
        """bool [nodes, E]: which experts each node has."""
        return _table(self.of_expert, device)[None, :] == torch.arange(self.num_nodes, device=device)[:, None]

    def fewest_experts(self) -> int:
        """Of this rank's node, or of the node with the fewest, where tokens are on several."""
        nodes = [self.own] if isinstance(self.own, int) else range(self.num_nodes)
        return min(self.of_expert.count(node) for node in nodes)


@lru_cache(maxsize=64)
def _table(of_expert: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(of_expert, device=device)


def check_nodes(nodes: object, num_experts: int, num_tokens: int) -> Nodes:
    """Raises ConfigError unless `nodes` says where this many experts and tokens are."""
    if not isinstance(nodes, Nodes):
        raise ConfigError("local_experts", type(nodes).__name__, "a routing.Nodes, which a MoELayer gives its router")
    if len(nodes.of_expert) != num_experts:
        raise ConfigError("nodes.of_expert", len(nodes.of_expert), f"a node for each of {num_experts} experts")
    own = nodes.own
    if isinstance(own, torch.Tensor) and (own.shape != (num_tokens,) or own.dtype != torch.int64):
        raise ConfigError("nodes.own", f"{own.dtype} {tuple(own.shape)}", "a number, or torch.int64 [tokens]")
    return nodes
