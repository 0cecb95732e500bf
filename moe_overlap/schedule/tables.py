"""The integers of a step's plans, where its rows are.

A CPU reads them from the plan, each when it is needed. A GPU gets those of all chunks of both halves of a step in one
copy that nobody waits for, when the counts are agreed on; tables of fixed shapes are copied once and stay there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_overlap.agreement.distinct import DistinctPlan
from moe_overlap.agreement.node_plan import NodePlan
from moe_overlap.agreement.plan import ChunkPlan
from moe_overlap.agreement.static_plan import StaticChunks
from moe_overlap.ops import maps

Key = tuple[str, tuple[int, ...]]  # a table's name in the plan, and the arguments of the method that it is


class Tables:
    """The tables of one plan by the names of its attributes and methods: `tables.one("buffer_order", 2)`.

    whole: those of the same plan in one chunk, in which metadata travels.
    """

    def __init__(self, plan: ChunkPlan) -> None:
        self.plan = plan
        whole = isinstance(plan, NodePlan) and plan.chunks > 1
        self.whole: Tables = Tables(plan.cut(1, "tokens")) if whole else self
        self._found: dict[Key, Any] = {}
        self._moved = False  # to a device: then all of them are there

    def one(self, name: str, *of: int) -> torch.Tensor:
        """A table that is one tensor."""
        found: torch.Tensor = self._look_up((name, of))
        return found

    def both(self, name: str, *of: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A table that is two tensors: starts and ends."""
        starts, ends = self._look_up((name, of))
        return starts, ends

    def _look_up(self, key: Key) -> Any:
        if key not in self._found and not self._moved:
            self._found[key] = _of_plan(self.plan, key)
        return self._found[key]

    def keys(self, tokens: int) -> list[Key]:
        """All that the actions of a step read, but for the orders, which are made of their runs."""
        plan = self.plan
        if not isinstance(plan, DistinctPlan):
            keys: list[Key] = [("expert_offs", ()), ("all_expert_rows", ())]
            keys += [("key_table", (tokens,))] if plan.chunks > 1 and not isinstance(plan, StaticChunks) else []
            return keys if plan.in_order else [*keys, ("buffer_runs", ())]
        local = plan.local_slots
        parts = ((0, local), (0, local // 2), (local // 2, local))
        keys = [*(("own_expert_rows", part) for part in parts), *_of_chunks(plan, ("expert_rows",))]
        keys += [(name, ()) for name in ("expert_offs", "own_shift", "others_shift", "distinct_order")]
        if plan.by == "tokens" and plan.chunks > 1:
            keys += _of_chunks(plan, ("block_arrivals",))
        return keys + self._keys_inside()

    def _keys_inside(self) -> list[Key]:
        if not isinstance(self.plan, NodePlan):
            return []
        keys = _of_chunks(self.plan, ("arrived_to_pass_on", "in_flat_order", "to_gateways", "homewards"))
        return [*keys, ("gateway_chunks", ())] if self.plan.by == "tokens" else keys

    def take(self, found: dict[Key, Any]) -> None:
        """Tables that are on the device."""
        self._found, self._moved = found, True
        expert_rows = found.pop(("all_expert_rows", ()), ((), ()))
        for chunk, both in enumerate(zip(*expert_rows, strict=True)):
            found["expert_rows", (chunk,)] = both
        runs = found.pop(("buffer_runs", ()), None)
        if runs is not None:
            counts, shifts = runs
            rows = sum(self.plan.recv_rows)
            order = torch.arange(rows, dtype=torch.int32, device=counts.device)
            order += shifts.repeat_interleave(counts, output_size=rows)
            for chunk, part in enumerate(order.split(self.plan.recv_rows)):
                found["buffer_order", (chunk,)] = part


def tables_of(plans: Sequence[ChunkPlan], device: torch.device, tokens: int) -> list[Tables]:
    """Those of each plan, for rows on `device`; one object for a plan that stands there twice. tokens: this rank's."""
    made = {id(plan): Tables(plan) for plan in plans}
    if device.type == "cuda":
        _upload(list(made.values()), device, tokens)
    return [made[id(plan)] for plan in plans]


def _upload(all_tables: list[Tables], device: torch.device, tokens: int) -> None:
    """One copy of what is not there yet."""
    waiting = []
    for tables in all_tables:
        kept = _kept(tables.plan, device)
        if kept:
            tables.take(kept)
        else:
            waiting += [tables] if tables.whole is tables else [tables, tables.whole]
    values = [(tables, key, _of_plan(tables.plan, key)) for tables in waiting for key in tables.keys(tokens)]
    flat = [part for *_, value in values for part in (value if isinstance(value, tuple) else (value,))]
    moved = iter(maps.all_to_device(flat, device) if flat else ())
    found: dict[int, dict[Key, Any]] = {id(tables): _kept(tables.plan, device) for tables in waiting}
    for tables, key, value in values:
        found[id(tables)][key] = (next(moved), next(moved)) if isinstance(value, tuple) else next(moved)
    for tables in waiting:
        tables.take(found[id(tables)])


def _kept(plan: ChunkPlan, device: torch.device) -> dict[Key, Any]:
    """What outlives the step: that of fixed shapes."""
    if not isinstance(plan, StaticChunks):
        return {}
    kept: dict[Key, Any] = plan.layout.kept.setdefault(("tables", plan.chunks, plan.by, device), {})
    return kept


def _of_plan(plan: ChunkPlan, key: Key) -> Any:
    name, of = key
    value = getattr(plan, name)
    return value(*of) if callable(value) else value


def _of_chunks(plan: ChunkPlan, names: Sequence[str]) -> list[Key]:
    return [(name, (chunk,)) for chunk in range(plan.chunks) for name in names]
