"""Speed-up against FLOPs cut, with the ceiling as a line."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..files import write_picture

# Okabe and Ito's colour-blind safe palette; ours are filled and coloured, the others' engines dark.
_STYLES: dict[tuple[str, str], tuple[str, str]] = {
    ("torch", "float32"): ("#555555", "x"),
    ("compile", "float32"): ("#555555", "+"),
    ("onnxruntime", "float32"): ("#009E73", "<"),
    ("openvino", "float32"): ("#009E73", ">"),
    ("openvino", "bfloat16"): ("#555555", "*"),
    ("dense", "float32"): ("#000000", "s"),
    ("dynamic", "float32"): ("#D55E00", "o"),
    ("dynamic", "bfloat16"): ("#E69F00", "D"),
    ("dynamic on static", "float32"): ("#CC79A7", "v"),
    ("static", "float32"): ("#0072B2", "^"),
    ("static without gates", "float32"): ("#56B4E9", "P"),
}
_COLUMNS = 3


def draw_chart(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw one panel for each case.

    Args:
        rows: from `measure`, of any number of cases.
        path: of the PNG.
        title: above the panels.
    """
    cases = list(dict.fromkeys(_case(row) for row in rows))
    columns = min(_COLUMNS, len(cases))
    lines = -(-len(cases) // columns)
    size = (max(6.8, 4.4 * columns), 4.2 * lines + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.set_axis_off()
    for axis, case in zip(axes.flat, cases, strict=False):
        _draw_case(axis, [row for row in rows if _case(row) == case])
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=3,
        fontsize="small",
        frameon=False,
    )
    figure.suptitle(title, fontsize="medium")
    write_picture(path, figure)


def _case(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["resolution"], row["batch"], row["threads"]


def _label(engine: str, dtype: str) -> str:
    ours = {"dense": "ours: dense", "dynamic": "ours: dynamic"}
    return ours.get(engine, engine) + (", bfloat16" if dtype == "bfloat16" else "")


def _draw_case(axis: Any, rows: list[dict[str, Any]]) -> None:
    largest = max(row["flops_cut"] for row in rows)
    cuts = np.linspace(0, min(0.98, max(0.5, largest + 0.03)), 200)
    axis.plot(100 * cuts, 1 / (1 - cuts), color="black", lw=1, label="ceiling: FLOPs alone")
    for (engine, dtype), (colour, marker) in _STYLES.items():
        own = [row for row in rows if (row["engine"], row["dtype"]) == (engine, dtype)]
        if not own:
            continue
        own.sort(key=lambda row: row["flops_cut"])
        axis.plot(
            [100 * row["flops_cut"] for row in own],
            [row["speedup"] for row in own],
            color=colour,
            marker=marker,
            ls=":",
            lw=1,
            ms=7,
            label=_label(engine, dtype),
        )
    size, batch, threads = _case(rows[0])
    baseline = next(row["baseline"] for row in rows if row["dtype"] == "float32")
    noisy = " (noisy)" if any(row["noisy"] for row in rows) else ""
    axis.set_title(
        f"{size}×{size}, batch {batch}, threads: {threads}{noisy}\nfastest dense engine: {baseline}",
        fontsize="medium",
    )
    axis.set(
        xlabel="FLOPs cut, % of the dense encoder's",
        ylabel="speed-up over the fastest dense engine",
        yscale="log",
    )
    ticks = [0.25, 0.5, 1, 2, 3, 5, 8, 12, 20, 40]
    axis.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.minorticks_off()
    speeds = [row["speedup"] for row in rows]
    axis.set_ylim(0.85 * min(1, *speeds), 1.25 * max(1 / (1 - largest), *speeds))
    axis.axhline(1, color="#999999", lw=0.8)
    axis.grid(alpha=0.3)
