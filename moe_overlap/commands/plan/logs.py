"""What people have measured of their wires, as figures of the command line: the text of nccl-tests' `alltoall_perf`,
the text of DeepEP's tests, and Kineto traces (torch.profiler) with NCCL's all-to-alls in them.

    nccl-tests    size, and out-of-place time in microseconds, of each line: alpha + beta * bytes that leave a rank
    DeepEP        the best dispatch and combine: GB/s over RDMA and over NVLink; the lower of both directions counts
    Kineto        kernels with `Collective name`, `In msg nelems`, `dtype` and `Group size` (torch 2.4 and later)
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_overlap.errors import ConfigError
from moe_overlap.measure.files import read_regular
from moe_overlap.planning.cost_model import AlphaBeta

FLAG = "--measured"
MOST_BYTES = 256 << 20
EXPECTED = "the text of nccl-tests' alltoall_perf or of DeepEP's tests, or a Kineto trace (JSON)"
# size count type redop root time ...; older ones have no root.
_NCCL = re.compile(r"^\s*(\d+)\s+\d+\s+(\w+)\s+\w+\s+(?:-?\d+\s+)?([\d.]+)\s+[\d.]+\s+[\d.]+\s+\S+")
_NCCL_RANK = re.compile(r"^#\s+Rank\s+(\d+).*\son\s+(\S+)\s+device")
_DEEPEP = re.compile(r"\[tuning\] Best (dispatch|combine).*?:.*?:\s*([\d.]+) GB/s \((RDMA|NVL)\)"
                     r"(?:,\s*([\d.]+) GB/s \((NVL)\))?")  # fmt: skip
_ALL_TO_ALLS = ("all_to_all", "all_to_allv", "alltoall", "alltoallv", "_alltoall_base", "all_to_all_single")
_DTYPE_BYTES = {"BFloat16": 2, "Half": 2, "Float": 4, "Double": 8, "Byte": 1, "Char": 1, "Float8_e4m3fn": 1,
                "Int": 4, "Long": 8}  # fmt: skip


def measured_figures(path: str, *, ranks_per_node: int) -> dict[str, float]:
    """Fields of `PlanOptions`: latency and the rate of one wire, or of both. ranks_per_node: how a trace's group lies
    on nodes, which the other two say themselves. Raises ConfigError("--measured") for anything else."""
    try:
        text = read_regular(Path(path), most_bytes=MOST_BYTES).decode()
    except OSError as error:
        raise ConfigError(FLAG, path, f"a file that can be read ({error.strerror})") from None
    except ValueError:  # a path with a null byte, or bytes that are no text
        raise ConfigError(FLAG, path, EXPECTED) from None
    if "[tuning] Best" in text:
        return _deepep(path, text)
    if text.lstrip().startswith(("{", "[")):
        return _kineto(path, text, ranks_per_node)
    return _nccl_tests(path, text)


def _fitted(path: str, points: Sequence[tuple[float, float]], wire: str, what: str) -> dict[str, float]:
    """Latency and rate from (bytes that leave a rank, seconds)."""
    try:
        line = AlphaBeta.fit(points)
    except ConfigError:
        raise ConfigError(FLAG, path, f"{what} of at least two sizes, with their times") from None
    if not line.beta_s:
        raise ConfigError(FLAG, path, f"{what} that take longer the larger they are")
    return {"latency": line.alpha_s, wire: 1 / line.beta_s, "message": 0.0}


def _nccl_tests(path: str, text: str) -> dict[str, float]:
    hosts, sizes = {}, []
    for line in text.splitlines():
        rank, row = _NCCL_RANK.match(line), _NCCL.match(line)
        if rank:
            hosts[int(rank[1])] = rank[2]
        elif row:
            sizes.append((int(row[1]), float(row[3]) * 1e-6))
    if len(hosts) < 2 or not sizes:
        raise ConfigError(FLAG, path, EXPECTED + "; nccl-tests with its lines `# Rank`, of at least two ranks")
    leave = (len(hosts) - 1) / len(hosts)
    if len(set(hosts.values())) > 1:  # what crosses nodes takes the time
        per_node = len(hosts) / len(set(hosts.values()))
        leave = (len(hosts) - per_node) / len(hosts)
    wire = "bandwidth" if len(set(hosts.values())) > 1 else "intra_bandwidth"
    return _fitted(path, [(leave * size, s) for size, s in sizes if size and s], wire, "all-to-alls")


def _deepep(path: str, text: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    names = {"RDMA": "bandwidth", "NVL": "intra_bandwidth"}
    for match in _DEEPEP.finditer(text):
        found.setdefault(names[match[3]], []).append(float(match[2]) * 1e9)
        if match[5]:
            found.setdefault(names[match[5]], []).append(float(match[4]) * 1e9)
    if not found or any(rate <= 0 for rates in found.values() for rate in rates):
        raise ConfigError(FLAG, path, "lines such as `[tuning] Best dispatch (BF16): ...: 58.0 GB/s (RDMA)` of DeepEP")
    return {name: min(rates) for name, rates in found.items()}


def _kineto(path: str, text: str, ranks_per_node: int) -> dict[str, float]:
    try:
        trace = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(FLAG, path, EXPECTED) from None
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list):
        raise ConfigError(FLAG, path, "a Kineto trace: an object with traceEvents")
    points, sizes = [], set()
    for event in events:
        found = _all_to_all(event)
        if found is not None:
            size, seconds, group = found
            sizes.add(group)
            crossing = max(0, group - ranks_per_node) if group > ranks_per_node else group - 1
            points.append((size * crossing / group, seconds))
    if not points:
        expected = "kernels of NCCL's all-to-alls with `Collective name`, `In msg nelems`, `dtype` and `Group size`"
        raise ConfigError(FLAG, path, f"a Kineto trace of torch 2.4 or later: {expected}")
    if len(sizes) > 1:
        raise ConfigError(FLAG, path, f"all-to-alls of one group, not of groups of {sorted(sizes)} ranks")
    wire = "bandwidth" if max(sizes) > ranks_per_node else "intra_bandwidth"
    return _fitted(path, points, wire, "all-to-alls")


def _all_to_all(event: Any) -> tuple[float, float, int] | None:
    """(bytes, seconds, ranks) of a kernel that is an all-to-all; None for other events."""
    if not isinstance(event, dict) or event.get("cat") != "kernel" or not isinstance(event.get("args"), dict):
        return None
    args = event["args"]
    if str(args.get("Collective name")).lower() not in _ALL_TO_ALLS:
        return None
    count, group, took = args.get("In msg nelems"), args.get("Group size"), event.get("dur")
    size = _DTYPE_BYTES.get(str(args.get("dtype")))
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (count, group, took))
    if size is None or not numbers or not (count > 0 and group > 1 and took > 0):  # type: ignore[operator]
        return None
    return float(count * size), 1e-6 * took, int(group)  # type: ignore[operator]
