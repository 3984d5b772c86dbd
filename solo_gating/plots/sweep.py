"""Accuracy against FLOPs of one checkpoint: positions of its dial."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import write_picture
from ..texts import in_picture
from .style import DENSE, GATED, NEUTRAL


def draw_sweep(
    points: list[dict[str, Any]],
    dense: float,
    target_budget: float | Sequence[float] | None,
    path: Path,
    title: str,
    dial: str | None = "threshold",
) -> None:
    """Draw accuracy against FLOPs for the positions of the dial.

    Args:
        points: from `sweep`, with `share` and `knn_top1`.
        dense: the dense path's accuracy.
        target_budget: t_d of the pre-training, drawn as a line, or its range; None for none.
        path: of the PNG.
        title: above the curve.
        dial: what the gates are turned with, as `Gate.dial`.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    shares = [100 * point["share"] for point in points]
    accuracies = [point["knn_top1"] for point in points]
    turned = ["budget"] * ("budget" in points[0]) + ["threshold"] * (dial == "threshold")
    axis.plot(
        shares,
        accuracies,
        "-o",
        color=GATED,
        ms=4,
        label=f"gated path, {' and '.join(turned)} turned",
    )
    own = next(point for point in points if point["asked"] is None)
    position = ", ".join(f"{name} {own[name]:g}" for name in turned)
    axis.plot(
        100 * own["share"],
        own["knn_top1"],
        "*",
        color=GATED,
        ms=15,
        mec="black",
        ls="",
        label=f"gated path as it is ({position})",
    )
    axis.plot(100, dense, "s", color=DENSE, ms=8, ls="", label="dense path")
    if isinstance(target_budget, Sequence):
        low, high = target_budget
        axis.axvspan(100 * low, 100 * high, color=NEUTRAL, alpha=0.1, label="budgets of training")
    elif target_budget is not None:
        axis.axvline(
            100 * target_budget, color=NEUTRAL, ls="-.", lw=1, label="target budget of training"
        )
    axis.set(
        xlabel="FLOPs, % of the dense path's",
        ylabel="1-NN accuracy, %",
        xlim=(0, 104),
    )
    axis.set_title(in_picture(title), fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    write_picture(path, figure)
