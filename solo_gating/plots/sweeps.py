"""Accuracy along the dial: a curve for each checkpoint, beside dense networks of other widths."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import png_of
from ..report.records import STUDENTS, Record, Sweep
from ..report.tables import NOTHING, Row, Table, transfer_name, variant_name
from ..texts import in_picture
from .style import DENSE, GATED, NEUTRAL

# Okabe and Ito's palette, and a marker for each.
_COLOURS = (GATED, DENSE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")
_MARKERS = "osD^vP*"

_Panel = tuple[str, str, str]
_Point = tuple[float, float, float]  # FLOPs, accuracy, its deviation


def draw_sweeps(sweeps: Sequence[Sweep], records: Iterable[Record]) -> bytes | None:
    """Draw a panel for each set of images: 1-NN accuracy against FLOPs.

    A line is a checkpoint, or the mean over checkpoints of the same name that differ in the seed,
    and the square of its colour its dense path. A grey line joins dense networks without gates: the
    rival that needs no gates, at equal FLOPs.

    Args:
        sweeps: of `main_policy --sweep`.
        records: of which the 1-NN accuracies of networks without gates are drawn.

    Returns:
        A PNG picture; None without a sweep.
    """
    panels = _by_panel(sweeps)
    if not panels:
        return None
    rivals = _rivals(records)
    figure = Figure(figsize=(9.5, 4.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for axis, (panel, curves) in zip(axes.flat, panels.items(), strict=True):
        _draw_panel(axis, panel, curves, rivals.get(panel, {}))
    return png_of(figure, dpi=120)


def sweep_table(sweeps: Sequence[Sweep]) -> Table:
    """The same as numbers: a row for each curve, a column for each share that was asked for."""
    asked = sorted({p.asked for s in sweeps for p in s.points if p.asked is not None})
    rows = []
    for panel, curves in _by_panel(sweeps).items():
        for name, runs in curves.items():
            points = _gated_points(runs)
            dense = _mean([(run.dense_flops, run.dense_value) for run in runs])
            texts = [_text(points.get(share)) for share in asked]
            rows.append(Row(True, (name, _title(panel), str(len(runs)), _text(dense), *texts)))
    return Table(
        "1-NN accuracy with the dial at a share of the FLOPs",
        ("By main_policy --sweep; the columns are the shares that were asked for.",),
        ("run", "data", "n", "dense path", *(f"{share:.0%}" for share in asked)),
        tuple(rows),
    )


def _by_panel(sweeps: Sequence[Sweep]) -> dict[_Panel, dict[str, list[Sweep]]]:
    panels: dict[_Panel, dict[str, list[Sweep]]] = defaultdict(lambda: defaultdict(list))
    for sweep in sweeps:
        panels[_panel(sweep)][_name(sweep)].append(sweep)
    return panels


def _panel(found: Sweep | Record) -> _Panel:
    images = found.data.get("val_images")
    where = "" if images is None else f", {images:,} test images"
    return found.pretraining["dataset"], found.data["dataset"], where


def _name(found: Sweep | Record) -> str:
    run = found.pretraining
    words = [str(run.get("name") or variant_name(found.variant)), f"width {run['width']}"]
    return ", ".join([*words, f"{run['epochs']:,} epochs"])


def _rivals(records: Iterable[Record]) -> dict[_Panel, dict[str, list[Record]]]:
    """Networks without gates, those that differ in the seed together."""
    found: dict[_Panel, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        plain = record.pretraining.get("gating") is None and record.flops is not None
        if plain and not record.variant.startswith(STUDENTS) and record.published_metric == "knn":
            found[_panel(record)][_name(record)].append(record)
    return found


def _mean(pairs: Sequence[tuple[float, float]]) -> _Point:
    flops, values = zip(*pairs, strict=True)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(flops), statistics.mean(values), deviation


def _gated_points(runs: Sequence[Sweep]) -> dict[float, _Point]:
    found: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        for point in run.points:
            if point.asked is not None:
                found[point.asked].append((point.flops, point.value))
    return {share: _mean(pairs) for share, pairs in sorted(found.items())}


def _text(point: _Point | None) -> str:
    if point is None:
        return NOTHING
    return f"{point[1]:.1f} ± {point[2]:.1f}" if point[2] else f"{point[1]:.1f}"


def _title(panel: _Panel) -> str:
    trained_on, evaluated_on, images = panel
    return transfer_name(trained_on, evaluated_on) + images


def _draw_panel(
    axis: Axes,
    panel: _Panel,
    curves: dict[str, list[Sweep]],
    rivals: dict[str, list[Record]],
) -> None:
    whole = max(run.dense_flops for runs in curves.values() for run in runs)

    def draw(points: Iterable[_Point], **style: object) -> None:
        flops, values, deviations = zip(*sorted(points), strict=True)
        shares = [100 * number / whole for number in flops]
        axis.errorbar(shares, values, deviations, capsize=2, elinewidth=0.8, **style)  # type: ignore[arg-type]

    for (name, runs), colour, marker in zip(
        sorted(curves.items()), cycle(_COLOURS), cycle(_MARKERS), strict=False
    ):
        label = name + (f", {len(runs)} seeds" if len(runs) > 1 else "")
        draw(
            _gated_points(runs).values(), color=colour, marker=marker, ms=4, label=in_picture(label)
        )
        dense = _mean([(run.dense_flops, run.dense_value) for run in runs])
        draw([dense], color=colour, marker="s", ms=8, ls="none")
    if rivals:
        points = [
            _mean([(r.flops, r.value) for r in group if r.flops is not None])
            for group in rivals.values()
        ]
        draw(
            points,
            color=NEUTRAL,
            marker="s",
            ms=7,
            mfc="white",
            ls="--",
            label="dense networks without gates",
        )
    axis.set(
        xlabel="FLOPs per image, % of the widest network's dense path (squares)",
        ylabel="1-NN accuracy, %",
        xlim=(0, 106),
        title=in_picture(_title(panel)),
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
