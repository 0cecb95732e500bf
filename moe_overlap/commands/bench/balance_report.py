"""Rows of `bench balance` as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_overlap.measure.picture import write_figure
from moe_overlap.measure.report import Row, cell

KEYS = (
    "workload planner schedule phase chunks backward_chunks predicted_ms outside_ms time_ms_median time_ms_p10 "
    "time_ms_p90 ideal_ms oracle_ms oracle_proven of_oracle ceiling speedup_vs_static static_max_over_mean "
    "max_over_mean moe_share comm_share copies migration_ms weight_bytes payload_bytes comm_cpu_ms max_rel_err "
    "ranks ranks_per_node tokens hidden ffn experts top_k dtype slots seed repeats steps changes moved_bytes "
    "hit_rate search_ms compute flagged hardware link torch commit date"
).split()
COLUMNS = (
    ("workload", "workload", "{}"),
    ("planner", "planner", "{}"),
    ("schedule", "schedule", "{}"),
    ("ms", "time_ms_median", "{:.1f}"),
    ("predicted", "predicted_ms", "{:.1f}"),
    ("ideal", "ideal_ms", "{:.1f}"),
    ("of oracle", "of_oracle", "{:.0%}"),
    ("x static", "speedup_vs_static", "{:.2f}"),
    ("ceiling", "ceiling", "{:.2f}"),
    ("static max/mean", "static_max_over_mean", "{:.2f}"),
    ("max/mean", "max_over_mean", "{:.2f}"),
    ("copies", "copies", "{}"),
    ("hits", "hit_rate", "{:.0%}"),
    ("MoE", "moe_share", "{:.0%}"),
    ("comm CPU", "comm_cpu_ms", "{:.1f}"),
    ("flag", "flagged", "{}"),
)
COLOURS = ("#7F7F7F", "#0072B2", "#009E73", "#D55E00", "#CC79A7")  # Okabe and Ito


def print_rows(rows: Sequence[Row]) -> None:
    """The columns that answer the question; results.jsonl has the rest."""
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    title = (
        f"Training steps of one layer, {first['ranks']} ranks, {first['ranks_per_node']} on a node, "
        f"{first['compute']} compute, {first['link']}: ideal = forced-balanced routing, copies fetched in every step"
    )
    table = Table(title=title, title_justify="left")
    for heading, _, form in COLUMNS:
        table.add_column(heading, justify="left" if form == "{}" and heading != "copies" else "right")
    workload = None
    for row in rows:
        if workload not in (None, row["workload"]):
            table.add_section()
        workload = row["workload"]
        table.add_row(*(cell(row, key, form) for _, key, form in COLUMNS))
    console = Console()
    (console if console.is_terminal else Console(width=162)).print(table)


def write_picture(path: Path, rows: Sequence[Row]) -> None:
    """Bars of step times by workload; one for each (planner, schedule), which the legend beside them names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    kinds = list(dict.fromkeys((row["planner"], row["schedule"]) for row in rows))
    planners = list(dict.fromkeys(planner for planner, _ in kinds))
    figure = Figure(figsize=(4.0 + 1.6 * len(workloads), 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.85 / len(kinds)
    for i, (planner, schedule) in enumerate(kinds):
        mine = {row["workload"]: row for row in rows if (row["planner"], row["schedule"]) == (planner, schedule)}
        places = [place + width * (i - (len(kinds) - 1) / 2) for place, name in enumerate(workloads) if name in mine]
        heights = [mine[name]["time_ms_median"] for name in workloads if name in mine]
        axes.bar(places, heights, width, label=f"{planner}, {schedule}", edgecolor="white",
                 color=COLOURS[planners.index(planner) % len(COLOURS)],
                 hatch="///" if schedule == "serial" else None)  # fmt: skip
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("ms a training step")
    first = rows[0]
    axes.set_title(f"{first['ranks']} ranks, {first['compute']} compute, {first['link']}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    write_figure(path, figure)
