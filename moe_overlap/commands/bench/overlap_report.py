"""What a sweep of `bench overlap` says: the best of every point, where ranks stood still, whether two wires agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_overlap.commands.bench.phase import PhaseResult
from moe_overlap.measure.overlap import headroom, median
from moe_overlap.measure.slow import KINDS, split_waits

Row = Mapping[str, Any]
AGREE = 0.10
SAME = ("routing", "phase", "asked_share", "case", "schedule", "chunks", "backward_chunks")
UNCLAIMED = ("inflated", "oversubscribed")  # flags of rows whose speed-up would prove nothing


def name_of(row: Row) -> str:
    """A row without its phase, e.g. "top2 chunked(4)"."""
    cut = f"({row['chunks']})" if row["case"] == "top2" and row["schedule"] != "serial" else ""
    return f"{row['case']} {row['schedule']}{cut}"


def own_share(row: Row) -> float:
    """Share of communication in the serial step of the row's own case; at least 0, where noise says less."""
    return max(0.0, 1.0 - float(row["nocomm_ms"]) / float(row["serial_ms"]))


def own_speedup(row: Row) -> float:
    """Serial over this row, of the same case, whatever its flag."""
    return float(row["serial_ms"]) / float(row["time_ms_median"])


def limit(share: float) -> float:
    """The largest speed-up of a step whose communication is this share, by hiding alone: 1 / max(share, 1 - share)."""
    found = headroom(share, 1.0 - share)
    assert found is not None
    return found


def summary(rows: Sequence[Row]) -> list[str]:
    """A line for each wire, routing, phase and share: the builder that gained most among rows without a grave flag."""
    points: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        points.setdefault(tuple(row[key] for key in ("wire", "routing", "phase", "asked_share")), []).append(row)
    said = []
    for (wire, routing, phase, share), mine in points.items():
        sound = [row for row in mine if row["schedule"] != "serial" and row["flagged"] not in UNCLAIMED]
        head = f"{wire:8} {routing:12} {phase:8} {share:4.0%} {mine[0]['link'].partition(' ')[2]:>20}:"
        if not sound:
            said.append(f"{head} every row is flagged")
            continue
        best = max(sound, key=own_speedup)
        said.append(
            f"{head} {name_of(best)} {own_speedup(best):.2f}x of at most {limit(own_share(best)):.2f}x at its share of "
            f"{own_share(best):.0%}"
        )
    return said


def pairs_of(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(emulated, tcp) rows of one point and strategy at one rate."""
    emulated = {_identity(row): row for row in rows if row["wire"] == "emulated"}
    return [(emulated[_identity(row)], row) for row in rows if row["wire"] == "tcp" and _identity(row) in emulated]


def agreement(rows: Sequence[Row]) -> list[str]:
    """Of how many rows the times, and the speed-ups, over TCP are within AGREE of those over the emulated link."""
    pairs = pairs_of(rows)
    if not pairs:
        return []
    said = []
    figures = (("times", lambda row: float(row["time_ms_median"])), ("speed-ups over serial", own_speedup))
    for name, figure in figures:
        ratios = [figure(tcp) / figure(emulated) for emulated, tcp in pairs]
        near = sum(abs(ratio - 1.0) <= AGREE for ratio in ratios)
        said.append(
            f"tcp against emulated at the same rate, {name}: {near} of {len(ratios)} within {AGREE:.0%}; ratios "
            f"{min(ratios):.3f} to {max(ratios):.3f}, median {median(ratios):.3f}"
        )
    return said


def _identity(row: Row) -> tuple[Any, ...]:
    return *(row[key] for key in SAME), str(row["link"]).partition(" ")[2]


def wait_rows(result: PhaseResult, where: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every wait of the steps in a phase's pictures, parted; and for each such row of the benchmark, why the slowest of
    the recorded steps was slow ("why", where the others are what is usual)."""
    found: list[dict[str, Any]] = []
    for panel in result.panels:
        for wait in split_waits(panel.events):
            found.append({
                **where, "row": panel.title, "rank": wait.rank, "half": wait.phase, "action": wait.action,
                "start_ms": _ms(wait.start_s - panel.start_s), "stood_ms": _ms(wait.end_s - wait.start_s),
                **{f"{kind}_ms": _ms(wait.seconds(kind)) for kind in KINDS},
                "parts": [[part.kind, part.rank, part.action, _ms(part.seconds)] for part in wait.parts],
            })  # fmt: skip
    return found + [{**where, "row": name, "why": str(slow)} for name, slow in result.slowest.items()]


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)
