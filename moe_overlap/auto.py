"""schedule="auto" in a layer: calibrate at the first step, then choose by `planned.py`.

The first forward call of a layer (for training, for inference, for each dtype of the rows) looks for a cost model in
the cache and measures one where there is none: real steps on this call's tokens and routing, on the same transport.
Parameters, their gradients, buffers and random numbers are as they were before.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_overlap.config import cache_dir
from moe_overlap.errors import ConfigError
from moe_overlap.measure.calibrate import MAX_GROUPS, StepTimes, calibrate, gathered
from moe_overlap.measure.machine import hardware
from moe_overlap.plan import PHASES, ChunkBy
from moe_overlap.planned import PlannedSchedule
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.planning.window import OpVerb
from moe_overlap.schedule.builders import SchedulePair, chunked, serial, window
from moe_overlap.schedule.rows import ExpertWeights
from moe_overlap.schedule.run import Step
from moe_overlap.transport.base import Transport

Op = Callable[[torch.Tensor], torch.Tensor]
CACHE_VERSION = 1
UNPLANNED = serial()  # what a step says it runs while "auto" has not chosen


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbeInputs:
    """What the probes of a layer run on: this rank's tokens, routing and weights; all detached.

    dispatcher: the layer's. backbone: the ops beside the exchanges and their input h; shared: the shared expert.
    """

    dispatcher: Any
    x_TD: torch.Tensor
    slots_TK: torch.Tensor
    weights_TK: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    h: torch.Tensor | None = None
    backbone: Sequence[Op] = ()
    shared: Op | None = None

    @property
    def modules(self) -> list[nn.Module]:
        return [op for op in (*self.backbone, self.shared) if isinstance(op, nn.Module)]

    @property
    def transport(self) -> Transport:
        transport: Transport = self.dispatcher.transport
        return transport

    def pair(self, chunks: int, by: ChunkBy) -> SchedulePair:
        if self.backbone:
            return window(len(self.backbone), len(self.backbone) // 2, chunks=chunks, by=by)
        return chunked(chunks, by, shared=self.shared is not None)

    def run(self, pair: SchedulePair) -> StepTimes:
        """One step, forward and (where gradients are enabled) backward."""
        grad = torch.is_grad_enabled()

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().requires_grad_(grad and tensor.is_floating_point())

        x_TD, w_in, w_out, weights_TK = map(leaf, (self.x_TD, self.w_in, self.w_out, self.weights_TK))
        start_s = time.perf_counter()
        weights = ExpertWeights(w_in=w_in.detach(), w_out=w_out.detach(), kind=self.dispatcher.activation)
        step = Step(self.transport, weights, phase=PHASES[0])
        x_rows, x_shared = step.enter(x_TD, w_in, w_out, copies=2)
        exchange = self.dispatcher.plan(self.slots_TK, x_rows, pair)
        step.bind(pair, exchange, x_rows, self.slots_TK, weights_TK)
        h = None if self.h is None else leaf(self.h)
        step.hidden = h
        shared = self.shared
        y_TD = step.run(self.backbone, None if shared is None else lambda: shared(x_shared))
        outputs = [y_TD] if h is None else [y_TD, step.take_hidden()]
        outputs += [one for one in [step.take_shared()] if one is not None]
        forward_s = time.perf_counter() - start_s
        if grad:
            parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
            leaves = [one for one in (x_TD, w_in, w_out, weights_TK, h, *parameters) if one is not None]
            reached = [one for one in outputs if one.requires_grad]
            torch.autograd.grad(reached, leaves, [torch.ones_like(one) for one in reached], allow_unused=True)
        end_s = time.perf_counter()
        backward_s = end_s - start_s - forward_s if grad else 0.0
        return StepTimes(events=step.events, forward_s=forward_s, backward_s=backward_s, exchange=exchange)


@dataclass(eq=False, kw_only=True)
class AutoSchedule:
    """The word "auto" of one layer or block: its planned schedules, by (gradients enabled, dtype of the rows)."""

    op_verb: OpVerb
    num_ops: int
    overlap: bool = True
    found: dict[tuple[bool, torch.dtype], PlannedSchedule] = field(default_factory=dict)
    files: dict[tuple[bool, torch.dtype], Path] = field(default_factory=dict)  # where rank 0 keeps the cost models
    name = "auto"

    def get(self, dtype: torch.dtype) -> PlannedSchedule | None:
        """The schedules for the coming step, or None before the calibration."""
        return self.found.get((torch.is_grad_enabled(), dtype))

    def prepare(self, inputs: ProbeInputs) -> PlannedSchedule:
        """Load or measure the cost model of the coming steps. Collective: every rank comes here in its first step."""
        dtype = inputs.x_TD.dtype
        row_bytes = inputs.x_TD.shape[1] * dtype.itemsize
        node_of = topology(inputs.transport)
        key = cache_key(inputs)
        model = shared_model(inputs.transport, load(key), inputs.x_TD.device)
        if model is None:
            source = f"measured on {hardware()}, {date.today()}"
            with undisturbed(inputs.modules, inputs.x_TD.device):
                model = calibrate(
                    inputs.run,
                    inputs.pair,
                    inputs.transport,
                    groups=min(MAX_GROUPS, inputs.w_in.shape[0]),
                    row_bytes=row_bytes,
                    node_of=node_of,
                    device=inputs.x_TD.device,
                    source=source,
                )
            if inputs.transport.rank == 0:
                store(key, model)
        schedule = PlannedSchedule(model=model, num_ops=self.num_ops, op_verb=self.op_verb, row_bytes=row_bytes,
                                   node_of=node_of, overlap=self.overlap)  # fmt: skip
        self.found[torch.is_grad_enabled(), dtype] = schedule
        self.files[torch.is_grad_enabled(), dtype] = cache_file(key)
        return schedule


def topology(transport: Transport) -> Callable[[int], int] | None:
    """The node of each rank, where the transport knows."""
    known = getattr(transport, "topology", None)
    return None if known is None else known.node_of


@contextmanager
def undisturbed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Random numbers and the buffers of `modules` are restored at the end. A checkpoint around the caller does not
    see the tensors that probes save."""
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    devices = [device] if device.type == "cuda" else []
    # The innermost hooks win: a probe's backward must not make an activation checkpoint recompute the caller.
    with torch.random.fork_rng(devices=devices), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


# ---------------------------------------------------------------- the cache


def cache_key(inputs: ProbeInputs) -> dict[str, Any]:
    """What a measurement depends on."""
    from moe_overlap import __version__

    d = inputs.dispatcher
    link = getattr(inputs.transport, "link", None)
    return {
        "cache": CACHE_VERSION,
        "moe_overlap": __version__,
        "torch": torch.__version__,
        "hardware": hardware(),
        "device": torch.cuda.get_device_name(inputs.x_TD.device) if inputs.x_TD.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "world_size": inputs.transport.world_size,
        "transport": inputs.transport.name,
        "link": None if link is None else str(link),
        "tokens": inputs.x_TD.shape[0],
        "hidden": d.hidden,
        "ffn_hidden": d.ffn_hidden,
        "experts": d.placement.num_experts,
        "top_k": inputs.slots_TK.shape[1],
        "activation": d.activation,
        "dtype": str(inputs.x_TD.dtype),
        "grad": torch.is_grad_enabled(),
        "ops": [sum(p.numel() for p in op.parameters()) if isinstance(op, nn.Module) else 0 for op in inputs.backbone],
        "shared": inputs.shared is not None,
    }


def cache_file(key: dict[str, Any]) -> Path:
    return cache_dir() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


def load(key: dict[str, Any]) -> CostModel | None:
    """The cached model of exactly this key; None where there is none or the file cannot be read as one."""
    try:
        entry = json.loads(cache_file(key).read_text(encoding="utf-8"))
        return CostModel.from_json(entry["model"]) if entry["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # it is measured again, and the model says when


def store(key: dict[str, Any], model: CostModel) -> None:
    """Keep a model. A directory that cannot be written costs the next process a calibration, nothing else."""
    path = cache_file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump({"key": key, "model": model.to_json()}, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return


TEXT_LIMIT = 1 << 16


def shared_model(transport: Transport, model: CostModel | None, device: torch.device) -> CostModel | None:
    """Rank 0's model, or its None, on every rank: caches may differ between machines. Collective."""
    data = b"" if model is None or transport.rank else json.dumps(model.to_json()).encode()
    if len(data) > TEXT_LIMIT:
        raise ConfigError("cost model", f"{len(data)} bytes", f"at most {TEXT_LIMIT}")
    length = int(gathered(transport, torch.tensor([float(len(data))], dtype=torch.float64, device=device))[0])
    if not length:
        return None
    padded = torch.zeros(length, dtype=torch.float64, device=device)
    padded[: len(data)] = torch.tensor(list(data), dtype=torch.float64, device=device)
    text = bytes(int(value) for value in gathered(transport, padded)[0].tolist())
    return CostModel.from_json(json.loads(text))
