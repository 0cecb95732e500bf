"""Random numbers that depend on names, not on the order in which they are asked for."""

from __future__ import annotations

import hashlib

import torch


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `parts`, e.g. ("batch", seed, step): equal parts give equal numbers everywhere.

    The parts are hashed because torch's CPU generator looks at the low 32 bits of its seed only.
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
