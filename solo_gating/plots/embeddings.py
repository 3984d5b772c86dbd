"""Points of an embedding, by class."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..files import write_picture
from ..texts import in_picture

# Ten classes: Okabe and Ito's colours, told apart by colour and, where colours are close, shape.
_COLOURS = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#000000",
    "#999999",
    "#882255",
)
_MARKERS = "os^Dv<>PX*"
MOST_CLASSES = len(_COLOURS)


def draw_embeddings(
    embeddings: dict[str, np.ndarray],
    targets: np.ndarray,
    names: list[str],
    path: Path,
    title: str,
) -> None:
    """Draw one panel for each entry, points by class, with one legend.

    Args:
        embeddings: heading → N × 2.
        targets: N, indices into `names`.
        names: of the classes, at most ten.
        path: of the PNG.
        title: above the panels.
    """
    figure = Figure(figsize=(4.6 * len(embeddings), 5.2), layout="constrained")
    axes = figure.subplots(1, len(embeddings), squeeze=False)
    size = float(np.clip(20000 / len(targets), 6, 40))
    for axis, (heading, points) in zip(axes[0], embeddings.items(), strict=True):
        order = np.random.RandomState(0).permutation(len(points))
        for index, name in enumerate(names):
            mine = order[targets[order] == index]
            axis.scatter(
                *points[mine].T,
                s=size,
                c=_COLOURS[index],
                marker=_MARKERS[index],
                linewidths=0,
                alpha=0.75,
                label=in_picture(name),
            )
        axis.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
        axis.set_title(heading, fontsize="medium")
    handles, labels = axes[0][0].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=min(5, len(names)), frameon=False
    )
    for handle in legend.legend_handles:
        handle.set_sizes([40])  # type: ignore[union-attr]
        handle.set_alpha(1)  # type: ignore[union-attr]
    figure.suptitle(in_picture(title), fontsize="medium")
    write_picture(path, figure)
