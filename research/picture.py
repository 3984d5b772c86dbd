"""Accuracy against FLOPs of every variant of a study.

python research/picture.py OUT FILE.png

OUT is the study's folder. Logistic regression, means over its seeds and, where there are several, their
standard deviations: a line for what one training gives along its dial, and for dense networks of several
widths; a dotted line for a kind whose budgets are a training each, a point for what has no dial.
"""

import statistics
import sys
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import OWN, results

from solo_gating.files import write_picture
from solo_gating.plots.style import DENSE, GATED, NEUTRAL

# Okabe and Ito's other colours; all that is dotted has a marker of its own, and few share a colour.
_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "D^vP*X<>dph8"
_DENSE = "dense networks, one training each"


class Point(NamedTuple):
    """A mean over seeds.

    Attributes:
        flops: in % of the network `dense`.
        accuracy: in %.
        deviation: the standard one; 0 for one seed.
    """

    flops: float
    accuracy: float
    deviation: float


def points(runs: list[dict[str, Any]], full: float) -> dict[str, Point]:
    """For each column of a variant's results the mean over its seeds.

    Args:
        runs: what each seed has given.
        full: FLOPs that are 100 %.
    """
    columns = {
        column: [run[column] for run in runs if column in run] for run in runs for column in run
    }
    return {column: _point(rows, full) for column, rows in columns.items()}


def _point(rows: list[dict[str, float]], full: float) -> Point:
    accuracies = [row["linear"] for row in rows]
    return Point(
        100 * statistics.mean(row["flops"] for row in rows) / full,
        statistics.mean(accuracies),
        statistics.stdev(accuracies) if len(rows) > 1 else 0.0,
    )


def draw(axis: Axes, variants: dict[str, dict[str, Point]]) -> None:
    """Draw the variants of a study into axes, those of the highest accuracy first in the legend.

    Args:
        axis: empty.
        variants: for each its columns.
    """
    dense: list[Point] = []
    dials: dict[str, list[Point]] = {}
    trainings: dict[str, list[Point]] = {}
    for name, columns in variants.items():
        told = [point for column, point in columns.items() if column not in ("dense", OWN)]
        if name.startswith("dense"):
            dense.append(columns["dense"])
        elif told and OWN not in columns:
            dials[name] = [*told, columns["dense"]]
        else:
            kind, _, budget = name.rpartition("_")
            several = sum(other.startswith(f"{kind}_") for other in variants) > 1
            family = kind if several and budget.replace(".", "").isdigit() else name
            trainings.setdefault(family, []).append(columns.get(OWN, columns["dense"]))
    _line(axis, _DENSE, dense, "-s", DENSE)
    colours, markers = cycle(_COLOURS), cycle(_MARKERS)
    for name in sorted(dials, key=lambda name: _highest(dials[name]), reverse=True):
        colour = GATED if name == "distilled" else next(colours)
        _line(axis, name, dials[name], "-o", colour)
    colours = cycle((NEUTRAL, *_COLOURS))
    for name in sorted(trainings, key=lambda name: _highest(trainings[name]), reverse=True):
        _line(axis, name, trainings[name], f":{next(markers)}", next(colours))


def _highest(points: list[Point]) -> float:
    return max(point.accuracy for point in points)


def _line(axis: Axes, label: str, points: list[Point], style: str, colour: str) -> None:
    flops, accuracies, deviations = zip(*sorted(points), strict=True)
    open_or_not = {"mfc": "none", "ms": 8} if style.startswith(":") else {"ms": 4}
    axis.plot(flops, accuracies, style, color=colour, label=label, lw=1.2, **open_or_not)
    ends = zip(flops, accuracies, deviations, strict=True)
    bars = [(flop, mean - by, mean + by) for flop, mean, by in ends if by]
    if bars:
        axis.vlines(*zip(*bars, strict=True), color=colour, alpha=0.35, lw=1.5)


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
    draw(axis, {name: points(runs, full) for name, runs in variants.items()})
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
