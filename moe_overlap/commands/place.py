"""`moe-overlap place`: what planners would make of a trace of loads: balance, what has to move, predicted step times.

Nothing is run. The placement before has every expert once, in order. Each planner sees the sum of the first half of
the trace and is judged on the second half, whose steps it has not seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from moe_overlap.commands.bench.routing import read_file
from moe_overlap.commands.parser import OneLineParser, TypedDefaults, check_count, check_folder, check_number, flag_of
from moe_overlap.commands.progress import saying
from moe_overlap.errors import ConfigError
from moe_overlap.measure.files import read_regular, write_atomically
from moe_overlap.measure.picture import write_figure
from moe_overlap.placement import Placement
from moe_overlap.placement.demand import MOST_COUNT, balance_ratio, rank_load, step_s
from moe_overlap.placement.planners import PLANNERS, spread
from moe_overlap.placement.topology import Topology

PROGRAM = "moe-overlap place"
OUTPUTS = ("place.json", "place.png")
MOST_BYTES = 1 << 26  # of a trace
MOST_RANKS, MOST_EXPERTS = 1024, 4096
# Figures that one table may have: the shares of all ranks in all slots, and the counts of a trace by rank.
MOST_SHARES, MOST_COUNTS = 1 << 25, 1 << 27
LONG = 1 << 23  # such shares: from here on every part of the work is said beforehand
STEPS_OF_FILE = 16  # that the tokens of a saved routing are cut into
LEGEND = """\
step ms: of the slowest rank, with its experts, the rows it sends and receives, and the gradients of copies
x before: step ms of the row "before" (every expert once, in order) over that of this row: 2.00 is a step of half the
time, and below 1 a longer one, where what copies and crossing rows cost is more than what even loads save"""
HELP = {
    "trace": "JSON lines, each the counts of a step: [E] or [ranks][E], or an object with them as tokens_per_expert",
    "routing": "in the place of a trace: a file of moe-overlap train --save-routing (with --experts, --top-k)",
    "experts": "experts of the routing file",
    "top_k": "choices of a token that count in the routing file",
    "ranks": "ranks that share the experts out",
    "ranks_per_node": "ranks of a node; 0: all",
    "slots": "slots of a rank (at most 32 on 1024 ranks, four times as many on half of them, and so on)",
    "budget": "experts' weights that may move; -1: any number",
    "planners": "names, with commas: " + ", ".join(PLANNERS),
    "expert_bytes": "bytes of one expert's weights",
    "row_bytes": "bytes of a row",
    "row_us": "microseconds of an expert's forward on one row",
    "inter_gbyte": "GB/s of a rank's link to other nodes",
    "intra_gbyte": "GB/s of a rank's link inside its node",
    "out": "folder for place.json and place.png (loads of the ranks over time)",
}
EXAMPLES = """examples:
  moe-overlap place --routing r.safetensors  # from moe-overlap train --kind top2 --save-routing r.safetensors
  moe-overlap place --trace counts.jsonl     # a line a step: json.dumps(layer.stats().tokens_per_expert.tolist())"""


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """One question."""

    trace: str = ""
    routing: str = ""
    experts: int = 8
    top_k: int = 2
    ranks: int = 4
    ranks_per_node: int = 0
    slots: int = 3
    budget: int = -1
    planners: str = ",".join(PLANNERS)
    expert_bytes: int = 16 * 2**20
    row_bytes: int = 2048
    row_us: float = 0.17
    inter_gbyte: float = 50.0
    intra_gbyte: float = 450.0
    out: str = "out/place"

    def __post_init__(self) -> None:
        check_count("ranks", self.ranks, most=MOST_RANKS)
        check_count("ranks_per_node", self.ranks_per_node, least=0)
        check_count("slots", self.slots, most=MOST_EXPERTS)
        check_count("experts", self.experts, most=MOST_EXPERTS)
        check_count("budget", self.budget, least=-1)
        for name in ("top_k", "expert_bytes", "row_bytes"):
            check_count(name, getattr(self, name), most=2**40)
        for name in ("row_us", "inter_gbyte", "intra_gbyte"):
            check_number(name, getattr(self, name), 1e-6, 1e9)
        if self.ranks % (self.ranks_per_node or self.ranks):
            raise ConfigError("--ranks-per-node", self.ranks_per_node, f"0 or a divisor of --ranks ({self.ranks})")
        if self.slots * self.ranks**2 > MOST_SHARES:
            expected = f"at most {MOST_SHARES // self.ranks**2} slots on each of {self.ranks} ranks"
            raise ConfigError("--slots", self.slots, f"{expected} (ranks x slots of all ranks: {MOST_SHARES} at most)")
        if not self.names or any(name not in PLANNERS for name in self.names):
            raise ConfigError("--planners", self.planners, f"names of {', '.join(PLANNERS)}, with commas between")
        if bool(self.trace) == bool(self.routing):
            raise ConfigError("--trace", self.trace, "a file, or --routing with one, and not both")
        for name in ("experts", "top_k"):
            if self.trace and getattr(self, name) != getattr(type(self), name):
                expected = "no such option beside --trace, whose lines have their experts and choices"
                raise ConfigError(flag_of(name), getattr(self, name), expected)

    @property
    def names(self) -> list[str]:
        return [name for name in self.planners.split(",") if name]

    @property
    def topology(self) -> Topology:
        return Topology(
            world_size=self.ranks, ranks_per_node=self.ranks_per_node, row_s=1e-6 * self.row_us,
            row_bytes=self.row_bytes, expert_bytes=self.expert_bytes, intra_bytes_per_s=1e9 * self.intra_gbyte,
            inter_bytes_per_s=1e9 * self.inter_gbyte,
        )  # fmt: skip


def parse(argv: Sequence[str]) -> PlaceOptions:
    """Options from the command line; ConfigError for a value out of range."""
    parser = OneLineParser(prog=PROGRAM, description="What planners of placements would make of a trace of loads.",
                           formatter_class=TypedDefaults, epilog=EXAMPLES)  # fmt: skip
    for field in fields(PlaceOptions):
        parser.add_argument(flag_of(field.name), type=type(field.default), default=field.default, help=HELP[field.name])
    return PlaceOptions(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status. ConfigError for bad input."""
    options = parse(argv)
    steps = read_routing(options) if options.routing else read_trace(options)
    if options.slots * options.ranks < steps.shape[2]:
        raise ConfigError("--slots", options.slots, f"{steps.shape[2]} slots on all {options.ranks} ranks at least")
    out = check_folder("--out", options.out, OUTPUTS)
    found = rows(options, steps)
    write_atomically(out / "place.json", (json.dumps([row for row, _ in found], indent=1) + "\n").encode())
    with _part(options, OUTPUTS[1]):
        write_png(out / "place.png", [(row["planner"], placement) for row, placement in found], steps)
    print("\n".join(_table([row for row, _ in found])))
    print(f"\n{LEGEND}")
    print(f"predicted, nothing was run: judged on {len(steps) - len(steps) // 2} of {len(steps)} steps")
    print(f"wrote {', '.join(str(out / name) for name in OUTPUTS)}")
    return 0


def read_trace(options: PlaceOptions) -> np.ndarray:
    """int64 [steps, W, E]. Raises ConfigError("--trace")."""
    try:
        text = read_regular(Path(options.trace), most_bytes=MOST_BYTES).decode()
    except (OSError, ValueError) as error:
        raise ConfigError("--trace", options.trace, f"a text file that can be read ({error})") from None
    steps: list[np.ndarray] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            steps.append(_counts(options, number, line))
        if steps and len(steps) * steps[-1].size > MOST_COUNTS:
            most = MOST_COUNTS // steps[-1].size
            raise ConfigError("--trace", options.trace, f"at most {most} steps for {options.ranks} ranks")
    if not steps or len({one.shape for one in steps}) != 1:
        raise ConfigError("--trace", options.trace, "at least one line, all of as many experts")
    return np.stack(steps)


def _counts(options: PlaceOptions, number: int, line: str) -> np.ndarray:
    """int64 [W, E] of one line."""
    bad = ConfigError("--trace", options.trace, f"counts [E] or [{options.ranks}][E], integers, in line {number}")
    try:
        value = json.loads(line)
        if isinstance(value, dict):
            value = value.get("tokens_per_expert")
        table = np.array(value) if _whole(value) else np.empty(0)
    except (ValueError, RecursionError, OverflowError):
        raise bad from None
    if table.ndim not in (1, 2) or not table.size or table.dtype != np.int64 or table.shape[-1] > MOST_EXPERTS:
        raise bad
    if table.min() < 0 or table.max() > MOST_COUNT or (table.ndim == 2 and len(table) != options.ranks):
        raise bad
    if table.ndim == 2:
        return table
    part = np.arange(options.ranks + 1)[:, None] * table // options.ranks
    return np.diff(part, axis=0)


def _whole(value: object) -> bool:
    """Whether lists have integers alone: NumPy takes the true and false of JSON for 1 and 0 beside them."""
    if not isinstance(value, list):
        return type(value) is int
    return set(map(type, value)) <= {int} or all(map(_whole, value))


def read_routing(options: PlaceOptions) -> np.ndarray:
    """int64 [steps, W, E]: the file's tokens in steps, each cut into as many parts as ranks."""
    ids = read_file(Path(options.routing), experts=options.experts, top_k=options.top_k).ids_NK[:, : options.top_k]
    steps = max(1, min(STEPS_OF_FILE, len(ids) // options.ranks))
    found = np.zeros((steps, options.ranks, options.experts), dtype=np.int64)
    for token, part in enumerate(np.array_split(ids.numpy(), steps * options.ranks)):
        np.add.at(found[token // options.ranks, token % options.ranks], part[part >= 0], 1)
    return found


def rows(options: PlaceOptions, steps: np.ndarray) -> list[tuple[dict[str, Any], Placement]]:
    """What every planner makes of the first half, on the second; the first row is the placement before."""
    half, topology = len(steps) // 2, options.topology
    seen, judged = steps[: max(1, half)].sum(axis=0), steps[half:]
    before = spread(steps.shape[2], [options.slots] * options.ranks)
    budget = None if options.budget < 0 else options.budget
    found = []
    for name in ("before", *options.names):
        with _part(options, name):
            placement = before
            if name != "before":
                placement = PLANNERS[name](seen, topology, slots=options.slots, current=before, budget=budget)
            found.append((_row(name, before, placement, judged, topology), placement))
    return found


@contextmanager
def _part(options: PlaceOptions, name: str) -> Iterator[None]:
    """One part of the work: what takes long is said, before a large one too, as compiled planners let nobody speak."""
    what = f"{PROGRAM}: {name}, {options.slots} slots on each of {options.ranks} ranks"
    if options.slots * options.ranks**2 > LONG:
        print(f"{what}, may take a minute", file=sys.stderr, flush=True)
    with saying(what):
        yield


def _row(name: str, before: Placement, placement: Placement, judged: np.ndarray, topology: Topology) -> dict[str, Any]:
    plan = before.diff(placement)
    return {
        "planner": name,
        "slots": placement.num_slots,
        "balance": float(np.mean([balance_ratio(rank_load(placement, one)) for one in judged])),
        "moves": plan.moves,
        "home_moves": len(plan.home_moves),
        "moved_bytes": int(plan.link_bytes(topology.expert_bytes).sum()),
        "step_ms": 1e3 * float(np.mean([step_s(placement, one, topology) for one in judged])),
        "placement": placement.to_json(),
    }


def _table(found: Sequence[dict[str, Any]]) -> list[str]:
    cells = [("planner", "slots", "max/mean", "moves", "of homes", "MiB moved", "step ms", "x before")]
    for row in found:
        cells.append((
            row["planner"], str(row["slots"]), f"{row['balance']:.3f}", str(row["moves"]), str(row["home_moves"]),
            f"{row['moved_bytes'] / 2**20:.1f}", f"{row['step_ms']:.3f}",
            f"{found[0]['step_ms'] / row['step_ms']:.2f}" if row["step_ms"] else "-",
        ))  # fmt: skip
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def write_png(path: Path, made: Sequence[tuple[str, Placement]], steps: np.ndarray) -> None:
    """The load of every rank over the steps, one panel for each placement. Needs matplotlib (the extra `cli`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loads = [np.array([rank_load(placement, one) for one in steps]).T for _, placement in made]
    mean = max(float(loads[0].mean()), 1e-30)
    most = max(float(load.max()) for load in loads) / mean  # one scale, so that panels compare
    figure = Figure(figsize=(8, 1.0 + 1.3 * len(made)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, _), load in zip(figure.subplots(len(made), squeeze=False)[:, 0], made, loads, strict=True):
        image = axes.imshow(load / mean, aspect="auto", cmap="viridis", vmin=0.0, vmax=most)
        axes.axvline(len(steps) // 2 - 0.5, color="white", linewidth=1)
        axes.set_ylabel(f"{name}\nrank", fontsize=8)
        figure.colorbar(image, ax=axes, label="load / mean")
    figure.supxlabel("step (planned on those left of the line)", fontsize=9)
    write_figure(path, figure)
