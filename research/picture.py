"""Accuracy against FLOPs of every variant of a study.

python research/picture.py OUT FILE.png

OUT is the study's folder. Means over its seeds of logistic regression: a line for what one training gives
along its dial, and for dense networks of several widths; a point for what has no dial, or was trained for
one budget.
"""

import statistics
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import OWN, results

from solo_gating.files import write_picture
from solo_gating.plots.style import DENSE, GATED, NEUTRAL

Point = tuple[float, float]  # FLOPs in % of the network `dense`, accuracy in %

# Okabe and Ito's other colours; a student's or a published kind's point has its own marker, too.
_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "D^vP*X<>dph8so+x"
_DENSE = "dense networks, one training each"


def means(runs: list[dict[str, Any]], full: float) -> dict[str, Point]:
    """For each column of a variant's results the mean over its seeds.

    Args:
        runs: what each seed has given.
        full: FLOPs that are 100 %.
    """
    columns = {
        column: [run[column] for run in runs if column in run] for run in runs for column in run
    }
    return {
        column: (
            100 * statistics.mean(row["flops"] for row in rows) / full,
            statistics.mean(row["linear"] for row in rows),
        )
        for column, rows in columns.items()
    }


def draw(axis: Axes, variants: dict[str, dict[str, Point]]) -> None:
    """Draw the variants of a study into axes.

    Args:
        axis: empty.
        variants: for each the means of its columns.
    """
    networks = {name for name in variants if name.startswith("dense")}
    line = sorted(variants[name]["dense"] for name in networks)
    axis.plot(*zip(*line, strict=True), "-s", color=DENSE, label=_DENSE)
    colours, markers = cycle(_COLOURS), cycle(_MARKERS)
    for name in sorted(variants.keys() - networks):
        columns = variants[name]
        line = sorted(point for column, point in columns.items() if column not in ("dense", OWN))
        if line and OWN not in columns:
            colour = GATED if name == "distilled" else next(colours)
            line.append(columns["dense"])
            axis.plot(*zip(*line, strict=True), "-o", ms=4, color=colour, label=name)
        else:
            colour = NEUTRAL if OWN in columns else DENSE
            point = columns.get(OWN, columns["dense"])
            axis.plot(*point, next(markers), color=colour, mfc="none", ms=8, label=name)


def picture(out: Path, file: Path) -> None:
    """Draw a study's results.

    Args:
        out: the study's folder, with a variant `dense`.
        file: of the PNG.
    """
    variants = results(out) if out.is_dir() else {}
    if "dense" not in variants:
        sys.exit(
            f"error: OUT: got {out}, expected a study's folder with an evaluated run of `dense`"
        )
    full = variants["dense"][0]["dense"]["flops"]
    figure = Figure(figsize=(8.8, 5.2), layout="constrained")
    axis = figure.subplots()
    draw(axis, {name: means(runs, full) for name, runs in variants.items()})
    axis.set(
        xlabel="FLOPs of an image, % of the dense network's",
        ylabel="logistic regression, % of the test images",
        xlim=(0, 104),
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    write_picture(file, figure)


if __name__ == "__main__":
    picture(Path(sys.argv[1]), Path(sys.argv[2]))
