"""Rows of `bench ops` as a table, as a picture, and in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_overlap.measure.picture import write_figure
from moe_overlap.measure.report import Row, cell

COLUMNS = (
    ("op", "op", "{}"),
    ("phase", "phase", "{}"),
    ("sizes", "shape", "{}"),
    ("runs as", "impl", "{}"),
    ("fused ms", "fused_ms", "{:.3f}"),
    ("plain ms", "plain_ms", "{:.3f}"),
    ("compiled ms", "compiled_ms", "{:.3f}"),
    ("x plain", "speedup_vs_plain", "{:.2f}"),
    ("x compiled", "speedup_vs_compiled", "{:.2f}"),
)
WAYS = (("speedup_vs_plain", "plain PyTorch", "#0072B2"), ("speedup_vs_compiled", "torch.compile", "#E69F00"))


def print_rows(rows: Sequence[Row]) -> None:
    """The columns that answer the question; results.jsonl has the rest."""
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    title = (f"Fused ops on {first['device']}, {first['threads']} thread(s), medians of {first['repeats']}; "
             "x: how many times faster than the other way")  # fmt: skip
    table = Table(title=title, title_justify="left")
    for heading, _, form in COLUMNS:
        table.add_column(heading, justify="left" if form == "{}" else "right")
    for row in rows:
        table.add_row(*(cell(row, key, form) for _, key, form in COLUMNS))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


def verdict(rows: Sequence[Row]) -> str:
    """What the table says, in one sentence."""
    slower = [f"{row['op']} ({row['phase']}, {row['speedup_vs_plain']:.2f}x)" for row in rows
              if row["speedup_vs_plain"] < 1]  # fmt: skip
    faster = len(rows) - len(slower)
    text = f"{faster} of {len(rows)} rows are at least as fast as plain PyTorch"
    return f"{text}; slower: {', '.join(slower)}." if slower else f"{text}."


def write_picture(path: Path, rows: Sequence[Row]) -> None:
    """Bars of how many times faster each fused op is, by the other way, on a logarithmic scale, with the figures beside
    them; the line is equal speed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.2 + 0.5 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (key, label, colour) in enumerate(WAYS):
        places = [place + 0.4 * (number - 0.5) for place, row in enumerate(rows) if row[key] is not None]
        if places:
            times = [row[key] for row in rows if row[key] is not None]
            bars = axes.barh(places, [time - 1 for time in times], 0.38, left=1, color=colour,
                             label=f"against {label}")  # fmt: skip
            axes.bar_label(bars, [f"{time:.2f}" for time in times], padding=2, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['op']}, {row['phase']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.set_xlabel("times faster")
    axes.set_title(f"Fused ops on {rows[0]['device']}, {rows[0]['threads']} thread(s)", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    write_figure(path, figure)
