"""What is timed of a step: all of it, or one of its halves.

infer     the forward call, without gradients
forward   the forward call of training, which saves for backward
backward  the backward alone, from a barrier of its own
train     both, one after the other
"""

from __future__ import annotations

PHASES = ("infer", "forward", "backward", "train")
HALVES = {"infer": ("forward",), "forward": ("forward",), "backward": ("backward",), "train": ("forward", "backward")}


def has(phase: str, half: str) -> bool:
    """Whether `phase` times the "forward" or the "backward" of a step."""
    return half in HALVES[phase]
