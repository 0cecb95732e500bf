"""Where each expert lives: integers, no tokens."""

from moe_overlap.placement.migration import MigrationPlan, Move
from moe_overlap.placement.placement import Placement
from moe_overlap.placement.selectors import LocalFirst, Modulo, Selector, Weighted

__all__ = ["LocalFirst", "MigrationPlan", "Modulo", "Move", "Placement", "Selector", "Weighted"]
