"""Which channels of each block are always, sometimes or never used."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..files import write_picture
from ..policies import Policy
from ..texts import in_picture

# Okabe and Ito's colour-blind safe palette, dark enough to be told apart in grey.
_KINDS = {
    "always_on": ("always on", "#0072B2"),
    "input_dependent": ("input dependent", "#E69F00"),
    "always_off": ("always off", "#DDDDDD"),
}


def draw_policy(policy: Policy, path: Path, title: str) -> None:
    """Stacked bars per block: channels always on, input dependent, always off (papers, Figure 1).

    Args:
        policy: what to draw.
        path: of the PNG.
        title: above the bars.
    """
    width = max(6.0, 0.62 * len(policy.blocks) + 2)
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    axis = figure.subplots()
    positions = np.arange(len(policy.blocks))
    bottom = np.zeros(len(policy.blocks))
    for kind, (label, colour) in _KINDS.items():
        heights = np.array([100 * getattr(b, kind) / b.channels for b in policy.blocks])
        axis.bar(positions, heights, 0.8, bottom, label=label, color=colour, edgecolor="white")
        for x, (height, start, block) in enumerate(
            zip(heights, bottom, policy.blocks, strict=True)
        ):
            if height >= 6:
                ink = "white" if kind == "always_on" else "black"
                axis.text(
                    x - 0.12,
                    start + height / 2,
                    str(getattr(block, kind)),
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize="small",
                )
        bottom += heights
    axis.errorbar(
        positions + 0.22,  # beside the numbers
        [100 * block.active for block in policy.blocks],
        [100 * block.active_std for block in policy.blocks],
        fmt="D",
        color="black",
        ms=5,
        mfc="white",
        capsize=3,
        label="used by an image (mean ± std)",
    )
    names = [f"{block.name.removeprefix('layer')}\n{block.channels}" for block in policy.blocks]
    axis.set_xticks(positions, names)
    axis.set(
        xlabel="block (stage.block), and its number of channels",
        ylabel="channels, %",
        ylim=(0, 100),
        xlim=(-0.6, len(policy.blocks) - 0.4),
    )
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    axis.set_title(in_picture(title), fontsize="medium")
    write_picture(path, figure)
