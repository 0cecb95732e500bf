"""The table and the picture of `benchmarks/locmoe.py`: bytes, balance and loss against mu.

    python benchmarks/locmoe_report.py ROWS.jsonl [--png FILE]

Means over the seeds, with the least and the greatest. Loss is over that of the Switch router on the same text, seed by
seed. A second table has the bytes across nodes of each arm and seed by mu, and whether they fall with every mu (once
none is left they may stay so). Both are Markdown, to standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe_overlap.measure.picture import write_figure

FIGURES = {
    "MB across nodes": lambda row: row["inter_node_bytes"] / 1e6,
    "local share": lambda row: row["local_share"],
    "max/mean, training": lambda row: row["train_max_over_mean"],
    "max/mean, at the end": lambda row: row["max_over_mean"],
    "max/mean, held out": lambda row: row["held_out_max_over_mean"],
    "loss": lambda row: row["loss"],
    "loss over Switch's": lambda row: row["over_switch"],
}
DRAWN = ("MB across nodes", "max/mean, training", "max/mean, at the end", "loss over Switch's")
Groups = Mapping[tuple[str, float], Sequence[Mapping[str, Any]]]


def read(path: Path) -> Groups:
    """Rows by (arm, mu), each with its loss over that of the Switch router of its seed and text."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    switch = {(row["seed"], row["text_by"]): row["loss"] for row in rows if row["router"] == "switch"}
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        base = switch.get((row["seed"], row["text_by"]))
        groups[row["arm"], row["mu"]].append(
            row | {"over_switch": float("nan") if base is None else row["loss"] / base}
        )
    return dict(sorted(groups.items()))


def table(groups: Groups) -> str:
    lines = ["| arm | mu | seeds | " + " | ".join(FIGURES) + " |", "|---" * (3 + len(FIGURES)) + "|"]
    for (arm, mu), rows in groups.items():
        cells = []
        for take in FIGURES.values():
            values = [take(row) for row in rows]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(rows) > 1 else ""
            cells.append(f"{sum(values) / len(values):.3f}{spread}")
        lines.append(f"| {arm} | {mu:g} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def falls(values: Sequence[float]) -> bool:
    """Whether each value is below the one before it, or both are 0."""
    return all(after < before or before == after == 0 for before, after in pairwise(values))


def seeds_table(groups: Groups) -> str:
    """One line for each arm and seed that has several mu."""
    bytes_of: dict[tuple[str, int], dict[float, int]] = defaultdict(dict)
    for (arm, mu), rows in groups.items():
        for row in rows:
            bytes_of[arm, row["seed"]][mu] = row["inter_node_bytes"]
    mus = sorted({mu for _, mu in groups})
    lines = ["| arm | seed | " + " | ".join(f"mu {mu:g}" for mu in mus) + " | falls with every mu |"]
    lines.append("|---" * (3 + len(mus)) + "|")
    for (arm, seed), by_mu in sorted(bytes_of.items()):
        if len(by_mu) == 1:
            continue
        cells = [f"{by_mu[mu] / 1e6:.3f}" if mu in by_mu else "-" for mu in mus]
        verdict = "yes" if falls([by_mu[mu] for mu in sorted(by_mu)]) else "no"
        lines.append(f"| {arm} | {seed} | " + " | ".join(cells) + f" | {verdict} |")
    return "\n".join(lines)


def draw(path: Path, groups: Groups) -> None:
    """One panel a figure, one line an arm; the baselines are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6), layout="constrained")
    mus = sorted({mu for _, mu in groups})
    for at, name in enumerate(DRAWN):
        axes = figure.add_subplot(1, len(DRAWN), at + 1)
        for arm in sorted({arm for arm, _ in groups}):
            there = [mu for mu in mus if (arm, mu) in groups]
            values = [[FIGURES[name](row) for row in groups[arm, mu]] for mu in there]
            means = [sum(one) / len(one) for one in values]
            if len(there) == 1:
                axes.axhline(means[0], linestyle="--", linewidth=1, color="0.6")
                axes.annotate(arm, (len(mus) - 1, means[0]), fontsize=7, ha="right", va="bottom", color="0.4")
                continue
            places = [mus.index(mu) for mu in there]
            axes.plot(places, means, marker="o", markersize=3, label=arm)
            axes.fill_between(places, [min(one) for one in values], [max(one) for one in values], alpha=0.15)
        axes.set_xticks(range(len(mus)), [f"{mu:g}" for mu in mus], fontsize=8)
        axes.set_xlabel("mu")
        axes.set_title(name, fontsize=10)
    axes.legend(fontsize=8)
    write_figure(path, figure)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--png", type=Path)
    asked = parser.parse_args(argv)
    groups = read(asked.rows)
    print(table(groups))
    print()
    print(seeds_table(groups))
    if asked.png is not None:
        draw(asked.png, groups)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
