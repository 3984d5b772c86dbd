"""Published and measured figures in one form, so that a table can hold both."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .records import PATHS, Record

# Images of the whole data sets, training and test: what an evaluation of all of them uses. Lists of
# 100 ImageNet classes differ; the smallest in common use has 126,689 training images.
_ALL_IMAGES = {
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "stl10": (5_000, 8_000),
    "imagenet100": (126_689, 5_000),
}


@dataclass(frozen=True)
class Cell:
    """What is known of one path of one method, trained in one way, in one evaluation.

    Attributes:
        trained_on: data set of pre-training.
        evaluated_on: data set of the evaluation.
        variant: the method, see `Record.variant`.
        target_budget: t_d; None for a method without gates.
        path: "dense" or "gated".
        metric: as `Record.published_metric`.
        source: "published (500 epochs)", "measured (5 epochs, width 16)": cells with the same
            source may stand in one row.
        value: top-1 accuracy in percent; the mean, of several runs.
        std: over runs if there are several, otherwise over the linear classifiers of one.
        flops: per image.
        flops_cut: 1 − share of the dense FLOPs.
        runs: pre-trainings that differ in nothing but the seed.
        order: sorts the measured sources of a table; empty for published figures.
        images: which images, where the data set's name does not tell ("custom").
    """

    trained_on: str
    evaluated_on: str
    variant: str
    target_budget: float | None
    path: str
    metric: str
    source: str
    value: float
    std: float | None = None
    flops: float | None = None
    flops_cut: float | None = None
    runs: int = 1
    order: tuple[float, ...] = ()
    images: str = ""

    @property
    def measured(self) -> bool:
        """Whether it comes from a run rather than from a paper."""
        return bool(self.order)


@dataclass(frozen=True)
class PublishedTable:
    """A table of a paper.

    Attributes:
        identity: names the table in `published.json` and to the layouts.
        title: with the paper and the table's number.
        notes: citation, settings, and where the paper contradicts itself.
        metric: as `Record.published_metric`.
        cells: its figures.
    """

    identity: str
    title: str
    notes: tuple[str, ...]
    metric: str
    cells: tuple[Cell, ...]


def published_tables() -> list[PublishedTable]:
    """The tables in `published.json`, in its order."""
    content = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    tables = []
    for table in content["tables"]:
        paper = content["papers"][table["paper"]]
        source = table.get("source") or f"published ({paper['epochs']} epochs)"
        tables.append(
            PublishedTable(
                identity=table["id"],
                title=f"{paper['short']}, Table {table['number']}: {table['title']}",
                notes=(
                    f"{paper['citation']}.",
                    f"Published: {paper['pretraining']}; {table['evaluation']}.",
                    *table.get("notes", ()),
                    *(f"The paper contradicts itself: {comment}" for comment in table["comments"]),
                ),
                metric=table["metric"],
                cells=tuple(
                    Cell(
                        trained_on=cell["dataset"],
                        evaluated_on=cell.get("to", cell["dataset"]),
                        variant=cell["method"],
                        target_budget=cell["target_budget"],
                        path=cell["path"],
                        metric=table["metric"],
                        source=source,
                        value=cell["value"],
                        std=cell.get("std"),
                        flops=cell.get("flops"),
                        flops_cut=cell.get("flops_cut"),
                    )
                    for cell in table["cells"]
                ),
            )
        )
    return tables


def measured_cells(records: Iterable[Record]) -> list[Cell]:
    """Records as cells: those that differ in nothing but the seed become one, with mean and std.

    Everything else that differs is kept apart, and the cells' `source` says what it is. Runs of
    the same seed are not averaged either: they differ in something that their files do not say.

    Args:
        records: kNN records with other settings than the papers' are left out.
    """
    alike: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.published_metric is not None:
            key = [_place(record), _conditions(record), _run(record)]
            alike[json.dumps(key, sort_keys=True)].append(record)
    groups: list[tuple[list[Record], str]] = []
    for group in alike.values():
        paths = [[r for r in group if r.path == path] for path in PATHS]
        if all(len({r.pretraining.get("seed") for r in rs}) == len(rs) for rs in paths):
            groups += [(rs, "") for rs in paths if rs]
        else:
            groups += [([record], str(record.file.parent)) for record in group]
    return _with_sources(groups)


def _place(record: Record) -> tuple[Any, ...]:
    """Where a table has it, but for the path."""
    return (
        record.published_metric,
        record.pretraining["dataset"],
        record.data["dataset"],
        record.variant,
        record.target_budget,
    )


def _conditions(record: Record) -> dict[str, Any]:
    """What must be the same for figures of different methods in one row."""
    data = {key: value for key, value in record.data.items() if key != "dataset"}
    length = {key: record.pretraining[key] for key in ("epochs", "width")}
    settings = {key: value for key, value in record.settings.items() if key != "budget"}
    return _flat(length | {"images": data, record.metric: settings})


def _run(record: Record) -> dict[str, Any]:
    """What else must be the same for runs to be averaged."""
    placed = ("method", "dataset", "target_budget", "epochs", "width", "backbone")
    free = ("seed", "checkpoint")
    return _flat({k: v for k, v in record.pretraining.items() if k not in (*placed, *free)})


def _with_sources(groups: Sequence[tuple[list[Record], str]]) -> list[Cell]:
    # A source is a short description; where that is the same for figures that differ, what differs
    # is added: of the conditions among all methods, of the run among those in the same place.
    conditions: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    runs: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    described = []
    for group, folder in groups:
        first, place = group[0], _place(group[0])
        condition, run = _conditions(first), _run(first) | ({"folder": folder} if folder else {})
        in_conditions = (*place[:3], _short_source(first))
        in_runs = (place, json.dumps(condition, sort_keys=True))
        conditions[in_conditions].append(condition)
        runs[in_runs].append(run)
        described.append((group, condition, run, in_conditions, in_runs))
    cells = []
    for group, condition, run, in_conditions, in_runs in described:
        words = [
            _short_source(group[0]),
            *_differences(condition, conditions[in_conditions]),
            *_differences(run, runs[in_runs]),
        ]
        cells.append(replace(_average(group), source=f"measured ({', '.join(words)})"))
    return cells


def _short_source(record: Record) -> str:
    epochs = record.pretraining["epochs"]
    words = [
        f"{epochs:,} epoch{'' if epochs == 1 else 's'}",
        f"width {record.pretraining['width']}",
    ]
    every = _ALL_IMAGES.get(record.data["dataset"], (0, 0))
    counts = [record.data.get(key) for key in ("train_images", "val_images")]
    fewer = [
        f"{count:,} {split}"
        for count, whole, split in zip(counts, every, ("training", "test"), strict=True)
        if count is not None and count < whole
    ]
    if fewer:
        words.append(f"{' and '.join(fewer)} images")
    return ", ".join([*words, *unusual_settings(record)])


def unusual_settings(record: Record) -> list[str]:
    """In words, what a linear evaluation does otherwise than the papers; the gates' threshold.

    Args:
        record: of any evaluation.
    """
    words = []
    if record.metric == "linear":
        if (epochs := record.settings.get("epochs", 100)) != 100:
            words.append(f"classifier {epochs} epochs")
        if record.settings.get("augment") is False:
            words.append("classifier without augmentation")
    if record.settings["threshold"] != 0:
        words.append(f"gates' threshold {record.settings['threshold']}")
    if images := record.settings.get("recalibrate"):
        words.append(f"statistics of {images:,} images")
    if (precision := record.settings.get("precision", "32-true")) != "32-true":
        words.append(f"precision {precision}")
    return words


def _differences(one: dict[str, Any], others: list[dict[str, Any]]) -> list[str]:
    keys = [
        key
        for key in sorted({key for other in others for key in other})
        if any(other.get(key) != one.get(key) for other in others)
    ]
    return [f"{key}={one.get(key)}" for key in keys]


def _average(group: list[Record]) -> Cell:
    first = group[0]
    metric, trained_on, evaluated_on, variant, target_budget = _place(first)
    values = [record.value for record in group]
    return Cell(
        trained_on=trained_on,
        evaluated_on=evaluated_on,
        variant=variant,
        target_budget=target_budget,
        path=first.path,
        metric=metric,
        source="",
        value=float(np.mean(values)),
        # Of a sample, as the linear evaluation's own.
        std=float(np.std(values, ddof=1)) if len(values) > 1 else first.std,
        flops=_mean(record.flops for record in group),
        flops_cut=_mean(record.flops_cut for record in group),
        runs=len(group),
        order=(first.pretraining["epochs"], first.pretraining["width"]),
        images=f"{first.images} images" if "custom" in (trained_on, evaluated_on) else "",
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else float(np.mean(known))  # type: ignore[arg-type]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
