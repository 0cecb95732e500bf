"""Who sends how much to whom, as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_overlap.measure.picture import write_figure

MOST_LABELLED = 16  # ranks whose cells have their numbers in them


def write_heat_map(path: Path, bytes_WW: np.ndarray, *, ranks_per_node: int, title: str) -> None:
    """A PNG of bytes from rank (row) to rank (column), int64 [W, W]; lines between nodes (0: nodes are not known).
    Needs matplotlib (the extra `cli`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranks = bytes_WW.shape[0]
    mib_WW = bytes_WW / 2**20
    side = 2.6 + min(8.0, 0.55 * ranks)
    figure = Figure(figsize=(side + 1.2, side), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(mib_WW, cmap="viridis", vmin=0.0)
    figure.colorbar(image, ax=axes, label="MiB, dispatch and combine", shrink=0.8)
    axes.set_xlabel("to rank")
    axes.set_ylabel("from rank")
    axes.set_title(title, fontsize=10)
    step = -(-ranks // MOST_LABELLED)
    axes.set_xticks(range(0, ranks, step))
    axes.set_yticks(range(0, ranks, step))
    if ranks <= MOST_LABELLED:
        most = max(float(mib_WW.max()), 1e-30)
        for source in range(ranks):
            for target in range(ranks):
                if source != target:
                    dark = mib_WW[source, target] < 0.6 * most
                    axes.text(target, source, f"{mib_WW[source, target]:.3g}", ha="center", va="center", fontsize=7,
                              color="white" if dark else "black")  # fmt: skip
    if 1 < ranks_per_node < ranks:
        for line in range(ranks_per_node, ranks, ranks_per_node):
            axes.axhline(line - 0.5, color="white", linewidth=1.5)
            axes.axvline(line - 0.5, color="white", linewidth=1.5)
    write_figure(path, figure)
