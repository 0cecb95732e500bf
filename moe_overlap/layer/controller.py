"""A kept placement that follows the load while a model trains: when to plan anew, whether that pays, and when it holds.

    controller = PlacementController(model, copies_planner(costs, spare=2), costs, optimizers=[optimizer])
    ...
    optimizer.step(); optimizer.zero_grad()
    controller.step()

Every rank decides by itself from counts that all have agreed on, with one planner and equal costs; the record of the
next step compares the placements' digests, so ranks that decided differently raise PlanMismatch before a row moves.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from moe_overlap.agreement.seats import seats_of
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.auto.replicate import load_of, placement_of
from moe_overlap.errors import ConfigError
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.moving import migrate, set_placement
from moe_overlap.layer.stats import LastStep
from moe_overlap.parallel.replicas import Replicas
from moe_overlap.placement import Placement
from moe_overlap.planning.copy_costs import PhaseCosts
from moe_overlap.planning.copy_load import check_count, rank_rows
from moe_overlap.planning.replication import MARGIN, check_options, decide, priced
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.weights import row_width

# counts int64 [W, E] of a window, the placement now -> the placement wanted.
Planner = Callable[[np.ndarray, Placement], Placement]


def copies_planner(
    costs: Sequence[PhaseCosts], *, spare: int, ranks_per_node: int = 1, relayed: bool = False
) -> Planner:
    """The cheapest copies of experts on `spare` slots of each rank beside the homes, which stay (`planning.decide`).
    relayed: the layers' schedule relays kept copies: "auto", or a pair with relayed_copies=True. Raises ConfigError."""
    check_options(costs, None, MARGIN)
    check_count("spare", spare, least=0)
    check_count("ranks_per_node", ranks_per_node, least=1)

    phases = costs if relayed else _from_home(costs)

    def plan(counts_WE: np.ndarray, current: Placement) -> Placement:
        base = Placement.of_ranks(seats_of(current).homes, homes=current.home_ranks)
        load = load_of(counts_WE[:, None, :], base, [spare] * base.world_size, ranks_per_node)
        found = decide(load, phases)
        return base if found.left else placement_of(load, found, base)

    return plan


@dataclass
class Progress:
    """What a controller has done for one layer. `calls`: training calls it has seen, those of replicas too; `refused`:
    plans that were not taken, by reason."""

    steps: int = 0
    calls: int = 0
    planned: int = 0
    changed: int = 0
    moved_bytes: int = 0
    last_change: int | None = None
    refused: dict[str, int] = field(default_factory=dict)

    def refuse(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1


@dataclass(eq=False)
class _Watched:
    """A layer, its counts and what waits to be committed. recent_E: rows since the last step, of so many calls;
    window_E: since the last plan."""

    layer: MoELayer
    window_E: np.ndarray
    recent_E: np.ndarray
    recent: int = 0
    seen: int = 0
    armed: bool = True
    since: int = 0  # steps since the last plan
    pending: tuple[Placement, int] | None = None
    progress: Progress = field(default_factory=Progress)

    def count(self, last: LastStep) -> None:
        if last.plan is not None and torch.is_grad_enabled():
            self.recent_E += last.plan.exchange.tokens_per_expert.numpy()
            self.recent += 1

    def end_step(self) -> None:
        """What is recent goes into the window."""
        self.window_E += self.recent_E
        self.seen += self.recent
        self.recent_E[:], self.recent = 0, 0


class PlacementController:
    """Placements of all MoE layers of `model`, changed at step boundaries. On all ranks alike.

    A layer is planned anew when `interval` steps have passed since the last plan, for all of their load; or, with a
    `threshold`, when the rows of its fullest rank are more than that many times the mean in one step, for the load of
    that step. After any plan the threshold is armed again once the ratio was at most `release` (hysteresis).

    A plan is taken where it is predicted to save, over `horizon` steps, more than its weights cost to move.
    `budget_bytes`: of one rank's weights that may move in one step; plans wait for their turn, layer by layer, and one
    that is larger by itself is refused. `patience`: after so many steps in which no call was seen, or without a change
    though plans were made for the threshold, a warning says so, once. costs, ranks_per_node: of the prices.
    optimizers: needed where a planner moves homes. Experts with replicas (`replicate_group`) have one placement, which
    follows the load of all replicas.
    """

    def __init__(
        self,
        model: nn.Module,
        planner: Planner,
        costs: Sequence[PhaseCosts],
        *,
        optimizers: Sequence[Optimizer] = (),
        interval: int = 100,
        threshold: float | None = None,
        release: float | None = None,
        horizon: int = 100,
        budget_bytes: int | None = None,
        patience: int = 1000,
        ranks_per_node: int = 1,
    ) -> None:
        check_options(costs, None, MARGIN)
        counts = {"interval": interval, "horizon": horizon, "patience": patience, "ranks_per_node": ranks_per_node}
        for name, value in counts.items():
            check_count(name, value, least=1)
        if threshold is not None and not (_is_number(threshold) and threshold > 1):
            raise ConfigError("threshold", threshold, "None, or a ratio above 1")
        self.release = threshold if release is None else release
        if self.release is not None and not (
            threshold is not None and _is_number(self.release) and 1 <= self.release <= threshold
        ):
            raise ConfigError("release", release, "None, or a ratio from 1 to the threshold")
        if budget_bytes is not None:
            check_count("budget_bytes", budget_bytes, least=1)
        self.planner, self.costs, self.optimizers = planner, tuple(costs), list(optimizers)
        self.interval, self.threshold, self.horizon = interval, threshold, horizon
        self.budget_bytes, self.patience, self.ranks_per_node = budget_bytes, patience, ranks_per_node
        _check_planner(planner)
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        if not layers or layers[0].dispatcher.placement.world_size == 1:
            raise ConfigError("model", type(model).__name__, "a module with MoE layers on several ranks")
        for layer in layers:
            if layer.dispatcher.ranks_per_node not in (0, ranks_per_node):
                known = f"{layer.dispatcher.ranks_per_node}, as the layers have"
                raise ConfigError("ranks_per_node", ranks_per_node, known)
        if len({id(layer.experts) for layer in layers}) < len(layers):
            raise ConfigError("model", "layers that share their experts", "experts of its own in each: placements "
                              "change layer by layer")  # fmt: skip
        self._watched = [
            _Watched(one, *np.zeros((2, one.dispatcher.placement.num_experts), np.int64)) for one in layers
        ]
        for one in self._watched:
            watcher = partial(_Watched.count, one)
            one.layer.watch(watcher)
            weakref.finalize(self, _unwatch, one.layer, watcher).atexit = False
        self._warned = False
        self._next = 0  # the layer whose turn it is to use the budget

    @property
    def progress(self) -> list[Progress]:
        """Of each layer, in the order of the model."""
        return [one.progress for one in self._watched]

    def step(self) -> list[int]:
        """Plan and commit, between two steps; the numbers of the layers that changed. Collective where homes move, and
        where experts have replicas."""
        self._add_replicas()
        left, changed = self.budget_bytes, list[int]()
        turn = (*range(self._next, len(self._watched)), *range(self._next))
        for number in turn:
            one = self._watched[number]
            one.progress.steps += 1
            one.since += 1
            one.progress.calls += one.recent
            found = self._due(one) if one.pending is None and one.seen + one.recent else None
            one.end_step()
            if found is not None:
                self._plan(one, *found)
            if one.pending is not None and (left is None or one.pending[1] <= left):
                left = None if left is None else left - one.pending[1]
                self._commit(one)
                changed.append(number)
                self._next = (number + 1) % len(turn)  # so that one layer cannot use up every step's budget
        self._watch()
        return sorted(changed)

    def _add_replicas(self) -> None:
        """Where experts have replicas, recent counts become those of all of them, so that all decide alike."""
        together: dict[Replicas, list[_Watched]] = {}
        for one in self._watched:
            if one.layer.ownership.replicas is not None:
                together.setdefault(one.layer.ownership.replicas, []).append(one)
        for replicas, found in together.items():
            said = torch.from_numpy(np.concatenate([[one.recent, *one.recent_E] for one in found]))
            device = next(found[0].layer.experts.parameters()).device
            heard = replicas.transport.all_reduce(said.to(device), action="counts").wait().cpu().numpy()
            ends = np.cumsum([1 + len(one.recent_E) for one in found])
            for one, (recent, *recent_E) in zip(found, np.split(heard, ends[:-1]), strict=True):
                one.recent, one.recent_E[:] = int(recent), recent_E

    def _due(self, one: _Watched) -> tuple[np.ndarray, int] | None:
        """The counts [W, E] to plan for, and of how many steps they are; None: not now."""
        recent_WE = self._spread(one, one.recent_E)
        if self.threshold is not None and one.recent:
            ratio = self._ratio(one, recent_WE)
            assert self.release is not None
            one.armed = one.armed or ratio <= self.release
            if one.armed and ratio > self.threshold:
                return recent_WE, 1
        if one.since >= self.interval:
            return self._spread(one, one.window_E + one.recent_E), one.since
        return None

    def _plan(self, one: _Watched, counts_WE: np.ndarray, steps: int) -> None:
        current = one.layer.dispatcher.placement
        wanted = self.planner(counts_WE, current)
        if not isinstance(wanted, Placement):
            raise ConfigError("planner", type(wanted).__name__, "a planner that returns a Placement")
        one.progress.planned += 1
        moves = current.diff(wanted)
        expert_bytes = _expert_bytes(one.layer)
        ported = moves.link_bytes(expert_bytes, _STATES * expert_bytes)
        moved = int(max(ported.sum(axis=0).max(), ported.sum(axis=1).max()))
        of_a_step = steps * one.layer.ownership.num_replicas  # which run beside each other
        gain_s = (self._price(one, counts_WE, current) - self._price(one, counts_WE, wanted)) / of_a_step
        move_s = moved / expert_bytes * max(line.beta_s for line in self.costs[0].copy)
        reason = None
        if wanted.digest == current.digest:
            reason = "nothing better"
        elif gain_s * self.horizon <= move_s:
            reason = "does not pay"
        elif self.budget_bytes is not None and moved > self.budget_bytes:
            reason = "over budget"
        if reason is None:
            one.pending = wanted, moved
        else:
            one.progress.refuse(reason)
        one.armed, one.since, one.seen = False, 0, 0
        one.window_E[:] = 0

    def _commit(self, one: _Watched) -> None:
        assert one.pending is not None
        wanted, moved = one.pending
        if wanted.home_ranks == one.layer.dispatcher.placement.home_ranks:
            set_placement(one.layer, wanted)
        else:
            migrate(one.layer, wanted, self.optimizers)
        one.pending = None
        one.progress.changed += 1
        one.progress.moved_bytes += moved
        one.progress.last_change = one.progress.steps

    def _watch(self) -> None:
        """Say once what has not progressed."""
        for number, one in enumerate(self._watched):
            progress = one.progress
            still = progress.steps - (progress.last_change or 0)
            if self._warned or still < self.patience:
                continue
            if not progress.calls:
                self._warned = True
                warnings.warn(f"placement of MoE layer {number}: no training call seen in {still} steps", stacklevel=3)
            elif self.threshold is not None and progress.planned and progress.refused and not one.armed:
                self._warned = True
                warnings.warn(f"placement of MoE layer {number}: unchanged for {still} steps though its load is above "
                              f"the threshold; plans refused: {progress.refused}", stacklevel=3)  # fmt: skip

    def _spread(self, one: _Watched, counts_E: np.ndarray) -> np.ndarray:
        """int64 [W, E]: counts, evenly over the source ranks, since only their sums are known everywhere."""
        ranks = one.layer.dispatcher.placement.world_size
        each, more = np.divmod(counts_E, ranks)
        return each[None, :] + (np.arange(ranks)[:, None] < more[None, :])

    def _ratio(self, one: _Watched, counts_WE: np.ndarray) -> float:
        """Rows of the fullest rank over the mean."""
        placement = one.layer.dispatcher.placement
        seats = load_of(counts_WE[:, None, :], placement, [0] * placement.world_size, 1).seats
        loads = rank_rows(seats, placement.world_size)
        return max(loads) * len(loads) / max(1, sum(loads))

    def _price(self, one: _Watched, counts_WE: np.ndarray, placement: Placement) -> float:
        phases = self.costs if _relays(one.layer) else _from_home(self.costs)
        load = load_of(counts_WE[:, None, :], placement, [0] * placement.world_size, self.ranks_per_node)
        return priced(load, load.seats, phases)


def _unwatch(layer: MoELayer, watcher: object) -> None:
    """When the controller is gone."""
    layer._left.watchers[:] = [one for one in layer._left.watchers if one is not watcher]


def _relays(layer: MoELayer) -> bool:
    """Whether kept copies may go from rank to rank: under "auto", which looks at both forms, or as a pair says."""
    schedule = layer.schedule
    return isinstance(schedule, AutoSchedule) or (isinstance(schedule, SchedulePair) and bool(schedule.relayed_copies))


def _from_home(costs: Sequence[PhaseCosts]) -> tuple[PhaseCosts, ...]:
    """As where nothing is relayed."""
    return tuple(replace(one, relays=False) for one in costs)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_planner(planner: object) -> None:
    """Raises ConfigError for what cannot be called with two arguments, such as a planner of `placement.planners`."""
    try:
        signature(planner).bind(None, None)  # type: ignore[arg-type]
    except TypeError:
        expected = (
            "a function (counts, placement now) -> Placement: copies_planner(costs, spare=...); of a planner such as "
            "Flex() lambda counts, now: Flex()(counts, topology, slots=..., current=now)"
        )
        raise ConfigError("planner", type(planner).__name__, expected) from None


_STATES = 2  # an optimizer's tensors beside a weight, as of Adam


def _expert_bytes(layer: MoELayer) -> int:
    w_in, w_out = layer.expert_weights
    return row_width(w_in, w_out) * w_in.element_size()
