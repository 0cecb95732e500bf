"""Speed-up over the share of communication, for every builder, with the limit that hiding has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_overlap.commands.bench.overlap_report import UNCLAIMED, limit, own_share, own_speedup
from moe_overlap.measure.picture import write_figure

Row = Mapping[str, Any]
# By case and schedule: Okabe and Ito's colours, which colour-blind readers can tell apart.
STYLES = {
    ("top2", "chunked"): ("#E69F00", "o"),
    ("top2", "expert_groups"): ("#D55E00", "s"),
    ("top2", "fastermoe"): ("#CC79A7", "<"),
    ("top2", "lancet"): ("#8B4513", ">"),
    ("shared1", "shared_expert"): ("#6A51A3", "^"),
    ("scmoe_pos1", "shortcut"): ("#56B4E9", "v"),
    ("scmoe_pos2", "shortcut"): ("#0072B2", "D"),
    ("scmoe_pos3", "shortcut"): ("#009E73", "p"),
}
OTHER_STYLE = ("#7F7F7F", "x")
LINES = {"emulated": "-", "tcp": "--"}


def write_speedup(path: Path, rows: Sequence[Row]) -> None:
    """A PNG: a panel for each routing (down) and phase (across). A line is a case's builder, at each share with the
    chunks that were fastest; dashes below the limit are the bound of that very cut, from its measured terms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    routings = list(dict.fromkeys(row["routing"] for row in rows))
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    figure = Figure(figsize=(4.3 * len(phases) + 0.4, 3.6 * len(routings) + 1.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(routings), len(phases), squeeze=False, sharey=True)
    for i, routing in enumerate(routings):
        for j, phase in enumerate(phases):
            axes = grid[i][j]
            mine = [row for row in rows if (row["routing"], row["phase"]) == (routing, phase)]
            if not mine:
                axes.set_axis_off()
                continue
            draw(axes, mine)
            axes.set_title(f"{phase}, {routing}", fontsize=10)
            if j == 0:
                axes.set_ylabel("times faster than the same case serial")
            if i == len(routings) - 1:
                axes.set_xlabel("share of communication in the case's serial step")
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    first = rows[0]
    figure.suptitle(
        f"{first['ranks']} ranks, {first['tokens']} tokens each, D {first['hidden']}, F {first['ffn']}, "
        f"{first['experts']} experts, top {first['top_k']}, {first['dtype']}, compute {first['compute']}: measured",
        fontsize=11,
    )  # fmt: skip
    write_figure(path, figure)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """One panel."""
    shares = [i / 200 for i in range(201)]
    axes.plot(shares, [limit(share) for share in shares], color="black", linewidth=1.2, label="limit: all hidden")
    axes.axhline(1.0, color="#BBBBBB", linewidth=0.8)
    for (wire, case, schedule), mine in lines_of(rows).items():
        color, marker = STYLES.get((case, schedule), OTHER_STYLE)
        points = sorted(((own_share(row), own_speedup(row), row) for row in mine), key=lambda one: one[:2])
        label = f"{case} {schedule}" + ("" if wire == "emulated" else f", {wire}")
        xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
        axes.plot(xs, ys, LINES.get(wire, ":"), color=color, linewidth=1.4, label=label)
        for x, y, row in points:
            hollow = row["flagged"] in UNCLAIMED
            axes.plot([x], [y], marker, color=color, markersize=5, markerfacecolor="white" if hollow else color)
            if row["bound_ms"]:
                axes.plot([x], [float(row["serial_ms"]) / float(row["bound_ms"])], "_", color=color, markersize=9)
    if any(row["flagged"] in UNCLAIMED for row in rows):
        axes.plot([], [], "o", color="#7F7F7F", markerfacecolor="white", label="hollow: flagged, proves nothing")
    axes.plot([], [], "_", color="#7F7F7F", markersize=9, label="bound of the row's own cut")
    axes.set_xlim(0, 1)
    axes.set_ylim(0.7, 2.1)
    axes.grid(color="#EEEEEE")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def lines_of(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """By wire, case and builder, the row of each share that was fastest; serial rows are the line at 1."""
    best: dict[tuple[str, str, str], dict[float, Row]] = {}
    for row in rows:
        if row["schedule"] == "serial":
            continue
        mine = best.setdefault((row["wire"], row["case"], row["schedule"]), {})
        other = mine.get(row["asked_share"])
        if other is None or own_speedup(row) > own_speedup(other):
            mine[row["asked_share"]] = row
    return {key: list(mine.values()) for key, mine in best.items()}
