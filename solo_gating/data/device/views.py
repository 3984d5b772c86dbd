"""One entry of `augmentations`, for batches of images on a device."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Generator, Tensor
from torchvision import transforms

from ...transfer import send
from ..augmentations import view_transform
from . import operations, parameters

_BLUR = (0.1, 2.0)  # solo-learn's sigmas
# In the order that torchvision's ColorJitter numbers them.
_JITTER = (operations.brightness, operations.contrast, operations.saturation, operations.hue)
_NO_JITTER = len(_JITTER)


@dataclass(frozen=True)
class Draws:
    """Random parameters of one view of B images.

    Attributes:
        matrices: B × 6 of the affine map.
        boxes: B × 4, of the crop: top, left, height, width.
        mirrored: B, 0 or 1.
        jitter: B × 4, numbers of the operations in their order; 4 for none.
        factors: B × 4, of brightness, contrast, saturation, hue.
        grey, blurred, solarised, equalised: B, booleans.
        sigmas: B, of the blur.
        erased: B, booleans; holes: B × 4, boxes as above, in the view.
    """

    matrices: Tensor
    boxes: Tensor
    mirrored: Tensor
    jitter: Tensor
    factors: Tensor
    grey: Tensor
    blurred: Tensor
    sigmas: Tensor
    solarised: Tensor
    equalised: Tensor
    erased: Tensor
    holes: Tensor


class DeviceView:
    """The transforms that `augmentations.view_transform` makes of an entry, in batches.

    Every setting is read from those transforms, so that there is one reading of the config.

    Args:
        dataset: the data set's name.
        view: an entry of `augmentations`, complete.
    """

    def __init__(self, dataset: str, view: DictConfig):
        steps = [_unwrapped(step) for step in view_transform(dataset, view).transforms]
        found = {type(step): (step, share) for step, share in steps}
        self.crop = _get(found, transforms.RandomResizedCrop)[0]
        self.size = int(view.crop_size)
        self.jitter, self.jitter_share = _get(found, transforms.ColorJitter)
        self.affine = _get(found, transforms.RandomAffine)[0]
        self.erasing, self.erasing_share = _get(found, transforms.RandomErasing)
        self.grey_share = _get(found, transforms.RandomGrayscale)[1]
        self.flip_share = _get(found, transforms.RandomHorizontalFlip)[1]
        self.blur_share = float(view.gaussian_blur.prob)
        self.solarise_share = float(view.solarization.prob)
        self.equalise_share = float(view.equalization.prob)
        normalise = _get(found, transforms.Normalize)[0]
        self.mean, self.std = normalise.mean, normalise.std

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Views with parameters of their own.

        Args:
            images: uint8 levels, B × 3 × height × width.
            generator: of the host.

        Returns:
            float32, normalised.
        """
        return self.apply(images, self.draw(len(images), _size(images), generator))

    def draw(self, number: int, image: tuple[int, int], generator: Generator) -> Draws:
        """Parameters for a number of images of a height and width, on the host."""

        def some(share: float) -> Tensor:
            return parameters.chosen(number, share, generator)

        out = self.view_size(image)
        ranges = [
            getattr(self.jitter, name, None)
            for name in ("brightness", "contrast", "saturation", "hue")
        ]
        order = parameters.orders(number, generator)
        absent = torch.tensor([interval is None for interval in ranges])[order]
        skipped = absent | ~some(self.jitter_share)[:, None]
        factors = [
            parameters.uniform((number,), interval or (1.0, 1.0), generator) for interval in ranges
        ]
        return Draws(
            matrices=self._matrices(number, image, generator),
            boxes=self._boxes(number, image, generator),
            mirrored=some(self.flip_share),
            jitter=order.masked_fill(skipped, _NO_JITTER),
            factors=torch.stack(factors, dim=1),
            grey=some(self.grey_share),
            blurred=some(self.blur_share),
            sigmas=parameters.uniform((number,), _BLUR, generator),
            solarised=some(self.solarise_share),
            equalised=some(self.equalise_share),
            erased=some(self.erasing_share),
            holes=self._holes(number, out, generator),
        )

    def view_size(self, image: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the view of an image: a crop is square, else the shorter side counts."""
        if self.crop is not None:
            return self.size, self.size
        shorter = min(image)
        height, width = (int(self.size * side / shorter) for side in image)
        return height, width

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Views with given parameters: `images` as in `__call__`, on any device."""
        groups = _Groups(draws, images.device)
        floats = groups.floats
        images = images.float()
        if self.affine is not None:
            images = operations.affine(images, floats["matrices"])
        size = self.view_size(_size(images))
        if self.crop is not None or size != _size(images) or self.flip_share:
            images = operations.resized_crop(images, floats["boxes"], size, floats["mirrored"])
        if self.jitter is not None:
            for position in range(len(_JITTER)):
                for number, change in enumerate(_JITTER):
                    factors = floats["factors"][:, number]
                    rows = groups.rows(f"jitter{position}", number)
                    images = _changed(images, rows, change, factors)
        images = _changed(images, groups.rows("grey"), operations.grey)
        rows = groups.rows("blurred")
        images = _changed(images, rows, _blur, floats["sigmas"])
        images = _changed(images, groups.rows("solarised"), operations.solarised)
        images = _changed(images, groups.rows("equalised"), operations.equalised)
        images = operations.normalised(images, self.mean, self.std)
        return _changed(images, groups.rows("erased"), operations.erased, floats["holes"])

    def _boxes(self, number: int, image: tuple[int, int], generator: Generator) -> Tensor:
        if self.crop is None:
            return torch.tensor([[0.0, 0.0, *image]]).expand(number, 4)
        scale, ratio = tuple(self.crop.scale), tuple(self.crop.ratio)
        return parameters.crop_boxes(number, image, scale, ratio, generator)

    def _holes(self, number: int, image: tuple[int, int], generator: Generator) -> Tensor:
        if self.erasing is None:
            return torch.zeros(number, 4)
        scale, ratio = tuple(self.erasing.scale), tuple(self.erasing.ratio)
        return parameters.erasing_boxes(number, image, scale, ratio, generator)

    def _matrices(self, number: int, image: tuple[int, int], generator: Generator) -> Tensor:
        if self.affine is None:
            return torch.zeros(number, 6)
        move = self.affine
        return parameters.affine_matrices(
            number, image, move.degrees, move.translate, move.scale, move.shear, generator
        )


class _Groups:
    """Which images each operation concerns, on the device, and every number that it needs.

    All of it is sent in two transfers that nobody waits for.
    """

    def __init__(self, draws: Draws, device: torch.device):
        values = {field.name: getattr(draws, field.name) for field in fields(draws)}
        keys = {name: value.int() for name, value in values.items() if value.dtype == torch.bool}
        jitter = values.pop("jitter")
        keys |= {f"jitter{position}": jitter[:, position] for position in range(jitter.shape[1])}
        wide = {name: v.float().view(len(v), -1) for name, v in values.items()}
        table = send(torch.cat(list(wide.values()), dim=1), device)
        parts = table.split([value.shape[1] for value in wide.values()], dim=1)
        self.floats = {
            name: part if part.shape[1] > 1 else part[:, 0]
            for name, part in zip(wide, parts, strict=True)
        }
        numbers = torch.stack([key.long() for key in keys.values()])
        self._order = dict(zip(keys, send(numbers.argsort(dim=1), device), strict=True))
        self._ends = {name: _ends(row) for name, row in zip(keys, numbers, strict=True)}

    def rows(self, name: str, value: int = 1) -> Tensor:
        """Indices of the images for which that key has that value."""
        ends = self._ends[name]
        return self._order[name][ends[value] : ends[value + 1]]


def _ends(row: Tensor) -> list[int]:
    """Of a row of small whole numbers, where each number begins when they are sorted."""
    return [0, *row.bincount(minlength=_NO_JITTER + 1).cumsum(0).tolist()]


def _changed(
    images: Tensor, rows: Tensor, change: Callable[..., Tensor], *arguments: Tensor
) -> Tensor:
    """Change some of the images, in place."""
    if len(rows) == 0:
        return images
    some = (tensor.index_select(0, rows) for tensor in (images, *arguments))
    return images.index_copy_(0, rows, change(*some))


def _blur(images: Tensor, sigmas: Tensor) -> Tensor:
    return operations.blur(images, sigmas, _BLUR[1])


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _unwrapped(step: Any) -> tuple[Any, float]:
    """A transform, and how probable it is."""
    if isinstance(step, transforms.RandomApply):
        (inner,) = step.transforms
        return inner, step.p
    return step, getattr(step, "p", 1.0)


def _get(found: dict[type, tuple[Any, float]], kind: type) -> tuple[Any, float]:
    return found.get(kind, (None, 0.0))
