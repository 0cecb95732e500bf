"""Cost models of experts in host memory, and what is planned from them."""

from __future__ import annotations

from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.planning.cost_model import CostModel
from tests.auto.planted import cost_model, exchange, line


def host_model(link_s, **given) -> CostModel:
    """A byte of weights takes link_s, a row of an expert 1 us and a group of experts 20 us in each of E, Ed and Ew."""
    lines = dict.fromkeys(("experts", "experts_dgrad", "experts_wgrad"), line(1e-6, 2e-5))
    lines |= dict.fromkeys(("host_up", "host_down"), line(link_s))
    return cost_model(**{"exchange": {"inter": line(1e-9)}} | lines | given)


def planned_of(link_s, step=None, **limit):
    schedule = PlannedSchedule(model=host_model(link_s), num_ops=0, row_bytes=8, expert_bytes=(1000, 1000),
                               offload=True, **limit)  # fmt: skip
    return schedule.planned(step or exchange(world=1, slots=16))
