"""What virtual ranks that meet need to know of the world they are in."""

from __future__ import annotations

from typing import Protocol

from moe_overlap.transport.baton import Baton


class World(Protocol):
    """`virtual.VirtualWorld`, as far as its channels and transports see it."""

    world_size: int

    @property
    def baton(self) -> Baton:
        """Of the run under way. Raises ConfigError outside of one."""

    def baton_holds(self, rank: int) -> bool:
        """Whether the thread that asks is that of `rank` in the run under way."""
