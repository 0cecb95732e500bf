"""Measured timelines to look at: a PNG with lanes per rank, and a Chrome trace (chrome://tracing, Perfetto)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_overlap.measure.files import write_atomically
from moe_overlap.schedule.recorder import TimelineEvent

LANES = ("comp", "wire")
TRACED = (*LANES, "wait", "copy")

# Kind of an action -> (colour, legend). Compute in blues and greens, communication in warm colours (Okabe and Ito's
# palette, which colour-blind readers can tell apart).
KINDS: dict[str, tuple[str, str]] = {
    "attention": ("#56B4E9", "attention"),
    "mlp": ("#0072B2", "dense MLP"),
    "shared": ("#6A51A3", "shared expert"),
    "experts": ("#009E73", "experts E, input gradient E'"),
    "wgrad": ("#66C2A5", "weight gradient W of the experts"),
    "rows": ("#7F7F7F", "permute, unpermute"),
    "dispatch": ("#E69F00", "dispatch D, its gradient D'"),
    "combine": ("#D55E00", "combine C, its gradient C'"),
    "agree": ("#F0E442", "agreement on counts"),
    "weights": ("#CC79A7", "weights that travel, and their gradients"),
    "op": ("#9ECAE1", "backbone op"),
}
_KIND_OF_VERB = {
    **dict.fromkeys(("P", "U", "Pt", "Ut"), "rows"),
    **dict.fromkeys(("E", "Ed", "O", "Od", "Or"), "experts"),
    **dict.fromkeys(("D", "Dt", "M", "Mt"), "dispatch"),
    **dict.fromkeys(("Wf", "Wg", "Hf", "Hb", "Hg"), "weights"),
    **dict.fromkeys(("C", "Ct"), "combine"),
    **dict.fromkeys(("S", "St"), "shared"),
    **dict.fromkeys(("Ew", "Eg", "Wd", "Wa"), "wgrad"),
    "N": "agree",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One measured step of all ranks. `names` gives backbone ops (B0, B1, ...) their names."""

    title: str
    events: Sequence[TimelineEvent]
    names: Mapping[str, str] = field(default_factory=dict)
    column: str = ""

    @property
    def start_s(self) -> float:
        return min((event.start_s for event in self.events), default=0.0)

    @property
    def end_s(self) -> float:
        return max((event.end_s for event in self.events), default=0.0)


def label_of(action: str, names: Mapping[str, str], phase: str = "forward") -> str:
    """What to write on an action: D0 stays D0, Bt1 of an op named attn2 becomes attn2'. A prime marks backward; an
    action that is no verb (an op outside the schedule) gets it from its phase."""
    match = re.fullmatch(r"([A-Z][a-z]?)(\d*)", action)
    if match is None:
        return action + ("'" if phase == "backward" else "")
    verb, index = match.groups()
    prime = "'" if len(verb) == 2 and verb[1] == "t" else ""
    if verb in ("B", "Bt"):
        return names.get(f"B{index}", f"B{index}") + prime
    if verb in ("Ed", "Ew", "Eg"):
        return f"{'E' if verb == 'Ed' else 'W'}{index}" + ("'" if verb == "Ed" else "")
    return f"{verb if verb[0] == 'W' else verb[0]}{index}{prime}"


def kind_of(action: str, names: Mapping[str, str]) -> str:
    """The kind, a key of KINDS, that an action's colour stands for."""
    match = re.fullmatch(r"([A-Z][a-z]?)(\d*)", action)
    name = action
    if match is not None:
        verb, index = match.groups()
        if verb in _KIND_OF_VERB:
            return _KIND_OF_VERB[verb]
        name = names.get(f"B{index}", "")
    for start, kind in (("attn", "attention"), ("mlp", "mlp"), ("shared", "shared")):
        if name.startswith(start):
            return kind
    return "op"


def write_png(path: Path, panels: Sequence[Panel], *, title: str) -> None:
    """Panels one below the other, those of one `column` under each other with a common time axis in ms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns: dict[str, list[Panel]] = {}
    for panel in panels:
        columns.setdefault(panel.column, []).append(panel)
    rows = max(len(stack) for stack in columns.values())
    ranks = len({event.rank for panel in panels for event in panel.events})
    height = rows * (0.55 + 0.34 * len(LANES) * ranks) + 1.2
    figure = Figure(figsize=(9.0 * len(columns) + 0.6, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    used: set[str] = set()
    for c, (column, stack) in enumerate(columns.items()):
        limit_ms = 1e3 * max(panel.end_s - panel.start_s for panel in stack)
        for r in range(rows):
            axes = grid[r][c]
            if r >= len(stack):
                axes.set_axis_off()
                continue
            used |= draw_panel(axes, stack[r], limit_ms)
            if r == len(stack) - 1:
                axes.set_xlabel(f"{column + ': ' if column else ''}ms since the common barrier")
    figure.suptitle(title, fontsize=11)
    draw_legend(figure, used, columns=4 if len(columns) == 1 else 9)
    write_figure(path, figure)


def draw_legend(figure: Any, used: set[str], *, columns: int) -> None:
    """What the colours of the kinds in `used` mean, below the figure."""
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=text) for kind, (color, text) in KINDS.items() if kind in used]
    handles.append(Patch(facecolor="white", edgecolor="#BBBBBB", hatch="////", label="compute lane waits"))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def draw_panel(axes: Any, panel: Panel, limit_ms: float) -> set[str]:
    """One panel on matplotlib axes of `limit_ms`, without copies; returns the kinds that appear in it."""
    ranks = sorted({event.rank for event in panel.events})
    lanes = [(rank, lane) for rank in ranks for lane in LANES]
    used: set[str] = set()
    for event in _queued([event for event in panel.events if event.lane != "copy"]):
        lane = "comp" if event.lane == "wait" else event.lane
        y = lanes.index((event.rank, lane))
        left, width = 1e3 * (event.start_s - panel.start_s), 1e3 * (event.end_s - event.start_s)
        if event.lane == "wait":
            axes.broken_barh([(left, width)], (y - 0.4, 0.8), facecolor="white", edgecolor="#BBBBBB", hatch="////",
                             linewidth=0, zorder=1)  # fmt: skip
            continue
        kind, label = kind_of(event.action, panel.names), label_of(event.action, panel.names, event.phase)
        used.add(kind)
        axes.broken_barh([(left, width)], (y - 0.4, 0.8), facecolor=KINDS[kind][0], edgecolor="white",
                         linewidth=0.6, zorder=2)  # fmt: skip
        if width > limit_ms * 0.011 * max(2, len(label)):
            dark = kind in ("mlp", "shared", "experts", "rows", "combine")
            axes.text(left + width / 2, y, label, ha="center", va="center", fontsize=8, zorder=3,
                      color="white" if dark else "black", clip_on=True)  # fmt: skip
    total_ms = 1e3 * (panel.end_s - panel.start_s)
    axes.axvline(total_ms, color="black", linewidth=1, linestyle=":")
    total = f"{total_ms:.0f} ms" if total_ms >= 100 else f"{total_ms:.3g} ms"
    axes.set_title(total, fontsize=9, fontweight="bold", loc="right")
    axes.set_yticks(range(len(lanes)), [f"rank {rank} {'compute' if lane == 'comp' else 'wire'}"
                                        for rank, lane in lanes], fontsize=8)  # fmt: skip
    axes.set_ylim(len(lanes) - 0.5, -0.55)
    axes.set_xlim(0, 1.01 * limit_ms or 1.0)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.grid(axis="x", color="#E5E5E5", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for y in range(len(LANES), len(lanes), len(LANES)):
        axes.axhline(y - 0.5, color="#CCCCCC", linewidth=0.8)
    return used


def _queued(events: Sequence[TimelineEvent]) -> list[TimelineEvent]:
    """The same events, an exchange beginning where the one before it on its wire ends: a link sends one at a time, and
    those behind it wait in line though they count as under way."""
    free_s: dict[int, float] = {}
    found = []
    for event in sorted(events, key=lambda event: (event.end_s, event.start_s)):
        if event.lane == "wire":
            start_s = min(max(event.start_s, free_s.get(event.rank, event.start_s)), event.end_s)
            free_s[event.rank] = event.end_s
            event = replace(event, start_s=start_s)
        found.append(event)
    return found


def chrome_trace(panels: Sequence[Panel]) -> dict[str, Any]:
    """Trace events, one process per panel and rank, one thread per lane; times in microseconds from the barrier."""
    found: list[dict[str, Any]] = []
    pid = 0
    for panel in panels:
        for rank in sorted({event.rank for event in panel.events}):
            pid += 1
            name = " ".join(part for part in (panel.column, panel.title, f"rank {rank}") if part)
            found.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
            for tid, lane in enumerate(TRACED):
                found.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}})
            for event in panel.events:
                if event.rank != rank:
                    continue
                found.append(
                    {
                        "ph": "X",
                        "name": label_of(event.action, panel.names, event.phase),
                        "cat": f"{event.phase},{kind_of(event.action, panel.names)}",
                        "pid": pid,
                        "tid": TRACED.index(event.lane),
                        "ts": round(1e6 * (event.start_s - panel.start_s), 3),
                        "dur": round(1e6 * (event.end_s - event.start_s), 3),
                        "args": {"action": event.action, "step": event.step},
                    }
                )
    return {"traceEvents": found, "displayTimeUnit": "ms"}


def write_figure(path: Path, figure: Any) -> None:
    """A figure of matplotlib as PNG, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_atomically(path, data.getvalue())


def write_trace(path: Path, panels: Sequence[Panel]) -> None:
    write_atomically(path, (json.dumps(chrome_trace(panels)) + "\n").encode())
