"""docs/validation.md as text, from the rows of `published.py` and the numbers of `fitted.py` and `machines.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from fitted import WITHOUT
from published import PAPERS, Row

from moe_overlap.planning.machines import MACHINES, REACHED, Reached

PAGE = Path(__file__).parents[2] / "docs" / "validation.md"
# Within which ratios a row counts as hit: fitted to all papers, and with its own left out.
GOALS = {"all": {"ms": (0.85, 1.15), "x": (0.90, 1.10)}, "without": {"ms": (0.80, 1.25), "x": (0.85, 1.15)}}
GOAL_SHARES = {"all": 0.90, "without": 0.80}
MEANING = {
    "matmul": "share of the peak of matmuls",
    "memory": "share of the peak of memory",
    "wire": "share of the nominal rates of NVLink, PCIe and NICs",
    "spine": "share of that left to bytes for nodes beyond the first switch",
    "launch_s": "seconds that the experts of a chunk, P and U cost beside their rows",
    "beside": "by what factor compute and exchanges are slower beside each other",
}

HEAD = """# Forecasts beside published measurements

Written by `python tests/planning/validation.py --write`; `tests/planning/test_validation.py` computes it anew. Nothing
here was measured by us: each row is a figure of a paper, what `moe-overlap plan` forecasts for the same question, and
their ratio (forecast / published). Shapes are the papers'; what they leave open is under "assumed".

"all" uses the numbers of the presets (`planning/machines.py`), fitted to all of these rows together. "without" uses
numbers fitted to the other papers alone, so that the row was held out. A speed-up ("x") counts as hit within 0.90 to
1.10 (held out: 0.85 to 1.15), a time ("ms") within 0.85 to 1.15 (held out: 0.80 to 1.25).
"""


@dataclass(frozen=True)
class Found:
    """A row with its two forecasts; `without` is None for a paper of which no row is fitted to."""

    paper: str
    row: Row
    all: float
    without: float | None

    def ratio(self, which: str) -> float | None:
        forecast = self.all if which == "all" else self.without
        return None if forecast is None else forecast / self.row.measured

    def hit(self, which: str) -> bool:
        ratio = self.ratio(which)
        least, most = GOALS[which][self.row.unit]
        return ratio is not None and least <= ratio <= most


@lru_cache(maxsize=1)
def found_rows() -> tuple[Found, ...]:
    found = []
    for paper in PAPERS:
        every = paper.forecasts(REACHED)
        held = paper.forecasts(WITHOUT[paper.name]) if paper.name in WITHOUT else [None] * len(every)
        found += [Found(paper.name, *each) for each in zip(paper.rows, every, held, strict=True)]
    return tuple(found)


def share(which: str) -> tuple[int, int]:
    """(hit, counted) of the rows of schedules that the planner has."""
    counted = [one for one in found_rows() if one.row.counts]
    return sum(one.hit(which) for one in counted), len(counted)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rest)]
    return "\n".join(lines) + "\n"


def _number(value: float, row: Row) -> str:
    return f"{value:.3g} ms" if row.unit == "ms" else f"{value:.2f}x"


def _of_paper(name: str, source: str) -> str:
    rows = [["case", "published", "all", "ratio", "without", "ratio", "assumed"]]
    for one in found_rows():
        if one.paper != name:
            continue
        held, ratio = one.without, one.ratio("without")
        rows.append([
            one.row.case + ("" if one.row.counts else " (another schedule: does not count)"),
            _number(one.row.measured, one.row), _number(one.all, one.row), f"{one.ratio('all'):.2f}",
            "-" if held is None else _number(held, one.row), "-" if ratio is None else f"{ratio:.2f}", one.row.assumed,
        ])  # fmt: skip
    return f"## {name}\n\n{source}.\n\n" + _table(rows)


def misses() -> list[Found]:
    """Rows out of a goal, those of other schedules too."""
    return [one for one in found_rows() if not one.hit("all") or (one.without is not None and not one.hit("without"))]


def page() -> str:
    parts = [HEAD]
    lines = []
    for which, said in (("all", "fitted to all papers"), ("without", "held out")):
        hit, counted = share(which)
        lines.append(f"- {said}: {hit} of {counted} rows within the goal ({100 * hit / counted:.0f} %; wanted "
                     f"{100 * GOAL_SHARES[which]:.0f} %)")  # fmt: skip
    parts.append("## How well\n\n" + "\n".join(lines) + "\n")
    parts += [_of_paper(paper.name, paper.source) for paper in PAPERS]
    rows = [["paper", "case", "why it misses"]]
    rows += [[one.paper, one.row.case, one.row.cause] for one in misses()]
    parts.append("## Why rows miss\n\n" + _table(rows))
    names = [field.name for field in fields(Reached)]
    rows = [["number", "what it is", "all", *(f"without {name}" for name in WITHOUT)]]
    rows += [[name, MEANING[name], *(f"{getattr(one, name):.3g}" for one in (REACHED, *WITHOUT.values()))]
             for name in names]  # fmt: skip
    parts.append("## The free numbers\n\nSix, the same for every GPU; `cpu` is as measured and has none. A paper that"
                 " is left out may be the only one that says something of a number: without Tutel nothing speaks of the"
                 " second switch.\n\n" + _table(rows))  # fmt: skip
    rows = [["machine", "figures from"], *([name, machine.source] for name, machine in MACHINES.items())]
    parts.append("## Machines\n\n" + _table(rows))
    return "\n".join(parts)


def write() -> None:
    PAGE.write_text(page())
