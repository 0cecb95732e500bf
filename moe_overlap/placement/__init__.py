"""Where each expert lives: integers, no tokens."""

from .placement import Placement

__all__ = ["Placement"]
