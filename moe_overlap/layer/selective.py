"""Selective activation checkpointing: which results a recompute must not make again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

# A near tie decided otherwise in the recompute would send rows to other experts than the gradients come from.
SAVED_OPS = ("gate_topk", "row_map")


def sac_policy() -> Callable[..., CheckpointPolicy]:
    """The policy that saves routing and recomputes everything else.

    For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=functools.partial(
    create_selective_checkpoint_contexts, sac_policy()))`.
    """
    saved = {getattr(torch.ops.moe_overlap, name).default for name in SAVED_OPS}

    def policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
