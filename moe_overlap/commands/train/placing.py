"""`--placement`: experts that move, and copies of them, while the model trains.

A `PlacementController` plans each MoE layer from the load of its last steps. What a plan is worth is told by a nominal
machine (`MACHINE`), or by the emulated link where there is one: prices decide alone which plans are taken, and have to
be the same in every run, so that a run can be made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from moe_overlap.commands.train.model import LanguageModel, moe_layers
from moe_overlap.commands.train.options import TrainOptions
from moe_overlap.layer.controller import PlacementController
from moe_overlap.layer.moving import migrate
from moe_overlap.placement import Placement
from moe_overlap.placement.planners import Eplb, Flex, Planner, Proportional
from moe_overlap.placement.topology import Topology
from moe_overlap.planning.copy_costs import PhaseCosts, nominal_costs
from moe_overlap.transport import LinkSpec

PLANNERS: dict[str, Planner] = {"flex": Flex(), "eplb": Eplb(), "proportional": Proportional()}
MATRICES = 3  # of a SwiGLU expert, each D x F
SIZE = 4  # bytes of float32, the model's weights and rows
FLOP_PER_S, BYTES_PER_S = 1e10, 1e9  # of the nominal machine: 10 GFLOP/s a rank, 1 GB/s between ranks


class Placing:
    """The controller of one run, and what it says of a step."""

    def __init__(self, model: LanguageModel, optimizer: torch.optim.Optimizer, options: TrainOptions) -> None:
        self.layers = moe_layers(model)
        planner = partial(_planned, PLANNERS[options.placement], _topology(options), options)
        self.controller = PlacementController(
            model, planner, _costs(options), optimizers=[optimizer], interval=options.placement_every,
            ranks_per_node=options.ranks_per_node,
        )  # fmt: skip

    def step(self) -> list[dict[str, Any]]:
        """Plan and move, between two steps, gradients gone: what changed, one record for each layer. Collective."""
        before = [layer.dispatcher.placement for layer in self.layers]
        bytes_before = [one.moved_bytes for one in self.controller.progress]
        changed = self.controller.step()
        return [
            moves(number, before[number], self.layers[number].dispatcher.placement)
            | {"bytes": self.controller.progress[number].moved_bytes - bytes_before[number]}
            for number in changed
        ]


def moves(layer: int, old: Placement, new: Placement) -> dict[str, Any]:
    """What became of a placement: copies made (expanded) and given up (shrunk), homes that moved (migrated)."""
    had, has = _seats(old), _seats(new)
    plan = old.diff(new)
    came = {(move.expert, move.to_rank) for move in plan.home_moves}
    left = {(move.expert, move.from_rank) for move in plan.home_moves}
    return {
        "layer": layer,
        "expanded": len(has - had - came),
        "shrunk": len(had - has - left),
        "migrated": len(plan.home_moves),
        "copies": new.num_slots - new.num_experts,
        "experts_of_ranks": new.experts_of_ranks(),
    }


def say_moves(step: int, row: dict[str, Any]) -> str:
    """One line for the user."""
    return (f"step {step + 1}: layer {row['layer']}: {row['expanded']} expanded, {row['shrunk']} shrunk, "
            f"{row['migrated']} migrated ({row['bytes'] / 1e6:.2f} MB on the busiest port), now "
            + " | ".join(",".join(map(str, experts)) for experts in row["experts_of_ranks"]))  # fmt: skip


def take_placements(
    saved: Sequence[Placement], model: LanguageModel, optimizer: torch.optim.Optimizer, options: TrainOptions
) -> None:
    """Go on with the placements of a checkpoint, where they are of as many ranks and fit the slots of this run; else
    the model stays as it is. Experts are in order before. Collective."""
    if saved and not left_behind(saved, options):
        migrate(model, list(saved), optimizer)


def left_behind(saved: Sequence[Placement], options: TrainOptions) -> str:
    """What is said where a run does not go on with the placements of its checkpoint; "" where it does."""
    if not saved:
        return ""
    if options.placement == "static":
        why = "--placement static"
    elif any(one.world_size != options.ranks for one in saved):
        why = "it is one of other ranks"
    elif any(max(one.slots_by_rank) > _slots(options) for one in saved):
        why = "it needs more --placement-slots"
    else:
        return ""
    return f"; the placement of its experts is left behind ({why}), they go on in order"


def _planned(planner: Planner, topology: Topology, options: TrainOptions, counts_WE: np.ndarray,
             current: Placement) -> Placement:  # fmt: skip
    return planner(counts_WE, topology, slots=_slots(options), current=current)


def _slots(options: TrainOptions) -> int:
    return options.experts // options.ranks + options.placement_slots


def _seats(placement: Placement) -> set[tuple[int, int]]:
    return set(zip(placement.slot_to_expert, placement.rank_of_slots.tolist(), strict=True))


def _rate(options: TrainOptions) -> float:
    link = LinkSpec.parse(options.link)
    return BYTES_PER_S if link is None else link.bytes_per_s


def _row_s(options: TrainOptions) -> float:
    """A row's forward: two operations for each number of an expert."""
    return 2 * MATRICES * options.hidden * options.ffn / FLOP_PER_S


def _topology(options: TrainOptions) -> Topology:
    return Topology(
        world_size=options.ranks, ranks_per_node=options.ranks_per_node, row_s=_row_s(options),
        row_bytes=SIZE * options.hidden, expert_bytes=SIZE * MATRICES * options.hidden * options.ffn,
        intra_bytes_per_s=BYTES_PER_S, inter_bytes_per_s=_rate(options),
    )  # fmt: skip


def _costs(options: TrainOptions) -> tuple[PhaseCosts, ...]:
    return nominal_costs(
        hidden=options.hidden, ffn=options.ffn, flop_per_s=FLOP_PER_S, dtype_bytes=SIZE, matrices=MATRICES,
        inter_bytes_per_s=_rate(options), intra_bytes_per_s=BYTES_PER_S,
    )  # fmt: skip
