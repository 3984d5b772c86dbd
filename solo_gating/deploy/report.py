"""What rounding weights and activations did to an encoder, on given images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from solo_gating_runtime.network import Network

from ..errors import InputError
from ..texts import aligned, figure
from .masked import MaskedNetwork

# Distances between so many pairs of images at a time.
_PAIRS = 5_000_000


class Rounded(Protocol):
    """An encoder with rounded weights, as `compile` gives it."""

    threshold: float
    budget: float | None

    def features_and_masks(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features, B × F, and for each gate a mask, B × channels, bool."""


@dataclass(frozen=True)
class Origin:
    """What an encoder with rounded weights was made of.

    Attributes:
        networks: the paths that the backbone has, in float32.
        rounded: makes a path with rounded weights of one in float32.
        calibration_images: how many `rounded` makes scales of; None for bfloat16.
    """

    networks: tuple[Network, ...]
    rounded: Callable[[Network], Network]
    calibration_images: int | None


@dataclass(frozen=True)
class PathReport:
    """Of one path. Shares are numbers from 0 to 1.

    Attributes:
        path: "gated" or "dense".
        flipped: share of all decisions, one for each channel and image, that differ from those in
            float32; None on the dense path, as `images_with_flip`.
        images_with_flip: share of the images with such a decision.
        feature_error: ‖features − those in float32‖ / ‖those in float32‖, over all images.
        same_masks_error: the same, where float32 computes the channels that were computed here.
        density_float: share of the channels that are computed in float32, and
        density: ... here.
        knn_top1_float: 1-NN accuracy in percent, in float32, and
        knn_top1: ... here; None without labels.
    """

    path: str
    flipped: float | None
    images_with_flip: float | None
    feature_error: float
    same_masks_error: float
    density_float: float
    density: float
    knn_top1_float: float | None = None
    knn_top1: float | None = None


@dataclass(frozen=True)
class Report:
    """What rounding did; `print` shows it as a table.

    Attributes:
        dtype: "int8" or "bfloat16".
        images: on how many.
        calibration_images: from how many the scales are; None for bfloat16.
        paths: the gated one first.
    """

    dtype: str
    images: int
    calibration_images: int | None
    paths: tuple[PathReport, ...]

    @classmethod
    def of(cls, figures: dict[str, Any]) -> "Report":
        """The report that `dataclasses.asdict` made these figures of."""
        return cls(**figures | {"paths": tuple(PathReport(**path) for path in figures["paths"])})

    def __str__(self) -> str:
        """A table, a row for each path."""
        scales = f", scales from {self.calibration_images}" * (self.calibration_images is not None)
        rows = [
            [
                "float32 → " + self.dtype,
                "gates that flip, %",
                "in images, %",
                "feature error, %",
                "same masks, %",
                "channels computed, %",
                "1-NN, %",
            ]
        ]
        for path in self.paths:
            row = [
                path.path,
                _percent(path.flipped, ".2f"),
                _percent(path.images_with_flip, ".1f"),
                _percent(path.feature_error, ".2f"),
                _percent(path.same_masks_error, ".2f"),
                f"{_percent(path.density_float, '.1f')} → {_percent(path.density, '.1f')}",
            ]
            if path.knn_top1 is not None:
                before, after = (figure(v, ".1f") for v in (path.knn_top1_float, path.knn_top1))
                row.append(f"{before} → {after}")
            rows.append(row)
        if all(path.knn_top1 is None for path in self.paths):
            rows[0].pop()
        return "\n".join([f"{self.images} images{scales}", *aligned(rows)])


def _percent(share: float | None, kind: str) -> str:
    return figure(None if share is None else 100 * share, kind)


@torch.no_grad()
def path_report(
    net: Network, rounded: Rounded, images: Tensor, labels: Tensor | None = None
) -> PathReport:
    """Compare one path with the same one in float32.

    Args:
        net: the path with float32 weights.
        rounded: the path that was made of it.
        images: N × C × H × W, float32.
        labels: N, integers; negative for an image without one, which is left out of 1-NN: each image
            then has the label of the nearest of all others. None for no such accuracy.

    Raises:
        InputError: for no images, or some with NaN or infinity.
    """
    if not len(images):
        raise InputError("images: got none, expected at least one")
    if not images.isfinite().all():
        raise InputError("images: got NaN or infinity, expected finite pixels")
    network, setting = MaskedNetwork(net), (rounded.threshold, rounded.budget)
    exact, expected = network.run(images, *setting)
    found, masks = rounded.features_and_masks(images)
    same, _ = network.run(images, *setting, masks=masks)
    before, after = torch.cat(expected, dim=1), torch.cat(masks, dim=1)
    flips = before != after
    gated = any(block.gates for block in net.blocks)
    return PathReport(
        path=net.path,
        flipped=float(flips.double().mean()) if gated else None,
        images_with_flip=float(flips.any(dim=1).double().mean()) if gated else None,
        feature_error=_relative(found, exact),
        same_masks_error=_relative(found, same),
        density_float=float(before.double().mean()),
        density=float(after.double().mean()),
        knn_top1_float=None if labels is None else _leave_one_out(exact, labels),
        knn_top1=None if labels is None else _leave_one_out(found, labels),
    )


def _relative(found: Tensor, expected: Tensor) -> float:
    norm = expected.double().norm()
    return float((found.double() - expected.double()).norm() / norm) if norm else 0.0


def _leave_one_out(features: Tensor, labels: Tensor) -> float:
    """Percentage of the images whose nearest other image has their label."""
    known = labels >= 0
    features, labels = features[known].double(), labels[known]
    hits = 0
    step = max(1, _PAIRS // max(1, len(features)))
    for begin in range(0, len(features), step):
        distances = torch.cdist(features[begin : begin + step], features)
        rows = torch.arange(len(distances))
        distances[rows, rows + begin] = torch.inf
        hits += int((labels[distances.argmin(dim=1)] == labels[begin : begin + step]).sum())
    return 100 * hits / len(features) if len(features) > 1 else torch.nan


def checked_labels(labels: Sequence[int] | Tensor | None, images: Tensor) -> Tensor | None:
    """Labels as integers, one for each image.

    Raises:
        InputError: for another number of them, or something else.
    """
    if labels is None:
        return None
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels: got {type(labels).__name__}, expected integers") from error
    if found.shape != (len(images),) or found.is_floating_point():
        raise InputError(
            f"labels: got {str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}, "
            f"expected {len(images)} integers"
        )
    return found.long()
