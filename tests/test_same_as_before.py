"""Outputs and gradients of thirty cases of the equality matrix, bit for bit as before the files moved into rooms.

`python tests/test_same_as_before.py` writes the digests. They hold on the machine that wrote them; the file goes when
the move is over.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.equality import WORLDS, pairwise_cases, run_rank  # noqa: E402
from tests.ranks import virtual_world  # noqa: E402

DIGESTS = Path(__file__).with_suffix(".json")


def thirty_cases():
    for world in WORLDS:
        cases = pairwise_cases(world)
        yield from cases[:: max(1, len(cases) // 10)][:10]


def digest_of(case):
    results = virtual_world(case.world).run(lambda me: run_rank(case, me.transport(), me.rank, overlap=True))
    digest = hashlib.sha256()
    for by_name in results:
        for name, value in sorted((name.replace("experts.", ""), value) for name, value in by_name.items()):
            digest.update(name.encode() + bytes(value.contiguous().view(torch.uint8).reshape(-1).tolist()))
    return digest.hexdigest()


def test_same_as_before():
    expected = json.loads(DIGESTS.read_text())
    found = {str(case): digest_of(case) for case in thirty_cases()}
    assert len(found) == 30 and found == expected


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps({str(case): digest_of(case) for case in thirty_cases()}, indent=0) + "\n")
