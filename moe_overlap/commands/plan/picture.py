"""plan.png: which schedule wins at which bandwidth, from 2 ranks to thousands, and the chosen one as lanes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_overlap.commands.plan.machine import CHUNKS, op_names
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.sweep import CODES, PhasePlan, Prediction, Sweep, number_text, speedups_over, unit_of
from moe_overlap.measure.picture import Panel, draw_legend, draw_panel, write_figure
from moe_overlap.planning.search import timeline
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.recorder import TimelineEvent

# Okabe and Ito's palette, which colour-blind readers can tell apart.
KIND_COLORS = {
    "top2": "#0072B2",
    "shared1": "#6A51A3",
    "scmoe_pos1": "#E69F00",
    "scmoe_pos2": "#D55E00",
    "scmoe_pos3": "#009E73",
    "calibrated": "#0072B2",
}
CHUNK_COLORS = dict(zip(CHUNKS, ("#56B4E9", "#9ECAE1", "#4292C6", "#2171B5", "#08306B"), strict=True))
TALLEST = 3.5  # of compute alone: slower steps leave the upper left plot at its top


def events_of(plan: PhasePlan) -> list[TimelineEvent]:
    """The planned schedule as if it had been recorded, waits of the compute lane included."""
    best = plan.best
    schedule = Schedule.parse(best.order)
    spans = timeline(plan.window, schedule, chunks=best.chunks, by=best.by, joined=best.joined)
    found, last_s = [], 0.0
    for action, (start_s, end_s) in zip(schedule, spans, strict=True):
        if action.lane == "comp":
            if start_s > last_s:
                found.append(TimelineEvent(0, 0, plan.phase, action.text, "wait", last_s, start_s))
            last_s = end_s
        found.append(TimelineEvent(0, 0, plan.phase, action.text, action.lane, start_s, end_s))
    return found


def write_png(path: Path, options: PlanOptions, point: Prediction, found: Sweep) -> None:
    """Above: time and speed-up over the bandwidth. Middle: the winner at every place. Below: the lanes of the point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    phases = len(point.phases)
    figure = Figure(figsize=(14.5, 12.6 + 1.3 * phases), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 + phases, 2, height_ratios=[4.2, 5.6, *[1.25] * phases])
    _times(figure.add_subplot(grid[0, 0]), point, found)
    _kinds(figure.add_subplot(grid[0, 1]), options, point, found)
    _winners(figure, figure.add_subplot(grid[1, :]), options, point, found)
    limit_ms = 1e3 * max(phase.best.predicted_s for phase in point.phases)
    names = op_names(point.kind, point.model)
    used: set[str] = set()
    for row, phase in enumerate(point.phases):
        axes = figure.add_subplot(grid[2 + row, :])
        title = f"{phase.phase} of {point.kind} at the point asked: {phase.name}"
        if phase.outside_s:
            title += f" (and {1e3 * phase.outside_s:.3g} ms outside this window)"
        used |= draw_panel(axes, Panel(title="", events=events_of(phase), names=names), limit_ms)
        axes.set_title(title, fontsize=10, loc="left", pad=15)
        axes.set_yticks([0, 1], ["compute", "wire"], fontsize=9)
    axes.set_xlabel("ms")
    draw_legend(figure, used, columns=5)
    figure.suptitle(_title(options, point), fontsize=12)
    write_figure(path, figure)


def _title(options: PlanOptions, point: Prediction) -> str:
    sizes = f"{options.tokens} tokens per rank, D {options.hidden}, {options.experts} experts, top-{options.top_k}"
    if options.cost_model is None:
        how, sizes = "from numbers alone, nothing measured", f"{sizes}, F {options.ffn}"
    else:
        how = f"from a cost model ({options.cost_model.source})"
    nodes = f"{options.dtype}, {options.ranks_per_node} rank(s) per node"
    return f"Predicted {how}: {options.phase}, one block pair {point.kind}\n{sizes}, {nodes}"


def _scale(found: Sweep) -> tuple[float, str, list[str]]:
    """(bits of that unit per byte, label, ticks) of the bandwidth axis, by the rate in its middle."""
    bits, unit = unit_of(found.bandwidths[len(found.bandwidths) // 2])
    ticks = [number_text(bits * rate) for rate in found.bandwidths]
    return bits, f"bandwidth of one rank to other nodes, {unit}", ticks


def _axis(axes: Any, found: Sweep, point: Prediction) -> list[float]:
    """The bandwidth axis; its values."""
    bits, label, texts = _scale(found)
    xs = [bits * rate for rate in found.bandwidths]
    axes.set_xscale("log")
    axes.set_xticks(xs, texts, fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_xlim(xs[0], xs[-1])
    if point.at.bytes_per_s is not None:
        axes.axvline(bits * point.at.bytes_per_s, color="black", linewidth=0.8, linestyle=":")
    axes.grid(color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return xs


def _times(axes: Any, point: Prediction, found: Sweep) -> None:
    """Step time of each chunk count of the asked block pair, and the best of all."""
    xs = _axis(axes, found, point)
    line = found.lines[point.kind]
    axes.plot(xs, _in_ms([one.time_s for one in line]), color="#F0C419", linewidth=7, alpha=0.55, label="planned")
    axes.plot(xs, _in_ms([one.serial_s for one in line]), color="black", linewidth=1.8, label="serial (overlap off)")
    for chunks, color in CHUNK_COLORS.items():
        label = "overlapped, one chunk" if chunks == 1 else f"overlapped, {chunks} chunks"
        axes.plot(xs, _in_ms([one.of_chunks(chunks) for one in line]), color=color, linewidth=1.3, label=label)
    axes.plot(xs, _in_ms([one.compute_s for one in line]), color="#7F7F7F", linestyle="--", linewidth=1.2,
              label="compute alone")  # fmt: skip
    low, high = min(one.compute_s for one in line), max(one.serial_s for one in line)
    axes.set_ylim(0.93e3 * low, 1e3 * min(1.05 * high, TALLEST * low))
    axes.set_ylabel("ms per step")
    axes.set_title(f"{point.kind} on {point.ranks} ranks", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)


def _kinds(axes: Any, options: PlanOptions, point: Prediction, found: Sweep) -> None:
    """Every block pair against serial top2 (a calibrated one against its own serial schedule)."""
    xs = _axis(axes, found, point)
    base = "top2" if "top2" in found.lines else point.kind
    reference = found.lines[base]
    for kind in (name for name in KIND_COLORS if name in found.lines):
        color = KIND_COLORS[kind]
        axes.plot(xs, speedups_over(found, reference, kind), color=color, linewidth=2, marker="o", markersize=3.5,
                  label=kind)  # fmt: skip
        if kind != base:
            serial = [one.serial_s / other.serial_s for one, other in zip(reference, found.lines[kind], strict=True)]
            axes.plot(xs, serial, color=color, linewidth=1, linestyle=":")
    axes.set_ylabel(f"times faster than serial {base}")
    axes.set_ylim(bottom=0.95)
    dotted = "; dotted: the same block pair, serial" if len(found.lines) > 1 else ""
    axes.set_title(f"planned schedules on {options.ranks} ranks{dotted}", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)


def _winners(figure: Any, axes: Any, options: PlanOptions, point: Prediction, found: Sweep) -> None:
    """The map: speed-up over serial as colour, the winning schedule as text."""
    values = [[one.speedup for one in row] for row in found.grid]
    top = max(1.05, max(map(max, values)))
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="YlGnBu", vmin=1.0, vmax=top)
    for y, row in enumerate(found.grid):
        for x, one in enumerate(row):
            dark = (one.speedup - 1) / (top - 1) > 0.55
            axes.text(x, y, f"{one.speedup:.2f}x\n{one.code}", ha="center", va="center", fontsize=7.5, linespacing=1.15,
                      color="white" if dark else "black")  # fmt: skip
    _, label, texts = _scale(found)
    axes.set_xticks(range(len(texts)), texts, fontsize=8)
    axes.set_yticks(range(len(found.ranks)), [str(ranks) for ranks in found.ranks], fontsize=8)
    axes.set_xlabel(label)
    axes.set_ylabel("ranks")
    _regions(axes, options, found)
    if point.at.bytes_per_s in found.bandwidths:
        x, y = found.bandwidths.index(point.at.bytes_per_s), found.ranks.index(point.ranks)
        axes.add_patch(_box(x, y))
    axes.spines[:].set_visible(False)
    phases = "forward, backward" if options.phase == "train" else "forward"
    axes.set_title(f"{point.kind}: times faster than serial, and the schedule that wins ({phases})\n{CODES}",
                   fontsize=10, loc="left")  # fmt: skip
    figure.colorbar(image, ax=axes, pad=0.03, fraction=0.02, label="times faster than serial")


def _regions(axes: Any, options: PlanOptions, found: Sweep) -> None:
    """Says where no node is left, and where whole groups of ranks exchange among themselves."""
    first = [row[0] for row in found.grid]
    one_node = sum("inter" not in one.at.peers for one in first)
    groups = [y for y, one in enumerate(first) if one.ranks > one.at.group]
    right = len(found.bandwidths) - 0.42
    style = {"rotation": 90, "fontsize": 8, "va": "center", "ha": "left", "clip_on": False}
    if one_node and one_node < len(first):
        axes.axhline(one_node - 0.5, color="black", linewidth=1, linestyle="--")
        axes.text(right, one_node / 2 - 0.5, "one node", **style)
    if groups and groups[0]:
        axes.axhline(groups[0] - 0.5, color="black", linewidth=1, linestyle="--")
        axes.text(right, (groups[0] + len(first)) / 2 - 0.5, f"groups of {first[groups[0]].at.group}", **style)


def _box(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, edgecolor="#D55E00", linewidth=2.2)


def _in_ms(seconds: Sequence[float]) -> list[float]:
    return [1e3 * one for one in seconds]
