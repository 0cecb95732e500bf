"""Rows as JSON lines, and as a table for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from moe_overlap.measure.files import write_atomically

Row = Mapping[str, Any]

# (heading, key, format); a missing value prints as a dash.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("phase", "phase", "{}"),
    ("case", "case", "{}"),
    ("schedule", "schedule", "{}"),
    ("r", "chunks", "{}"),
    ("slot", "slot", "{}"),
    ("ms", "time_ms_median", "{:.1f}"),
    ("bound", "bound_ms", "{:.1f}"),
    ("exposed", "exposed_ms", "{:.1f}"),
    ("overlap", "overlap_eff", "{:.0%}"),
    ("x serial", "speedup_vs_serial", "{:.2f}"),
    ("x top2", "speedup_vs_top2", "{:.2f}"),
    ("comm CPU", "comm_cpu_ms", "{:.1f}"),
    ("rows MiB", "rows_peak_mb", "{:.1f}"),
    ("bits", "bit_equal", "{}"),
    ("max err", "max_rel_err", "{:.1e}"),
    ("flag", "flagged", "{}"),
)


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object per line. The file appears whole or not at all. ValueError for NaN or infinity."""
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())


def append_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """The same at the end of a file that may be there. ValueError for NaN or infinity, before anything is written."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def print_table(rows: Sequence[Row], *, title: str, file: TextIO | None = None) -> None:
    """The columns that answer the question; results.jsonl has the rest."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="left" if heading in ("phase", "case", "schedule", "flag") else "right")
    phase = None
    for row in rows:
        if phase not in (None, row["phase"]):
            table.add_section()
        phase = row["phase"]
        table.add_row(*(cell(row, key, form) for _, key, form in COLUMNS))
    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=162)
    console.print(table)


LEGEND = (
    "r chunks of an exchange; slot: ops issued before the experts; ms: median; bound: no schedule of this cut is "
    "faster; "
    "exposed: ms of communication with no compute beside it; overlap: share of the communication time that was hidden; "
    "x serial, x top2: times faster than the same model serial, and than serial top2; comm CPU: ms of CPU time that "
    "exchanges took; rows MiB: row buffers at most; bits: equal to overlap off; max err: against float64."
)
# What a flag means, and what to do about it.
FLAGS = {
    "oversubscribed": "more ranks x threads than cores: use fewer, or --compute slept; no speed is claimed",
    "inflated": "serial is not compute plus exchanges within 5 %: something else ran, or bytes take CPU time; stop "
    "other programs or use larger --ffn, and run again; no speed is claimed",
    "noisy": "times differ by 1.3x between repeats: stop other programs, use more --repeats",
    "drifted": "the machine changed speed since it was calibrated: times are sound, predictions are not",
}


def verdict(rows: Sequence[Row]) -> list[str]:
    """A sentence for each phase, the fastest row that is to be trusted, and a line for each flag that was given."""
    said = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        mine = [row for row in rows if row["phase"] == phase]
        sound = [row for row in mine if row["flagged"] in (None, "drifted") and row["speedup_vs_serial"] is not None]
        if not sound:
            said.append(f"{phase}: no verdict, as every row is flagged")
            continue
        gain = max(sound, key=lambda row: row["speedup_vs_serial"])
        least = min(sound, key=lambda row: row["time_ms_median"])
        link = "" if gain["link"] == "none" else f", link {gain['link']}"
        said.append(
            f"{phase}: overlap gains most in {gain['case']} {gain['schedule']}, {gain['speedup_vs_serial']:.2f}x its "
            f"own serial; the fastest of all is {least['case']} {least['schedule']}, {least['time_ms_median']:.1f} ms"
            f"{link}"
        )
    flags = dict.fromkeys(row["flagged"] for row in rows if row["flagged"] is not None)
    return said + [f"{flag}: {FLAGS[flag]}" for flag in flags]


def cell(row: Row, key: str, form: str) -> str:
    """The text of one cell; ScMoE's two slots, where backward has its own, as 1/2."""
    value = row[key]
    if key == "slot" and value is not None and row.get("backward_slot") not in (None, value):
        return f"{value}/{row['backward_slot']}"
    if isinstance(value, bool):
        return "equal" if value else "DIFFER"
    return "-" if value is None else form.format(value)
