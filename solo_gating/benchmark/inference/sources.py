"""Where a benchmark's encoders and images come from: random ones, or a checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...checkpoints.encoder import encoder_of
from ...deploy.dense import dense_resnet
from ...deploy.engine.known import only_pytorch_runs
from ...errors import InputError
from ...evaluate.evaluation import images_of
from .cases import (
    GatedCase,
    Model,
    Network,
    gated_case,
    random_encoder,
    random_images,
    with_random_gates,
    with_threshold,
)

# On so many images static networks' channels are chosen, and networks are quantised.
_CALIBRATION = 64
_LARGEST_CIFAR = 64
# On so many others what rounding does to a trained encoder.
_REPORTED = 128
# Of random encoders, whose gates are also balanced on them, that many where images are larger: enough
# for random channels, and ResNet-50 at 224 pixels is ready in minutes.
_LARGE_BALANCED, _LARGE_QUANTISED = 16, 32

Batch = tuple[Network, tuple[GatedCase, ...]]


class RandomSource:
    """Untrained encoders with gates set to the densities.

    Args:
        backbone: one of `backbones.gated_backbones()`.
        width: of the first stage.
        stem: "cifar" or "imagenet"; None for cifar up to 64 pixels, and imagenet above.
        densities: shares of the channels.
        seed: of weights, gates and images.

    Attributes:
        description: of the network, for the report.
        images: which ones, in a word.
        resolutions: those used by default.
        has_static: as in `CheckpointSource`.
    """

    images = "random"
    resolutions = (32,)
    has_static = True

    def __init__(
        self, backbone: str, width: int, stem: str | None, densities: list[float], seed: int
    ):
        self._backbone, self._width, self._stem = backbone, width, stem
        self._densities, self._seed = densities, seed
        self.description = {
            "source": "random",
            "backbone": backbone,
            "width": width,
            "seed": seed,
        }

    def batches(self, resolution: int, sizes: list[int]) -> Iterator[Batch]:
        """The dense encoder and the gated ones, for each number of images."""
        small = resolution <= _LARGEST_CIFAR
        stem = self._stem or ("cifar" if small else "imagenet")
        balanced = _CALIBRATION if small else _LARGE_BALANCED
        quantised = _CALIBRATION if small else _LARGE_QUANTISED
        images = random_images(max(quantised, *sizes), resolution, self._seed)
        calibration = images[:quantised]
        backbone = random_encoder(self._backbone, self._width, stem, images[:balanced], self._seed)
        dense = Model(dense_resnet(backbone), calibration)
        for size in sizes:
            some = images[: max(balanced, size)]
            gated = []
            for density in self._densities:
                net = with_random_gates(backbone, some, size, density, self._seed)
                gated.append(gated_case(net, some, size, density, calibration))
            yield Network(dense, images[:size]), tuple(gated)

    def others(self, resolution: int) -> None:
        """As in `measure.Case`."""


class CheckpointSource:
    """A trained encoder, its threshold set to the densities.

    Args:
        checkpoint: of a gated encoder.
        densities: shares of the channels; none for the threshold that it has.
        overrides: `key=value` that name validation images; none for random ones.
        seed: of random images.

    Attributes:
        description: of the network, for the report.
        images: which ones, in a word.
        resolutions: those used by default: pre-training's crop size.
        has_static: whether smaller networks without the unused channels can be made.

    Raises:
        InputError: for a checkpoint that cannot be read or has no gates.
    """

    def __init__(self, checkpoint: Path, densities: list[float], overrides: list[str], seed: int):
        encoder = encoder_of(checkpoint, key="--checkpoint")
        encoder.paths("gated")
        kind: Any = encoder.backbone.gates[0]  # type: ignore[index]
        if only_pytorch_runs(encoder.backbone):
            raise InputError(
                f"--checkpoint: got gates of kind {kind.kind!r}, which no engine here makes faster than "
                "the dense path; expected kinds that choose channels"
            )
        self.has_static = kind.only_masks
        self._backbone = cast(Any, encoder.backbone)
        self._checkpoint, self._densities = checkpoint, densities
        self._overrides, self._seed = overrides, seed
        self.description = {
            "source": str(checkpoint),
            "backbone": encoder.args.backbone.name,
            "width": self._backbone.bn1.num_features,
            "threshold": self._backbone.threshold,
        }
        self.images = "validation" if overrides else "random"
        self.resolutions = (encoder.crop_size,)

    def batches(self, resolution: int, sizes: list[int]) -> Iterator[Batch]:
        """The dense encoder and the gated ones, for each number of images.

        Raises:
            InputError: for data that cannot be used, or too few images.
        """
        images = self._images(resolution, max(sizes))
        dense = Model(dense_resnet(self._backbone), images[:_CALIBRATION])
        wanted: list[float | None] = [*self._densities] or [None]
        for size in sizes:
            some, first = images[: max(_CALIBRATION, size)], images[:size]
            gated = tuple(
                gated_case(
                    with_threshold(self._backbone, first, density),
                    some,
                    size,
                    density,
                    images[:_CALIBRATION],
                )
                for density in wanted
            )
            yield Network(dense, first), gated

    def others(self, resolution: int) -> Tensor | None:
        """As in `measure.Case`: validation images that nothing is calibrated on, if there are any."""
        if not self._overrides:
            return None
        images = self._validation(resolution, 0, _CALIBRATION + _REPORTED)[_CALIBRATION:]
        return images if len(images) else None

    def _images(self, resolution: int, least: int) -> Tensor:
        number = max(_CALIBRATION, least)
        if not self._overrides:
            return random_images(number, resolution, self._seed)
        return self._validation(resolution, least, number)

    def _validation(self, resolution: int, least: int, number: int) -> Tensor:
        """Validation images in an order that mixes their classes, always the same one."""
        overrides = [f"crop_size={resolution}", *self._overrides]
        dataset: Any = images_of(self._checkpoint, overrides, "val")
        if len(dataset) < least:
            raise InputError(f"batch: got {least}, there are {len(dataset)} validation images")
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        return torch.stack([dataset[index][0] for index in order[:number].tolist()])
