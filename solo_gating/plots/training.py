"""A picture of a run: losses, share of FLOPs and accuracies over its epochs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import write_picture
from ..texts import in_picture
from ..training.callbacks import SSL_LOSSES
from ..training.logs import read_logs
from .style import DENSE, GATED, NEUTRAL


def draw_curves(
    folder: Path,
    target_budget: float | Sequence[float] | None,
    title: str,
    dial: str | None = "threshold",
) -> Path | None:
    """Draw `training.png` into a run's folder.

    Args:
        folder: the run's folder.
        target_budget: t_d, drawn as a line, or its range; None for a method without gates.
        title: above the panels.
        dial: what the gates are turned with, as `Gate.dial`: masks are named by a threshold only where
            there is one.

    Returns:
        The picture's path; None if nothing was logged.
    """
    logs = read_logs(folder)
    sampled, decided = (
        (" (sampled masks)", " (thresholded masks)") if dial == "threshold" else ("", "")
    )
    ssl = next((f"{name}_epoch" for name in SSL_LOSSES if f"{name}_epoch" in logs), None)
    panels: list[tuple[str, str, list[tuple[str, str, dict[str, Any]]]]] = [
        ("self-supervised loss", "loss", [(ssl or "", "SSL loss", {"color": NEUTRAL})]),
        (
            "losses of the gates",
            "loss (weighted)",
            [
                ("train_budget_loss_epoch", "budget", {"color": GATED}),
                ("train_bound_loss_epoch", "bound", {"color": NEUTRAL, "ls": "--"}),
            ],
        ),
        (
            "what the gated path lacks of the dense",
            "unexplained variance, %",
            [("train_unexplained_variance_epoch", "unexplained variance", {"color": GATED})],
        ),
        (
            "FLOPs used by the gated path",
            "share of the dense FLOPs, %",
            [
                (
                    "train_flops_share_epoch",
                    f"training{sampled}",
                    {"color": GATED, "ls": "--"},
                ),
                ("val_flops_share", f"validation{decided}", {"color": GATED}),
            ],
        ),
        (
            "online accuracy, validation",
            "top-1, %",
            [
                ("val_dense_knn_acc1", "dense, kNN", {"color": DENSE}),
                ("val_gated_knn_acc1", "gated, kNN", {"color": GATED}),
                ("val_dense_acc1", "dense, linear", {"color": DENSE, "ls": ":"}),
                ("val_gated_acc1", "gated, linear", {"color": GATED, "ls": ":"}),
                ("val_acc1", "linear", {"color": DENSE, "ls": ":"}),
            ],
        ),
    ]
    if "val_dense_acc1" in logs or "val_gated_acc1" in logs:
        logs.pop("val_acc1", None)
    shown = [panel for panel in panels if any(line[0] in logs for line in panel[2])]
    if not shown:
        return None
    last = 1 + max(epoch for points in logs.values() for epoch in points)
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(shown) :]:
        axis.remove()
    for axis, (heading, unit, lines) in zip(axes, shown, strict=False):
        for name, label, style in lines:
            if points := sorted(logs.get(name, {}).items()):
                epochs, values = zip(*points, strict=True)
                scale = 100 if "flops" in name or "variance" in name else 1
                marker = "o" if len(points) == 1 else None
                axis.plot(
                    [epoch + 1 for epoch in epochs],
                    [scale * value for value in values],
                    label=label,
                    marker=marker,
                    **style,
                )
        if "FLOPs" in heading:
            if isinstance(target_budget, Sequence):
                low, high = target_budget
                axis.axhspan(
                    100 * low, 100 * high, color=NEUTRAL, alpha=0.1, label="target budgets"
                )
            elif target_budget is not None:
                axis.axhline(
                    100 * target_budget, color="black", lw=1, ls="-.", label="target budget"
                )
            axis.set_ylim(0, 100)
        axis.set(title=heading, xlabel="epoch", ylabel=unit, xlim=(0, last + 1))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(axis.get_lines()) > 1:
            axis.legend(fontsize="small")
    figure.suptitle(in_picture(str(title)))
    path = folder / "training.png"
    write_picture(path, figure)
    return path
