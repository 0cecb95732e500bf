"""Which schedules the probes of a calibration run: those without which there is no model, and those beside them."""

from __future__ import annotations

from collections.abc import Callable

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.plan import ChunkBy
from moe_overlap.errors import ConfigError
from moe_overlap.schedule.builders import SchedulePair, deduplicate
from moe_overlap.schedule.offload import held_in_turns, with_host_experts

CHUNKS = (1, 4, BLOCKS)
OVERLAPPED = 4
MAX_GROUPS = 4

PairOf = Callable[[int, ChunkBy], SchedulePair]
"""From a number of chunks, and by what they are cut, to the schedules of the step."""


def plain_pairs(pair_of: PairOf, experts: int, *, dedup: bool) -> tuple[list[SchedulePair], list[SchedulePair]]:
    """The probes without which there is no model, and those that run where the budget allows them."""
    one, four, sixteen = (pair_of(chunks, "tokens").join() for chunks in CHUNKS)
    groups = min(MAX_GROUPS, experts)
    by_groups = [pair_of(groups, "experts").join()] if groups > 1 else []
    fewest, more = [one, four, pair_of(OVERLAPPED, "tokens")], [sixteen, *by_groups]
    return (fewest + [deduplicate(four)], more + [deduplicate(one)]) if dedup else (fewest, more)


def offloaded_pairs(
    pair_of: PairOf, experts: int, limit: int | None = None
) -> tuple[list[SchedulePair], list[SchedulePair]]:
    """The same where the experts of a rank, so many, are in host memory, at most `limit` of them on the device. Of a
    single one there is an empty group too: what one more group takes is not known from one number of them. ConfigError
    where two numbers of groups do not keep within the limit."""
    fitting = [count for count in range(1, BLOCKS + 1) if limit is None or held_in_turns(experts, count) <= limit]
    if len(fitting) < 2:
        least = held_in_turns(experts, BLOCKS - 1)
        expected = f"room for {least}: costs are measured in two numbers of groups, of which there are {BLOCKS}"
        raise ConfigError("device_limit_bytes", f"{limit} of {experts} experts", expected)
    one, second = fitting[:2]
    some = max(count for count in fitting if count <= max(second, min(OVERLAPPED, experts)))
    most = max(count for count in fitting if count <= max(some, min(BLOCKS, experts)))

    def groups_of(count: int) -> SchedulePair:
        return with_host_experts(pair_of(count, "experts"))

    fewest = [groups_of(one).join(), groups_of(some).join(), groups_of(some)]
    return fewest, [groups_of(most).join()] if most > some else []
