"""What a mutant is: a published bug as a change of source, and which check of the kit has to name it; and the mutants
of the recipe that every adapter inherits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.verify.patching import Patch


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """source: where the bug was reported, as repository#number. named_by: the checks of the kit of which one at least
    has to have a finding. attributes: what the adapter's class is given beyond its defaults. soak: not in CI."""

    name: str
    source: str
    named_by: tuple[str, ...]
    patches: tuple[Patch, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    soak: bool = False


def mutant(
    name: str, source: str, named_by: str, *patches: Patch, attributes: Mapping[str, Any] | None = None
) -> Mutant:
    """named_by: checks, with " | " between them."""
    return Mutant(name=name, source=source, named_by=tuple(named_by.split(" | ")),
                  patches=patches, attributes=attributes or {})  # fmt: skip


def recipe(old: str, new: str) -> Patch:
    """Of what every adapter inherits."""
    return Patch("verify.adapter", old, new)


RECIPE: tuple[Mutant, ...] = (
    mutant(
        "expert gradients EP times too large",
        "pytorch/pytorch#160285",
        "gradients",
        recipe("                if parameter.grad is not None:\n                    parameter.grad /= ranks\n", ""),
    ),
    mutant(
        "expert gradients divided by EP twice",
        "databricks/megablocks#86",
        "gradients",
        recipe("                    parameter.grad /= ranks\n", "                    parameter.grad /= ranks**2\n"),
    ),
    mutant(
        "dense gradients summed, not averaged",
        "ByteDance-Seed/VeOmni#184",
        "gradients",
        recipe("            parameter.grad /= ranks\n\n", "\n"),
    ),
    mutant(
        "router gradient of this rank's tokens alone",
        "pytorch/torchtitan#2387",
        "gradients",
        recipe(
            "            if parameter.grad is None:\n                parameter.grad = torch.zeros_like(parameter)\n",
            '            if self.kind_of(name) == "router":\n                continue\n',
        ),
    ),
    mutant(
        "dense gradients averaged over one rank",
        "NVIDIA/Megatron-LM#5916",
        "gradients",
        recipe(
            "            dist.all_reduce(parameter.grad, group=self.group)\n            parameter.grad /= ranks\n", ""
        ),
    ),
    mutant(
        "different experts averaged over the ranks",
        "microsoft/Swin-Transformer#223",
        "gradients",
        recipe(
            '            if self.kind_of(name) == "experts":\n                if parameter.grad is not',
            '            if self.kind_of(name) == "none":\n                if parameter.grad is not',
        ),
    ),
    mutant(
        "experts placed under another rank's numbers",
        "vllm-project/vllm#46441",
        "values",
        recipe("full.chunk(group.size())[group.rank()]", "full.chunk(group.size())[-1 - group.rank()]"),
    ),
)
