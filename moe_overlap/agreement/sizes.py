"""Numbers that files with torch and files without it have in common: schedules and plans are made without."""

from __future__ import annotations

import hashlib

BLOCKS = 16  # of a rank's tokens, the finest cut
HEADER_WORDS = 64
HEAD_WORDS = 5  # of a message: magic, kind, layer, caller, step
RECORD_WORDS = 24  # of a step's record without its tables: as many as `record.RECORD_FIELDS`


def record_words(num_experts: int, num_slots: int, dedup: int, node_slots: int = 0) -> int:
    """Words of a record with its tables. node_slots: nodes * e, 0 where it has no `node_rows`."""
    counted = num_experts + (2 * (num_slots + node_slots) if dedup == 1 else 0)
    return RECORD_WORDS + BLOCKS * counted // 2


def digest(*parts: object) -> int:
    """A 63-bit digest of the printed form of `parts`, equal on all ranks that hold equal values."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
