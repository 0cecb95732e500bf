"""Options of `moe-overlap plan` that are texts with a unit, a list or a file, and how they are read: SI units."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from moe_overlap.errors import ConfigError
from moe_overlap.measure.files import read_regular
from moe_overlap.planning.cost_model import CostModel

MAX_FILE_BYTES = 1 << 20
LONGEST_S = 3600.0
FASTEST_RATE = 1e15
FASTEST_FLOPS = 1e24

_TIME = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(ns|us|ms|s)")
_TIMES = {"ns": "e-9", "us": "e-6", "ms": "e-3", "s": ""}
_FLOPS = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([gtp])flops?(?:/s)?")
_RATE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(kbit|mbit|gbit|kb|mb|gb)(?:/s|ps)?")
_RATES = {"kbit": 125.0, "mbit": 125e3, "gbit": 125e6, "kb": 1e3, "mb": 1e6, "gb": 1e9}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([mgt])b")
_SIZES = {"m": "e6", "g": "e9", "t": "e12"}
_FLOPS_UNITS = {"g": "e9", "t": "e12", "p": "e15"}


def _rate(flag: str, text: str) -> float:
    match = _RATE.fullmatch(text.strip().lower()) if text.isascii() else None
    rate = float(match[1]) * _RATES[match[2]] if match else 0.0
    if not 1 <= rate <= FASTEST_RATE:
        raise ConfigError(flag, text, "a rate such as 400gbit or 50GB (kbit mbit gbit kB MB GB per second)")
    return rate


def _rate_or_none(flag: str, text: str) -> float | None:
    return _rate(flag, text) if text else None


def _seconds(flag: str, text: str) -> float:
    match = _TIME.fullmatch(text.strip().lower())
    seconds = float(match[1] + _TIMES[match[2]]) if match else math.inf  # as text, so that 10us is 1e-5 exactly
    if seconds > LONGEST_S:
        raise ConfigError(flag, text, f"a time from 0 to {LONGEST_S:g}s, such as 10us (ns us ms s)")
    return seconds


def _flops(flag: str, text: str) -> float:
    match = _FLOPS.fullmatch(text.strip().lower())
    flops = float(match[1] + _FLOPS_UNITS[match[2]]) if match else math.inf
    if not 1 <= flops <= FASTEST_FLOPS:
        raise ConfigError(
            flag, text, f"a rate up to {FASTEST_FLOPS:g} a second, such as 400tflops (gflops tflops pflops)"
        )
    return flops


def _bytes(flag: str, text: str) -> float:
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(flag, text, "a size such as 80GB (MB GB TB)")
    return float(match[1] + _SIZES[match[2]])


def _backbone(flag: str, text: str) -> tuple[float, ...] | None:
    if text == "auto":
        return None
    words = text.split(",")
    if len(words) != 3:
        raise ConfigError(flag, text, "auto, or the times of attention, MLP, attention, such as 1.2ms,0.8ms,1.2ms")
    return tuple(_seconds(flag, word) for word in words)


def _cost_model(flag: str, path: str) -> CostModel | None:
    if not path:
        return None
    try:
        return CostModel.from_json(json.loads(read_regular(Path(path), most_bytes=MAX_FILE_BYTES)))
    except OSError as error:
        raise ConfigError(flag, path, f"a file that can be read ({error.strerror})") from None
    except ConfigError as error:
        raise ConfigError(flag, path, f"a cost model: {error}") from None
    except (ValueError, RecursionError):
        raise ConfigError(flag, path, "a JSON file of moe-overlap calibrate") from None


# Option -> (how its text is read, default as text, help).
TEXTS: dict[str, tuple[Any, str, str]] = {
    "bandwidth": (_rate, "400gbit", "of one rank to other nodes"),
    "latency": (_seconds, "10us", "of one exchange, whatever its size"),
    "intra_bandwidth": (_rate, "450GB", "of one rank to the ranks of its node"),
    "flops": (_flops, "400tflops", "assumed: rate that matmuls reach beside nothing, not the peak"),
    "memory_bandwidth": (_rate, "2500GB", "assumed: for permuting, packing and combining rows"),
    "message": (_seconds, "1us", "assumed: of each message of an exchange, one per peer"),
    "launch": (_seconds, "20us", "assumed: fixed cost of the experts on one chunk, of P and of U"),
    "issue": (_seconds, "5us", "assumed: compute-lane time of starting an exchange, and of waiting for it"),
    "backbone": (_backbone, "auto", "auto (from FLOPs), or forward times of attention, MLP, attention: 1ms,2ms,1ms"),
    "memory": (_bytes, "0GB", "of a rank's card, to say whether the model fits; 0GB: nobody asks"),
    "cost_model": (_cost_model, "", "calibrated JSON instead of --flops and the other assumptions about compute"),
    "expert_offload": (_rate_or_none, "", "experts in host memory, over a link of this rate in each direction (50GB)"),
}
