"""docs/validation.md: every published row beside its forecast, and the fit of the six free numbers.

python tests/planning/validation.py --write     the document, from the numbers below
python tests/planning/validation.py --fit       these numbers, from the rows (minutes)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache

from published import PAPERS, tutel
from validation_page import write

from moe_overlap.planning.machines import Reached

# Where a fit may go, where it starts, and by what factors it steps, larger ones first.
LIMITS = {"matmul": (0.3, 0.8), "memory": (0.6, 0.95), "wire": (0.5, 1.0), "spine": (0.3, 1.0),
          "launch_s": (5e-6, 1e-4), "beside": (1.0, 1.6)}  # fmt: skip
START = Reached(matmul=0.5, memory=0.8, wire=0.8, spine=1.0, launch_s=100e-6, beside=1.2)
STEPS = (1.15, 1.05)
FIT_EVERY = 7  # of Tutel's 54 shapes
CLOSE = {"ms": math.log(1.15), "x": math.log(1.10)}


@cache
def loss_of(paper: str, reached: Reached) -> float:
    """Sum over the paper's rows of how far they are off, in units of what is close, to the power 3/2; no row counts as
    more than three times that."""
    one = next(known for known in PAPERS if known.name == paper)
    forecasts = tutel(reached, FIT_EVERY) if one.forecasts is tutel else one.forecasts(reached)
    off = [abs(math.log(forecast / row.measured)) / CLOSE[row.unit]
           for row, forecast in zip(one.rows, forecasts, strict=True) if row.counts]  # fmt: skip
    return sum(min(each, 3.0) ** 1.5 for each in off)


def loss(papers: Sequence[str], reached: Reached) -> float:
    return sum(loss_of(paper, reached) for paper in papers)


def neighbours(reached: Reached, step: float) -> list[Reached]:
    """One number changed by a step up or down, within the limits; of a slowdown, what is above 1."""
    found = []
    for name, (least, most) in LIMITS.items():
        offset = 0.98 if name == "beside" else 0.0
        for factor in (step, 1 / step):
            value = offset + (getattr(reached, name) - offset) * (factor**3 if name == "beside" else factor)
            found.append(replace(reached, **{name: float(f"{min(most, max(least, value)):.3g}")}))
    return [one for one in found if one != reached]


def fit(papers: Sequence[str]) -> Reached:
    """Downhill from START, one number at a time."""
    best = START
    for step in STEPS:
        improved = True
        while improved:
            improved = False
            for name in (field.name for field in fields(Reached)):
                others = [one for one in neighbours(best, step) if getattr(one, name) != getattr(best, name)]
                nearest = min(others, key=lambda one: loss(papers, one))
                if loss(papers, nearest) < loss(papers, best) - 1e-6:
                    best, improved = nearest, True
    return best


def main(argv: Sequence[str]) -> None:
    if argv == ["--write"]:
        write()
    elif argv == ["--fit"]:
        names = [paper.name for paper in PAPERS]
        print("all", fit(names), flush=True)
        counted = [paper.name for paper in PAPERS if any(row.counts for row in paper.rows)]
        for name in counted:
            print("without", name, fit([other for other in names if other != name]), flush=True)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
