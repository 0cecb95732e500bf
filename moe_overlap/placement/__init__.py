"""Where each expert lives: integers, no tokens."""

from moe_overlap.placement.placement import Placement

__all__ = ["Placement"]
