"""Tables of published and measured figures, in the papers' layout."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .cells import Cell, PublishedTable, unusual_settings
from .records import Record

NOTHING = "–"

DATASETS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "stl10": "STL-10",
    "imagenet100": "ImageNet-100",
}
_VARIANTS = {
    "vicreg": "VICReg",
    "vicreg_gated": "VICReg-Gating",
    "vicreg_dual": "VICReg-Dual",
    "barlow_twins": "Barlow Twins",
    "barlow_gated": "BT-Gating",
    "barlow_dual": "BT-Dual",
    "simsiam": "SimSiam",
    "simsiam_gated": "SimSiam-Gating",
    "simsiam_dual": "SimSiam-Dual",
    "simclr": "SimCLR",
    "simclr_gated": "SimCLR-Gating",
    "us3l": "US3L",
    "simreg": "SimReg",
    "seed": "SEED",
}


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        measured: whether its figures come from runs rather than from a paper.
        texts: one for each column.
    """

    measured: bool
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """What is shown as a table.

    Attributes:
        title: its heading.
        notes: sentences above it.
        header: the columns' names.
        rows: as many texts each as there are columns.
    """

    title: str
    notes: tuple[str, ...]
    header: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class _Column:
    """One column: whose cells it shows, and which of their figures."""

    heading: str
    of: tuple[tuple[str, str], ...]  # (variant, path)
    figure: str = "value"


def _dual(heading: str, variant: str) -> tuple[_Column, ...]:
    gated = ((variant, "gated"),)
    return (
        _Column(f"{heading}: dense, %", ((variant, "dense"),)),
        _Column(f"{heading}: gated, %", gated),
        _Column(f"{heading}: FLOPs cut", gated, "flops_cut"),
    )


def _lightweight(heading: str, of: tuple[tuple[str, str], ...]) -> tuple[_Column, ...]:
    return (_Column(f"{heading}, %", of), _Column(f"{heading}: FLOPs", of, "flops"))


def _under_simclr(heading: str, kind: str) -> tuple[_Column, ...]:
    gated = ((f"simclr_gated ({kind} gates)", "gated"),)
    return (_Column(f"{heading}, %", gated), _Column(f"{heading}: FLOPs cut", gated, "flops_cut"))


_VICREG = (("vicreg", "dense"),)
_VICREG_GATED = (("vicreg_gated", "gated"),)
# The dense baseline is the row "dense" of this table.
_SIMSIAM = (("simsiam", "dense"), ("simsiam_gated", "gated"))

_LAYOUTS: dict[str, tuple[_Column, ...]] = {
    "unification-1": (
        _Column("VICReg (Baseline-1): dense, %", _VICREG),
        _Column("VICReg (Baseline-1): FLOPs", _VICREG, "flops"),
        _Column("VICReg-Gating (Baseline-2): gated, %", _VICREG_GATED),
        _Column("VICReg-Gating (Baseline-2): FLOPs cut", _VICREG_GATED, "flops_cut"),
        *_dual("VICReg-Dual", "vicreg_dual"),
    ),
    "unification-2": (
        _Column("VICReg: dense, %", _VICREG),
        *_dual("VICReg-Dual", "vicreg_dual")[:2],
    ),
    "unification-3": (
        *_lightweight("SimReg", (("simreg", "dense"),)),
        *_lightweight("SEED", (("seed", "dense"),)),
        *_lightweight("VICReg-Dual: gated", (("vicreg_dual", "gated"),)),
    ),
    "unification-4": (
        *_dual("BT-Dual", "barlow_dual"),
        *_dual("VICReg-Dual", "vicreg_dual"),
    ),
    "unification-5": (
        *_dual("1×ResNet-18", "vicreg_dual"),
        *_dual("2×ResNet-18", "vicreg_dual_two_encoders"),
    ),
    "unification-6": (
        *_dual("with invariance", "vicreg_dual"),
        *_dual("without invariance", "vicreg_dual_no_invariance"),
    ),
    "contrastive_dual_gating-1": (
        *_under_simclr("CDG", "cdg"),
        *_under_simclr("FBS", "fbs"),
        *_under_simclr("DGC", "dgc"),
        *_under_simclr("CGNet", "cgnet"),
    ),
    "contrastive_dual_gating-2": (
        _Column("SimCLR: dense, %", (("simclr", "dense"),)),
        *_under_simclr("SCDG", "scdg"),
    ),
    "dynamic_channel_selection-1": (
        _Column("accuracy, %", _SIMSIAM),
        _Column("FLOPs", _SIMSIAM, "flops"),
        _Column("FLOPs cut", _SIMSIAM, "flops_cut"),
    ),
}
# Where the baseline, which has no budget, has columns of its own, all rows of a data set show it.
_BASELINE_IN_EVERY_ROW = ("unification-1", "unification-2")
# Their rows are of no target budget: how much is computed follows from something else.
_WITHOUT_BUDGETS = ("contrastive_dual_gating-1", "contrastive_dual_gating-2")


def compare(published: PublishedTable, measured: Sequence[Cell]) -> Table | None:
    """A paper's table with the measured figures under the published ones.

    One row for each data set, target budget and source; the data sets are those of the paper, the
    budgets those of the paper or of a run.

    Args:
        published: the paper's.
        measured: any figures; those that have a place in the table are taken.

    Returns:
        None if none has.
    """
    columns = _LAYOUTS[published.identity]
    shown = {place for column in columns for place in column.of}
    places = list(dict.fromkeys((c.trained_on, c.evaluated_on) for c in published.cells))
    taken = [
        cell
        for cell in measured
        if cell.metric == published.metric
        and (cell.trained_on, cell.evaluated_on) in places
        and (cell.variant, cell.path) in shown
    ]
    if not taken:
        return None
    budgets = published.identity not in _WITHOUT_BUDGETS
    if not budgets:
        taken = _without_budgets(taken)
    transfer = any(start != end for start, end in places)
    in_every_row = published.identity in _BASELINE_IN_EVERY_ROW
    paper = published.cells[0].source
    rows = []
    for start, end in places:
        here = [
            c for c in (*published.cells, *taken) if (c.trained_on, c.evaluated_on) == (start, end)
        ]
        heading = transfer_name(start, end)
        for (budget, source), cells in _lines(here, paper, in_every_row):
            figures = (_show(_first(cells, column.of), column.figure) for column in columns)
            told = (_budget_text(budget, in_every_row),) if budgets else ()
            texts = (heading, *told, source, *figures)
            rows.append(Row(source != paper, texts))
    first = "from → to" if transfer else "data set"
    return Table(
        published.title,
        published.notes,
        (first, *(("t_d",) if budgets else ()), "figures", *(column.heading for column in columns)),
        tuple(rows),
    )


def _without_budgets(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of no budget; where several would have one place, their sources name it."""
    places = Counter(_placed(cell) for cell in cells)
    return [
        replace(
            cell,
            target_budget=None,
            source=cell.source
            if places[_placed(cell)] == 1
            else f"{cell.source}, t_d {_budget_text(cell.target_budget, True)}",
        )
        for cell in cells
    ]


def _placed(cell: Cell) -> tuple[str, ...]:
    return cell.trained_on, cell.evaluated_on, cell.variant, cell.path, cell.source


_Line = dict[tuple[str, str], Cell]


def _lines(
    here: Sequence[Cell], paper: str, baseline_in_every_row: bool
) -> list[tuple[tuple[float | None, str], _Line]]:
    """(budget, source) and the cells by (variant, path), in the order of the rows."""
    lines: dict[tuple[float | None, str], _Line] = {}
    for cell in here:
        for source in (paper, cell.source):  # a published line also where the paper has nothing
            lines.setdefault((cell.target_budget, source), {})
        lines[cell.target_budget, cell.source][cell.variant, cell.path] = cell
    if baseline_in_every_row:
        for without, source in [key for key in lines if key[0] is None and key[1] != paper]:
            beside = [key for key in lines if key[1] == source and key[0] is not None]
            for key in beside:
                lines[key] |= lines[without, source]
            if beside:
                del lines[without, source]
        for key in lines:
            if key[1] == paper:
                lines[key] |= lines[None, paper]
        # Its own row only for a measured baseline that stands alone.
        if not any(key[0] is None and key[1] != paper for key in lines):
            del lines[None, paper]
    orders = {cell.source: cell.order for cell in here}
    return sorted(
        lines.items(),
        key=lambda line: (line[0][0] or 0.0, orders.get(line[0][1], ()), line[0][1]),
    )


def _budget_text(budget: float | None, in_every_row: bool) -> str:
    if budget is None:
        return NOTHING if in_every_row else "dense"
    return f"{100 * budget:g} %"


def _first(cells: dict[tuple[str, str], Cell], of: tuple[tuple[str, str], ...]) -> Cell | None:
    return next((cells[place] for place in of if place in cells), None)


def _show(cell: Cell | None, figure: str) -> str:
    if cell is None:
        return NOTHING
    if figure == "flops":
        return _flops_text(cell.flops, 4 if cell.measured else 3)
    if figure == "flops_cut":
        return _cut_text(cell.flops_cut)
    return _accuracy_text(cell.value, cell.std) + (f" (n = {cell.runs})" if cell.runs > 1 else "")


def _accuracy_text(value: float, std: float | None) -> str:
    return f"{value:.2f}" + (f" ± {std:.2f}" if std is not None else "")


def _flops_text(flops: float | None, digits: int) -> str:
    if flops is None:
        return NOTHING
    mantissa, exponent = f"{flops:.{digits - 1}E}".split("E")
    return f"{mantissa}E{int(exponent)}"


def _cut_text(cut: float | None) -> str:
    return NOTHING if cut is None else f"{cut:.2%}".replace("%", " %")


def all_figures(records: Iterable[Record]) -> Table:
    """One row for each record, whatever its data set, method and settings.

    Args:
        records: in the order in which they are shown.
    """
    header = (
        *("run", "method", "backbone", "pre-trained on", "evaluated on", "t_d", "path", "metric"),
        *("top-1, %", "FLOPs", "FLOPs cut", "epochs", "width", "seed", "images", "file"),
    )
    rows = []
    for record in records:
        run = record.pretraining
        budget = record.target_budget
        cells = (
            run.get("name"),
            variant_name(record.variant),
            run["backbone"],
            dataset_name(run["dataset"]),
            dataset_name(record.data["dataset"]),
            None if budget is None else f"{100 * budget:g} %",
            record.path,
            metric_name(record),
            _accuracy_text(record.value, record.std),
            _flops_text(record.flops, 4),
            _cut_text(record.flops_cut),
            run["epochs"],
            run["width"],
            run.get("seed"),
            record.images,
            record.file,
        )
        rows.append(Row(True, tuple(NOTHING if text is None else str(text) for text in cells)))
    return Table(
        "All measured figures",
        (
            "One row for each evaluated path of each run. FLOPs are per image; images: training and "
            "test images of the evaluation.",
        ),
        header,
        tuple(rows),
    )


def metric_name(record: Record) -> str:
    """The metric and whatever its settings have that the papers' evaluations do not."""
    settings = record.settings
    if record.metric == "linear":
        return ", ".join(["linear", *unusual_settings(record)])
    words = [f"{settings['k']}-NN"]
    if settings["distance"] != "euclidean":
        words.append(str(settings["distance"]))
    if settings["normalize"]:
        words.append("normalized")
    if settings["features"] != "backbone":
        words.append(str(settings["features"]))
    return ", ".join([*words, *unusual_settings(record)])


def dataset_name(dataset: str) -> str:
    """As in the papers, "CIFAR-10" for "cifar10"; other names as they are."""
    return DATASETS.get(dataset, dataset)


def transfer_name(trained_on: str, evaluated_on: str) -> str:
    """The data set; both of them, where they differ."""
    names = dict.fromkeys((dataset_name(trained_on), dataset_name(evaluated_on)))
    return " → ".join(names)


def variant_name(variant: str) -> str:
    """As in the papers, "VICReg-Dual" for "vicreg_dual"; other methods' names as they are."""
    name, suffix = variant, ""
    for ending, words in (
        ("_no_invariance", "without invariance"),
        ("_two_encoders", "two encoders"),
    ):
        if name.endswith(ending):
            name, suffix = name.removesuffix(ending), f", {words}{suffix}"
    return _VARIANTS.get(name, name) + suffix
