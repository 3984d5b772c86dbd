"""Speed-up against FLOPs cut, with a baseline and a ceiling for each precision."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..files import write_picture
from .style import NEUTRAL

# Okabe and Ito's colour-blind safe palette: a colour for each precision.
_COLOURS = {"float32": "#0072B2", "bfloat16": "#009E73", "int8": "#D55E00"}
# A marker for each engine. "dynamic on static" is open, since it lies on "dynamic" as a rule.
_MARKERS = {
    "torch": "x",
    "compile": "+",
    "onnxruntime": "<",
    "openvino": ">",
    "dense": "s",
    "dynamic": "o",
    "dynamic on static": "v",
    "static": "^",
    "static without gates": "P",
}
_FILLED = ("dense", "dynamic", "static", "static without gates")
_COLUMNS = 3


def draw_chart(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw one panel for each case: speed-up over the fastest dense engine in float32.

    Each precision has a colour, a line for its fastest dense engine, and a curve for what the FLOPs
    alone would make of that.

    Args:
        rows: from `measure`, of any number of cases.
        path: of the PNG.
        title: above the panels.
    """
    cases = list(dict.fromkeys(_case(row) for row in rows))
    columns = min(_COLUMNS, len(cases))
    lines = -(-len(cases) // columns)
    size = (max(7.6, 4.8 * columns), 4.6 * lines + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.set_axis_off()
    for axis, case in zip(axes.flat, cases, strict=False):
        _draw_case(axis, [row for row in rows if _case(row) == case])
    figure.legend(
        handles=_legend(rows),
        loc="outside lower center",
        ncols=4 if columns > 1 else 3,
        fontsize="small",
        frameon=False,
    )
    figure.suptitle(title, fontsize="medium")
    write_picture(path, figure)


def _case(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["resolution"], row["batch"], row["threads"]


def _legend(rows: list[dict[str, Any]]) -> list[Line2D]:
    """Colours of the precisions and what their lines mean, then the engines' markers."""
    dtypes = {row["dtype"] for row in rows}
    engines = {row["engine"] for row in rows}
    ours = {"dense": "ours: dense", "dynamic": "ours: dynamic"}
    return [
        *(
            Line2D([], [], color=colour, lw=5, label=dtype)
            for dtype, colour in _COLOURS.items()
            if dtype in dtypes
        ),
        Line2D([], [], color=NEUTRAL, lw=1, label="fastest dense engine"),
        Line2D([], [], color=NEUTRAL, lw=1, ls="--", label="ceiling: by FLOPs alone"),
        *(
            Line2D([], [], label=ours.get(engine, engine), **_marked(engine, NEUTRAL))
            for engine in _MARKERS
            if engine in engines
        ),
    ]


def _marked(engine: str, colour: str) -> dict[str, Any]:
    face = colour if engine in _FILLED else "none"
    return {
        **{"color": colour, "marker": _MARKERS[engine], "mfc": face, "ls": ":", "lw": 1},
        "ms": 8 if engine == "dynamic" else 6.5,
    }


def _draw_case(axis: Any, rows: list[dict[str, Any]]) -> None:
    largest = max(row["flops_cut"] for row in rows)
    cuts = np.linspace(0, min(0.98, max(0.5, largest + 0.03)), 200)
    tops = [1.0]
    for dtype, colour in _COLOURS.items():
        own = [row for row in rows if row["dtype"] == dtype]
        for engine in _MARKERS:
            points = [row for row in own if row["engine"] == engine]
            points.sort(key=lambda row: row["flops_cut"])
            axis.plot(
                [100 * row["flops_cut"] for row in points],
                [row["speedup_over_float32"] for row in points],
                **_marked(engine, colour),
            )
        dense = [
            row for row in own if (row["engine"], dtype) == (row["baseline"], row["baseline_dtype"])
        ]
        if dense:
            base = dense[0]["speedup_over_float32"]
            axis.axhline(base, color=colour, lw=1)
            axis.plot(100 * cuts, base / (1 - cuts), color=colour, lw=1, ls="--")
            tops.append(base / (1 - largest))
    size, batch, threads = _case(rows[0])
    fastest = {
        row["dtype"]: row["baseline"] for row in rows if row["baseline_dtype"] == row["dtype"]
    }
    noisy = " (noisy)" if any(row["noisy"] for row in rows) else ""
    names = ", ".join(f"{dtype} {name}" for dtype, name in fastest.items())
    axis.set_title(
        f"{size}×{size}, batch {batch}, threads: {threads}{noisy}\nfastest dense: {names}",
        fontsize="small",
    )
    axis.set(
        xlabel="FLOPs cut, % of the dense encoder's",
        ylabel="speed-up over the fastest dense engine in float32",
        yscale="log",
    )
    ticks = [0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 12, 20, 40, 80]
    axis.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.minorticks_off()
    speeds = [row["speedup_over_float32"] for row in rows]
    axis.set_ylim(0.85 * min(1, *speeds), 1.25 * max(*tops, *speeds))
    axis.grid(alpha=0.3)
