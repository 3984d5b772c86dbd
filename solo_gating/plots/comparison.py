"""Accuracy against FLOPs: measured and published curves of each data set."""

import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D

from ..files import png_of
from ..report.cells import Cell
from ..report.records import STUDENTS
from ..report.tables import DATASETS, transfer_name, variant_name
from ..texts import in_picture
from .style import DENSE, GATED, NEUTRAL

# Okabe and Ito's palette, whose first colours are those of a run's own curves.
_COLOURS = {
    "vicreg": DENSE,
    "vicreg_dual": GATED,
    "vicreg_gated": "#009E73",
    "barlow_dual": "#CC79A7",
    "vicreg_dual_two_encoders": "#56B4E9",
    "simsiam": "#E69F00",
    "simsiam_gated": "black",
}
# Of other methods' curves, one after the other; those that share one have another marker.
_FURTHER = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "black", NEUTRAL)
_FURTHER_MARKERS = "vPX*d<>"
_MARKERS = "osD^vP*X"  # of one measured source after the other; published points are circles
_LABEL = 50  # characters in a line of the legend
_METRICS = {
    "linear": "linear evaluation",
    "knn": "1-NN",
    "knn_normalized": "1-NN, features of length 1",
}
# Dense encoders all have 100 % of the FLOPs. So as not to hide each other they stand side by side
# in a strip of their own, right of the axis's end.
_STRIP, _STEP = 106, 4

_Panel = tuple[str, str, str, str]


def draw_accuracy_flops(published: Iterable[Cell], measured: Iterable[Cell]) -> bytes | None:
    """Draw one panel for each metric and pair of data sets with a measured gated encoder.

    Runs without the invariance loss (Table 6) are left out: a few percent of accuracy would
    flatten everything else. So are students (Table 3), which are no paths of an encoder.

    Args:
        published: the papers' figures; those of the methods that were measured are drawn.
        measured: figures of runs.

    Returns:
        A PNG picture; None if no gated encoder's accuracy and FLOPs are known.
    """
    found: dict[_Panel, list[Cell]] = {}
    for cell in filter(_is_drawn, measured):
        found.setdefault(_panel(cell), []).append(cell)
    with_gates = [panel for panel in found if any(cell.path == "gated" for cell in found[panel])]
    if not with_gates:
        return None
    known = dict.fromkeys(filter(_is_drawn, published))  # Tables 4 to 6 repeat a method's figures
    panels = {}
    for panel in sorted(with_gates, key=_order):
        methods = {cell.variant for cell in found[panel]}
        beside = [cell for cell in known if _panel(cell) == panel and cell.variant in methods]
        panels[panel] = _curves([*found[panel], *beside])
    heights = [max(3.8, 1.4 + 0.15 * _legend_lines(curves)) for curves in panels.values()]
    figure = Figure(figsize=(11, sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.12))
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    for axis, (panel, curves) in zip(axes.flat, panels.items(), strict=True):
        _draw_panel(axis, panel, curves)
    return png_of(figure, dpi=120)


def _panel(cell: Cell) -> _Panel:
    return cell.metric, cell.trained_on, cell.evaluated_on, cell.images


def _order(panel: _Panel) -> tuple[bool, bool, list[int], _Panel]:
    """Linear evaluation first, transfer after the rest, data sets as in the papers."""
    metric, trained_on, evaluated_on, _ = panel
    names = [*DATASETS]
    places = [
        names.index(name) if name in names else len(names) for name in (trained_on, evaluated_on)
    ]
    return metric != "linear", trained_on != evaluated_on, places, panel


def _is_drawn(cell: Cell) -> bool:
    known = cell.path == "dense" or cell.flops_cut is not None
    students = cell.variant.startswith(STUDENTS)  # whose path is dense, and whose FLOPs are not all
    return known and not students and not cell.variant.endswith("_no_invariance")


def _share(cell: Cell) -> float:
    """FLOPs of a gated encoder in percent of the dense one's."""
    return math.nan if cell.flops_cut is None else 100 * (1 - cell.flops_cut)


def _curves(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells of one method and source together, a method's published ones after the measured."""
    curves: dict[tuple[str, bool, tuple[float, ...], str], list[Cell]] = {}
    for cell in cells:
        key = (cell.variant, not cell.measured, cell.order, cell.source)
        curves.setdefault(key, []).append(cell)
    return [sorted(curves[key], key=lambda cell: cell.flops_cut or 0.0) for key in sorted(curves)]


def _draw_panel(axis: Axes, panel: _Panel, curves: Sequence[list[Cell]]) -> None:
    metric, trained_on, evaluated_on, images = panel
    own = [curve[0] for curve in curves if curve[0].measured and curve[0].variant in _COLOURS]
    sources = sorted({(cell.order, cell.source) for cell in own})
    markers = {source: _MARKERS[i % len(_MARKERS)] for i, (_, source) in enumerate(sources)}
    place = float(_STRIP)
    handles = []
    further = itertools.cycle(itertools.product(_FURTHER_MARKERS, _FURTHER))
    for curve in curves:
        marker = markers.get(curve[0].source, "o")
        colour = _COLOURS.get(curve[0].variant)
        if colour is None:
            marker, colour = next(further)
        handles.append(_draw_curve(axis, curve, colour, marker, place))
        place += _STEP * any(cell.path == "dense" for cell in curve)
    title = transfer_name(trained_on, evaluated_on) + (f" ({images})" if images else "")
    axis.set(
        title=in_picture(f"{title}, {_METRICS[metric]}"),
        xlabel="FLOPs per image, % of the dense encoder's",
        ylabel="top-1 accuracy, %",
        xlim=(0, max(place, _STRIP + 3 * _STEP)),
    )
    axis.set_xticks(range(0, 101, 20))
    axis.axvline(_STRIP - _STEP, color="black", linewidth=0.8)
    axis.text(
        _STRIP - 0.6 * _STEP,
        0.99,
        "dense",
        va="top",
        fontsize="small",
        transform=axis.get_xaxis_transform(),
    )
    axis.margins(y=0.12)
    axis.grid(alpha=0.3)
    axis.legend(
        handles,
        [_label(curve) for curve in curves],
        handler_map={tuple: HandlerTuple(ndivide=None)},
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        fontsize="small",
        handlelength=3,
        frameon=False,
    )


def _label(curve: Sequence[Cell]) -> str:
    text = f"{variant_name(curve[0].variant)}, {curve[0].source}"
    return "\n".join(map(in_picture, textwrap.wrap(text, _LABEL)))


def _legend_lines(curves: Iterable[Sequence[Cell]]) -> float:
    return sum(_label(curve).count("\n") + 1.5 for curve in curves)


def _draw_curve(
    axis: Axes, cells: Sequence[Cell], colour: str, marker: str, dense_place: float
) -> tuple[Line2D, ...]:
    """Gated points joined in order of FLOPs, and dense ones; returns what the legend shows."""
    measured = cells[0].measured
    handles = []
    for path in ("gated", "dense"):
        points = [cell for cell in cells if cell.path == path]
        if not points:
            continue
        places = [_share(cell) if path == "gated" else dense_place for cell in points]
        (drawn,) = axis.plot(
            places,
            [cell.value for cell in points],
            color=colour,
            marker=marker,
            markersize=7,
            markerfacecolor=colour if measured else "white",
            linestyle="none" if path == "dense" else "-" if measured else "--",
            linewidth=1.8 if measured else 1.2,
            zorder=3 if measured else 2,
        )
        handles.append(drawn)
        for place, cell in zip(places, points, strict=True):
            if measured and cell.std is not None:
                axis.errorbar(place, cell.value, cell.std, ecolor=colour, capsize=3)
    return tuple(handles[:1])
