"""The kit's verdict on a layer made from changed source: what a rank of `gloo_pool` runs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_overlap.verify.report import Report
from tests.ranks import gloo_pool
from tests.verify.patching import Patch, patched

ADAPTERS = {
    "plain": ("moe_overlap.verify.adapters.plain", "PlainAdapter"),
    "ours": ("moe_overlap.verify.adapters.ours", "Ours"),
    "ours deduplicated": ("moe_overlap.verify.adapters.ours", "OursDeduplicated"),
    "ours in DDP": ("moe_overlap.verify.adapters.ours", "OursInDDP"),
}
# A mutant may leave a rank waiting for the others.
TIMEOUT_S = 20.0
LIMIT_S = 120.0
# Ranks keep what a verdict leaves behind: groups of layers, old modules.
VERDICTS_PER_PROCESS = 30
_verdicts = 0
_MADE: dict[str, int] = {}


def judged(
    layer: str,
    *,
    patches: Sequence[Patch] = (),
    attributes: Mapping[str, Any] | None = None,
    ranks: int = 2,
    dtype: torch.dtype = torch.float64,
) -> Report:
    """The report on the adapter of `layer`, its class given `attributes`, with `patches` in all ranks' sources."""
    global _verdicts
    pool = gloo_pool(ranks)
    _verdicts += 1
    if _verdicts % VERDICTS_PER_PROCESS == 0:
        pool.close()
    texts = pool.run(_judge, layer, dict(attributes or {}), tuple(patches), dtype, limit_s=LIMIT_S)
    return Report.from_json(texts[0])


def _judge(layer: str, attributes: dict[str, Any], patches: Sequence[Patch], dtype: torch.dtype) -> str:
    """The report, as JSON: its class here is not that of the caller."""
    module, name = ADAPTERS[layer]
    with patched(patches):
        # The keys of connections that other modules of the same name have made in this process.
        importlib.import_module("moe_overlap.transport.connections")._made = _MADE  # type: ignore[attr-defined]
        base = getattr(importlib.import_module(module), name)
        factory = type(name, (base,), attributes)
        report: Any = importlib.import_module("moe_overlap.verify.run").run(factory, dtype=dtype, timeout_s=TIMEOUT_S)
        text: str = report.to_json()
    return text
