"""What all ranks recorded, on every rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple

import torch.distributed as dist

from moe_overlap.launch.launch import World
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.transport.groups import resolve_group


def events_of_all(events: Sequence[TimelineEvent], world: World) -> list[TimelineEvent]:
    """The events of every rank of `world`, by rank. Collective."""
    texts = world.gather_text(json.dumps([astuple(event) for event in events]))
    return [TimelineEvent(*fields) for text in texts for fields in json.loads(text)]


def gather_events(events: Sequence[TimelineEvent], group: dist.ProcessGroup | None = None) -> list[TimelineEvent]:
    """The events that `record()` gave on every rank of `group` (None: all ranks), for `why_slow`. Collective; the group
    needs a backend for CPU tensors, such as gloo. Without torch.distributed: the events as they are.

    Ranks are those of the layers' groups, and times those of each machine's own clock: only ranks of one machine have
    comparable ones.
    """
    if not dist.is_available() or not dist.is_initialized():
        return list(events)
    resolved, ranks = resolve_group(group)
    return events_of_all(events, World(rank=ranks.index(dist.get_rank()), size=len(ranks), group=resolved))
