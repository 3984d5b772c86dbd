"""The table at the end of a run: raw pixels, untrained, dense and gated encoder side by side."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..backbones import TwoPathResNet
from ..backbones.statistics import recalibrated
from ..texts import aligned, figure
from .extract import NonFiniteFeaturesError, extract
from .knn import knn_top1, knn_top1_few_labels

Row = dict[str, float | None]


def final_table(
    backbone: nn.Module,
    untrained: nn.Module,
    paths: tuple[str | None, ...],
    train: DataLoader,
    test: DataLoader,
    labels_per_class: int,
    draws: int,
    budgets: Sequence[float] = (),
    statistics: Iterable | None = None,
    start: str = "untrained",
) -> dict[str, Row]:
    """1-NN accuracy with all labels and with a few per class, and FLOPs per image.

    Args:
        backbone: the trained encoder.
        untrained: the same, as it was before training.
        paths: the paths that were trained; (None,) for a backbone with one path.
        train: labelled images for the neighbours, batches `[images, targets]`.
        test: images to classify.
        labels_per_class: labels of the second figure.
        draws: choices of labelled images over which it is averaged.
        budgets: that the gates of a backbone for a range are told, one after the other.
        statistics: batches `[images, targets]` from which each row's BatchNorm statistics are made
            anew; None for those of training.
        start: what the row of `untrained` is called.

    Returns:
        Rows "raw", `start`, "dense" and "gated" as far as they were trained, and "gated at 0.1"
        for a budget of 0.1. Each has `knn_top1`, `knn_top1_<n>_per_class`, `flops` and, on the
        gated path, `flops_cut` (1 − share). Accuracies are None without labels, or where features
        are infinite or NaN.
    """
    few = f"knn_top1_{labels_per_class}_per_class"

    def row(encode: Callable[[DataLoader], tuple[Tensor, Tensor, float | None]]) -> Row:
        figures: Row = {"knn_top1": None, few: None}
        try:
            train_set = encode(train)[:2]
            features, targets, flops = encode(test)
        except NonFiniteFeaturesError:
            return figures
        test_set = (features, targets)
        if (train_set[1] >= 0).any() and (targets >= 0).any():
            figures["knn_top1"] = knn_top1(train_set, test_set)
            figures[few] = knn_top1_few_labels(train_set, test_set, labels_per_class, draws)
        if flops is not None:
            figures["flops"] = flops
        return figures

    def encoder(net: nn.Module, path: str | None) -> Callable[[DataLoader], Any]:
        def encode(loader: DataLoader) -> tuple[Tensor, Tensor, float | None]:
            own = nullcontext() if statistics is None else recalibrated(net, statistics, path)
            with own:
                found = extract(net, loader, path)
            return found.features, found.targets, found.flops

        return encode

    table = {"raw": row(raw_pixels), start: row(encoder(untrained, paths[0] and "dense"))}
    for path in paths:
        table[path or "dense"] = row(encoder(backbone, path))
    if isinstance(backbone, TwoPathResNet) and budgets:
        before = backbone.budget
        for budget in budgets:
            backbone.budget = budget
            table[f"gated at {budget:g}"] = row(encoder(backbone, "gated"))
        backbone.budget = before
    whole = table[start].get("flops")
    for name, figures in table.items():
        used = figures.get("flops")
        if name.startswith("gated") and used is not None and whole:
            figures["flops_cut"] = 1 - used / whole
    return table


def raw_pixels(loader: DataLoader) -> tuple[Tensor, Tensor, None]:
    """The images themselves as features."""
    batches = list(loader)
    images = torch.cat([images.flatten(1) for images, _ in batches])
    return images, torch.cat([targets for _, targets in batches]), None


def format_table(table: dict[str, Row]) -> str:
    """The table as text, a row for each encoder."""
    few = next(key for key in table["raw"] if key.endswith("_per_class"))
    heading = f"{few.removeprefix('knn_top1_').removesuffix('_per_class')} labels per class"
    rows = [["1-NN accuracy, %", "all labels", heading, "FLOPs/image", "cut"]]
    for name, row in table.items():
        kinds = {"knn_top1": ".1f", few: ".1f", "flops": ".4g", "flops_cut": ".1%"}
        rows.append([name, *(figure(row.get(key), kind) for key, kind in kinds.items())])
    return "\n".join(aligned(rows))
