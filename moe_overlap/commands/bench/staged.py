"""`moe-overlap bench layer --device cuda --link staged`: overlap over a real wire on one card.

Every exchange goes down to the host's memory and up again (`transport/staged.py`), with the bytes that one of --ranks
ranks with equal loads sends. What the rows say stands in `staged_rows.py`; OUT/results.jsonl has all of them as they
come, OUT/timeline.png the steps of three ways. A claim about PCIe, not about a network.
"""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_overlap.agreement.sizes import BLOCKS
from moe_overlap.commands.bench import cuda_timing
from moe_overlap.commands.bench.options import given_options
from moe_overlap.commands.bench.staged_rows import measure_shapes
from moe_overlap.commands.bench.staged_ways import CASES, WAYS
from moe_overlap.commands.parser import check_count, flag_of, fresh_folder
from moe_overlap.errors import ConfigError
from moe_overlap.launch.launch import torchrun_world_size
from moe_overlap.measure.machine import commit
from moe_overlap.measure.report import append_jsonl

PROGRAM = "moe-overlap bench layer"
LINK = "staged"
OUTPUTS = ("results.jsonl", "timeline.png")
COLUMNS = (("T_serial ms", "serial_ms"), ("T_nocomm ms", "nocomm_ms"), ("T_ovl ms", "ms"),
           ("overlap_eff", "overlap_eff"), ("allowed", "allowed"), ("share", "share"))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StagedOptions:
    """`ranks`: W, whose bytes travel: (W - 1) / W of all rows. `cases`: shapes; `schedules`: ways to overlap them."""

    ranks: int = 8
    cases: tuple[str, ...] = CASES
    schedules: tuple[str, ...] = WAYS
    out: str = "out/bench"

    def __post_init__(self) -> None:
        check_count("ranks", self.ranks, least=2)
        if not self.cases or not set(self.cases) <= set(CASES):
            raise ConfigError("--cases", ",".join(self.cases), f"some of {', '.join(CASES)}, with --link {LINK}")
        if not self.schedules or not all(map(_is_way, self.schedules)):
            expected = f"some of serial, shortcut, chunked(2) to chunked({BLOCKS}), with --link {LINK}"
            raise ConfigError("--schedules", ",".join(self.schedules), expected)


def _is_way(word: str) -> bool:
    chunks = re.fullmatch(r"chunked\((\d{1,2})\)", word)
    return word in ("serial", "shortcut") if chunks is None else 2 <= int(chunks[1]) <= BLOCKS


def is_asked(given: Mapping[str, Any]) -> bool:
    """Whether the options on a command line are of this course, or of none."""
    return given.get("device", "cpu") == "cuda" or given.get("link") == LINK


def options_of(given: Mapping[str, Any]) -> StagedOptions:
    """Raises ConfigError for options that do not go with a device, or with this link."""
    values = dict(given)
    device, link = values.pop("device", "cpu"), values.pop("link", "none")
    if link != LINK:
        expected = f"cpu, or --link {LINK} beside it: block pairs and other links are of ranks that compute on the CPU"
        raise ConfigError("--device", device, expected)
    known = tuple(StagedOptions.__dataclass_fields__)
    for name, value in values.items():
        if name not in known:
            expected = f"no {flag_of(name)} beside --link {LINK}, whose layers are those of --cases, in bfloat16"
            said = ",".join(value) if isinstance(value, tuple) else value
            raise ConfigError(flag_of(name), said, expected)
    if torchrun_world_size() is not None:
        raise ConfigError("--link", LINK, "one process, not those of torchrun: --ranks says whose bytes travel")
    return StagedOptions(**values)


def why_not(given: Mapping[str, Any]) -> str | None:
    """Why nothing can be measured here, or None."""
    if given.get("device", "cpu") != "cuda":
        return f"--link {LINK}: needs --device cuda: its wire is that of a card to its host"
    reason = cuda_timing.no_gpu()
    return None if reason is None else f"--link {LINK}: needs --device cuda, and there is none: {reason}"


def main(argv: Sequence[str]) -> int:
    """Measure; the exit status. Raises ConfigError."""
    given = given_options(argv)
    options = options_of(given)
    if reason := why_not(given):
        print(f"{PROGRAM}: {reason}", file=sys.stderr)
        return 2
    out = fresh_folder("--out", options.out, OUTPUTS)
    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(0),
    }
    rows: list[dict[str, Any]] = []

    def write(**row: Any) -> None:
        rows.append(about | row)
        append_jsonl(out / OUTPUTS[0], rows[-1:])
        print(f"{PROGRAM}: {row['case']} {row['implementation']}: {row.get('result', 'done')}", file=sys.stderr)

    measure_shapes(write, cases=options.cases, ways=options.schedules, ranks=options.ranks, picture=out / OUTPUTS[1])
    print("\n".join(table(rows, options, about["device"])))
    print(f"wrote {', '.join(str(out / name) for name in OUTPUTS if (out / name).exists())}")
    return 1 if any("result" in row for row in rows) else 0


def table(rows: Sequence[Mapping[str, Any]], options: StagedOptions, device: str) -> list[str]:
    """The answer: a line for each way of each shape."""
    lines = [f"{device}, every exchange to the host's memory and back, bytes of one of {options.ranks} ranks"]
    lines.append("  ".join(["case".ljust(24), "schedule".ljust(12), *(name.rjust(12) for name, _ in COLUMNS)]))
    for row in rows:
        if row["implementation"] not in options.schedules:
            continue
        cells = [str(row["case"])[:24].ljust(24), str(row["implementation"]).ljust(12)]
        if "result" in row:
            lines.append("  ".join([*cells, str(row["result"])]))
            continue
        figures = ["-" if row.get(key) is None else str(row[key]) for _, key in COLUMNS]
        lines.append("  ".join([*cells, *(text.rjust(12) for text in figures), str(row.get("note", ""))]).rstrip())
    lines.append("T_serial: every exchange waited for where it starts; T_nocomm: exchanges replaced by copies on the "
                 "card; overlap_eff: share of the exchanges that is hidden; allowed: by the closed forms; share of the "
                 "two.")  # fmt: skip
    return lines
