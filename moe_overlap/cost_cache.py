"""Where cost models are kept between processes: one JSON file for each thing that was measured."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_overlap.config import cache_dir
from moe_overlap.errors import ConfigError
from moe_overlap.measure.calibrate import Nodes, wires
from moe_overlap.measure.machine import hardware
from moe_overlap.ops import registry
from moe_overlap.planning.cost_model import CostModel

if TYPE_CHECKING:
    from moe_overlap.auto import ProbeInputs

logger = logging.getLogger(__name__)

CACHE_VERSION = 2


def cache_key(inputs: ProbeInputs, *, nodes: Nodes | None) -> dict[str, Any]:
    """What a measurement depends on. nodes: the node of each rank, where the transport knows."""
    from moe_overlap import __version__

    d, device = inputs.dispatcher, inputs.x_TD.device
    link = getattr(inputs.transport, "link", None)
    return {
        "cache": CACHE_VERSION,
        "moe_overlap": __version__,
        "torch": torch.__version__,
        "hardware": hardware(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "kernels": registry.explain(device, inputs.x_TD.dtype),
        "threads": torch.get_num_threads(),
        "world_size": inputs.transport.world_size,
        "transport": inputs.transport.name,
        "link": None if link is None else str(link),
        "nodes": None if nodes is None else list(nodes),
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


# What could not be written, for the other layers of this process.
_unwritten: dict[Path, CostModel] = {}


def load(key: dict[str, Any]) -> CostModel | None:
    """The cached model of exactly this key; None where there is none, or none that can be used."""
    path = cache_file(key)
    if path in _unwritten:
        return _unwritten[path]
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["key"] != key:
            raise ValueError("it is of another measurement")
        return fitting(CostModel.from_json(entry["model"]), key)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        logger.warning("measuring again: %s cannot be used: %s: %s", path, type(error).__name__, str(error)[:200])
        return None


def fitting(model: CostModel, key: dict[str, Any]) -> CostModel:
    """`model`, if it has the wires and the ops of the layer with this key. Raises ConfigError where it has others."""
    wanted = wires(key["world_size"], key["nodes"])
    if set(model.exchange) != wanted:
        raise ConfigError("exchange", sorted(model.exchange), f"the wires {sorted(wanted)}")
    if len(model.backbone_s) != len(key["ops"]):
        raise ConfigError("backbone_s", model.backbone_s, f"{len(key['ops'])} ops")
    return model


def store(key: dict[str, Any], model: CostModel) -> Path | None:
    """Keep a model; where, or None. A directory that cannot be written costs the next process a calibration."""
    path = cache_file(key)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"key": key, "model": model.to_json()}, indent=1), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        logger.warning("the cost model is kept for this process only: %s cannot be written: %s", path, error)
        _unwritten[path] = model
        with suppress(OSError):
            part.unlink(missing_ok=True)
        return None
    return path
