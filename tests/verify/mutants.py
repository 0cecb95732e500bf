"""What a mutant is: a published bug as a change of source, and which check of the kit has to name it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.verify.patching import Patch


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """source: where the bug was reported, as repository#number. named_by: the checks of the kit of which one at least
    has to have a finding. attributes: what the adapter's class is given beyond its defaults."""

    name: str
    source: str
    named_by: tuple[str, ...]
    patches: tuple[Patch, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


def mutant(
    name: str, source: str, named_by: str, *patches: Patch, attributes: Mapping[str, Any] | None = None
) -> Mutant:
    """named_by: checks, separated by commas."""
    return Mutant(name=name, source=source, named_by=tuple(check.strip() for check in named_by.split(",")),
                  patches=patches, attributes=attributes or {})  # fmt: skip
