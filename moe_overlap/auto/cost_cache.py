"""Where cost models are kept between processes: one JSON file for each thing that was measured.

The name of the file says what that was, as far as a process can tell: hardware, versions, kernels, which ranks share a
host, and the shapes, dtypes and classes of all that computes. Not what joins the hosts: where the same hosts have
several networks, each needs a MOE_OVERLAP_CACHE_DIR of its own. Nor what a class does beyond its parameters, so a model
of ops without any is not kept at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_overlap.agreement.record import digest
from moe_overlap.auto.calibrate import Nodes, gathered, wires
from moe_overlap.config import EXCHANGE_SMS, TILES, cache_dir
from moe_overlap.errors import ConfigError
from moe_overlap.measure.files import read_regular, write_atomically
from moe_overlap.measure.machine import hardware
from moe_overlap.native.build_info import VERSION
from moe_overlap.ops import registry
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.transport.base import Transport
from moe_overlap.transport.control import host_name

logger = logging.getLogger(__name__)

CACHE_VERSION = 7
MOST_BYTES = 1 << 20  # of a file
_NAME = re.compile(r"[0-9a-f]{24}\.json")  # of `cache_file`: whatever else lies in the folder is left alone


def cache_key(
    measured: Mapping[str, Any],
    *,
    transport: Transport,
    device: torch.device,
    dtype: torch.dtype,
    nodes: Nodes | None,
    hosts: Sequence[int],
) -> dict[str, Any]:
    """What a measurement depends on: `measured`, which describes the layer and the ops beside its exchanges, and what
    it ran on. nodes: the node of each rank, where the transport knows; hosts: see `hosts_of`."""
    link = getattr(transport, "link", None)
    return {
        **measured,
        "cache": CACHE_VERSION,
        "moe_overlap": VERSION,
        "torch": torch.__version__,
        "hardware": hardware(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "kernels": registry.explain(device, dtype),
        "threads": torch.get_num_threads(),
        "exchange_sms": EXCHANGE_SMS.read(),
        "tiles": TILES.read(),
        "world_size": transport.world_size,
        "transport": transport.name,
        "link": None if link is None else str(link),
        "nodes": None if nodes is None else list(nodes),
        "hosts": list(hosts),
    }


def hosts_of(transport: Transport, device: torch.device) -> list[int]:
    """Which ranks share a host: a number for each rank, counted in the order of the ranks. Collective."""
    number = digest(host_name()) % (1 << 48)  # exact in float64
    table = gathered(transport, torch.tensor([float(number)], dtype=torch.float64, device=device))
    found = table[:, 0].tolist()
    order = list(dict.fromkeys(found))
    return [order.index(one) for one in found]


def cache_file(key: dict[str, Any]) -> Path:
    return cache_dir() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


def kept() -> list[Path]:
    """The files of the cache, of any version of this library."""
    try:
        return sorted(path for path in cache_dir().glob("*.json") if _NAME.fullmatch(path.name) and path.is_file())
    except OSError:
        return []


def clear() -> int:
    """Remove all of them; how many there were. OSError where one cannot be removed."""
    files = kept()
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)


# What could not be written, for the other layers of this process.
_unwritten: dict[Path, CostModel] = {}


def load(key: dict[str, Any]) -> CostModel | None:
    """The cached model of exactly this key; None where there is none, or none that can be used."""
    path = cache_file(key)
    if path in _unwritten:
        return _unwritten[path]
    try:
        entry = json.loads(read_regular(path, most_bytes=MOST_BYTES))
        if entry["key"] != key:
            raise ValueError("it is of another measurement")
        return fitting(CostModel.from_json(entry["model"]), key)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        logger.warning("measuring again: %s cannot be used: %s: %s", path, type(error).__name__, str(error)[:200])
        return None


def fitting(model: CostModel, key: dict[str, Any]) -> CostModel:
    """`model`, if it has the wires and the ops of the layer with this key, and the figures of deduplicated steps where
    that has them. Raises ConfigError where it has others."""
    wanted = wires(key["world_size"], key["nodes"])
    if set(model.exchange) != set(wanted):
        raise ConfigError("exchange", sorted(model.exchange), f"the wires {sorted(wanted)}")
    if len(model.backbone_s) != len(key["ops"]):
        raise ConfigError("backbone_s", model.backbone_s, f"{len(key['ops'])} ops")
    if (model.distinct is None) != (not key["dedup"]):
        raise ConfigError("distinct", model.distinct, "figures of deduplicated steps" if key["dedup"] else "None")
    return model


def store(key: dict[str, Any], model: CostModel) -> tuple[Path | None, str | None]:
    """Keep a model; (where, or None; why not). A directory that cannot be written costs the next process a calibration,
    but not the other layers of this one."""
    path = cache_file(key)
    try:
        write_atomically(path, json.dumps({"key": key, "model": model.to_json()}, indent=1).encode())
        _unwritten.pop(path, None)
    except OSError as error:
        logger.warning("the cost model is kept for this process only: %s cannot be written: %s", path, error)
        _unwritten[path] = model
        return None, f"{path} cannot be written: {error}"
    return path, None
