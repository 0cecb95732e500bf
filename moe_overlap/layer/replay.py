"""Routing replay: a forward's decisions are recorded, and replayed in another forward or in training.

    with RoutingRecorder(model) as recorder:
        model(x)                                    # any number of calls, of any number of layers
    recorder.log.save("rollout.safetensors")

    with RoutingReplay(model, "rollout.safetensors"):
        loss = model(x).sum()                       # the same calls of each layer, in the same order
    loss.backward()

Expert ids of a replay are those recorded, exactly. It is for reinforcement learning, whose trainer has to take the
experts that its rollouts took (R3, arXiv 2510.11370), and for comparing schedules, machines and dtypes at one routing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.routing_log import LayerLog, RoutingLog
from moe_overlap.layer.stats import LastStep
from moe_overlap.layer.tape import WEIGHTS, Script
from moe_overlap.routing.replayed import Recorded


def layers_of(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model by name, each once. Raises ConfigError where there is none."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoELayer)}
    if not found:
        raise ConfigError("model", type(model).__name__, "a model with a MoELayer")
    return found


class RoutingRecorder:
    """Records the routing of every forward call of a model's layers: of training and of use, but no recompute, no
    calibration of schedule="auto" and no call that failed. A context manager; each entry begins a new log.

    model: one with MoE layers, or a layer. device: where the copies are kept; None: where they are made, without a wait
    of the host. Memory: see `RoutingLog.bytes`. Under torch.compile a recorded layer has one graph break.
    """

    def __init__(self, model: nn.Module, *, device: torch.device | str | None = None) -> None:
        self._layers = layers_of(model)
        self._device = device
        self._calls: dict[str, list[Recorded]] = {}
        self._watchers: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if self._watchers:
            raise ConfigError("recorder", "entered twice", "one `with` at a time")
        if any(layer._tape.recorders for layer in self._layers.values()):
            raise ConfigError("recorder", "a second one", "one recorder of a layer at a time")
        self._calls = {name: [] for name in self._layers}
        for name, layer in self._layers.items():
            self._watchers[name] = partial(self._ended, name)
            layer.watch(self._watchers[name])
            layer._tape.recorders, layer._tape.device = 1, self._device
        return self

    def __exit__(self, *_: object) -> None:
        for name, layer in self._layers.items():
            layer._left.watchers.remove(self._watchers.pop(name))
            layer._tape.recorders, layer._tape.decided = 0, None

    @property
    def log(self) -> RoutingLog:
        """What has been recorded so far."""
        return RoutingLog(
            layers=tuple(
                LayerLog(name=name, num_experts=layer.dispatcher.placement.num_experts,
                         calls=tuple(self._calls.get(name, ())))
                for name, layer in self._layers.items()
            )
        )  # fmt: skip

    def _ended(self, name: str, _: LastStep) -> None:
        tape = self._layers[name]._tape
        if tape.decided is not None:
            self._calls[name].append(tape.decided)
            tape.decided = None


class RoutingReplay:
    """Has the coming forward calls of a model's layers route as recorded: each layer's first call as its first recorded
    one, and so on. A context manager.

    log: a RoutingLog, or the path of a file with one (`moe-overlap train --save-routing` writes such a file too).
    Layers are matched by name, or by their order where names differ (a model may be wrapped).
    weights: "current": those that the router gives now to the recorded experts, with its losses and gradients, equal to
    the recorded ones, up to rounding, for an equal router. Routers without that raise (`routing.LinearRouter` and all
    that are made of it have it). "recorded": constants; the router is not asked and gets no gradient.

    A recompute of activation checkpointing replays what its forward replayed, also after the `with`; its call is told
    by its tokens, so a router's input must be computed again with equal bits, which a sum and a read by the host
    check. Padding (`token_mask`) goes nowhere whatever was recorded.

    What does not fit (another number of calls, tokens, experts or layers, a broken file) is a ConfigError in the first
    call that it concerns, on all ranks of the layer, and nothing was sent; so is a rank that replays another call than
    the others (PlanMismatch). Calls that are left over at the end of the `with` are a ConfigError there.
    """

    def __init__(self, model: nn.Module, log: RoutingLog | str | Path, *, weights: str = "current") -> None:
        if weights not in WEIGHTS:
            raise ConfigError("weights", weights, f"one of {WEIGHTS}")
        self._layers = layers_of(model)
        self._weights = weights
        self._logs: dict[str, LayerLog] = {}
        self._error: ConfigError | None = None
        self._running: dict[str, tuple[Script, Any]] = {}
        try:
            found = log if isinstance(log, RoutingLog) else RoutingLog.load(log)
            self._logs = _matched(found, list(self._layers))
        except ConfigError as error:  # of this rank alone, perhaps: the layers' first calls tell the others
            self._error = error

    def __enter__(self) -> Self:
        if self._running or any(layer._tape.script is not None for layer in self._layers.values()):
            raise ConfigError("replay", "entered twice", "one replay of a layer at a time")
        for name, layer in self._layers.items():
            log = self._logs.get(name) or LayerLog(name=name, num_experts=0, calls=())
            script = Script(log.calls, log.num_experts, self._weights, self._error)
            watcher = partial(_ended, script)
            layer._tape.script = script
            layer.watch(watcher)
            self._running[name] = script, watcher
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running, self._running = self._running, {}
        for name, (_, watcher) in running.items():
            layer = self._layers[name]
            layer._tape.script = None
            layer._left.watchers.remove(watcher)
        if error is not None:
            return
        for name, (script, _) in running.items():
            if self._error is None and script.done != len(script.calls):
                expected = f"{len(script.calls)}, all that were recorded of layer {name!r}"
                raise ConfigError("replay.calls", script.done, expected)


def _ended(script: Script, _: LastStep) -> None:
    script.done += 1


def _matched(log: RoutingLog, names: list[str]) -> dict[str, LayerLog]:
    """By name of the model's layers. Raises ConfigError for another number of layers."""
    if len(log.layers) != len(names):
        raise ConfigError("replay.layers", len(log.layers), f"{len(names)}, the MoE layers of the model")
    by_name = {layer.name: layer for layer in log.layers}
    if set(by_name) == set(names):
        return by_name
    return dict(zip(names, log.layers, strict=True))
