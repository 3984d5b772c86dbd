"""What torchvision's and solo-learn's transforms draw for an image, drawn for a batch.

On the host, whose generator gives the same numbers for every device, and where it is then known
how many images each operation concerns without asking the device.
"""

import math

import torch
from torch import Generator, Tensor

Range = tuple[float, float]

_ATTEMPTS = 10  # of torchvision, for a box that fits


def chosen(number: int, probability: float, generator: Generator) -> Tensor:
    """Booleans that are true with a probability."""
    return torch.rand(number, generator=generator) < probability


def uniform(shape: tuple[int, ...], interval: Range, generator: Generator) -> Tensor:
    """Numbers between two bounds."""
    low, high = interval
    return low + (high - low) * torch.rand(shape, generator=generator)


def orders(number: int, generator: Generator) -> Tensor:
    """A random order of ColorJitter's four operations for each image: number × 4."""
    return torch.rand((number, 4), generator=generator).argsort(dim=1)


def crop_boxes(
    number: int, image: tuple[int, int], scale: Range, ratio: Range, generator: Generator
) -> Tensor:
    """RandomResizedCrop's boxes: number × 4, top, left, height, width.

    Args:
        number: of images.
        image: their height and width.
        scale: shares of the area.
        ratio: width / height.
        generator: of the host.
    """
    height, width = image
    areas, ratios = _areas_and_ratios(number, image, scale, ratio, generator)
    heights, widths = (areas / ratios).sqrt().round(), (areas * ratios).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    found, (heights, widths) = _first(fits, heights, widths)
    boxes = _placed(heights, widths, image, generator)
    centre = torch.tensor(_centre(image, ratio), dtype=boxes.dtype)
    return torch.where(found[:, None], boxes, centre)


def erasing_boxes(
    number: int, image: tuple[int, int], scale: Range, ratio: Range, generator: Generator
) -> Tensor:
    """RandomErasing's boxes, arguments as of `crop_boxes`; of height 0 where none fits."""
    height, width = image
    areas, ratios = _areas_and_ratios(number, image, scale, ratio, generator)
    heights, widths = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    found, (heights, widths) = _first((heights < height) & (widths < width), heights, widths)
    return _placed(heights * found, widths, image, generator)


def affine_matrices(
    number: int,
    image: tuple[int, int],
    degrees: Range,
    translate: Range | None,
    scale: Range | None,
    shear: list[float] | None,
    generator: Generator,
) -> Tensor:
    """RandomAffine's matrices: number × 6, from a place in the result to one in the image.

    Args:
        number: of images.
        image: their height and width.
        degrees: of rotation.
        translate: largest shares of width and height, or None.
        scale: factors, or None.
        shear: degrees along x from, to, and if there are four along y, or None.
        generator: of the host.
    """
    height, width = image

    def draw(interval: Range) -> Tensor:
        return uniform((number,), interval, generator).double()

    angle = draw(degrees).deg2rad()
    across, down = translate or (0.0, 0.0)
    dx = draw((-across * width, across * width)).round()
    dy = draw((-down * height, down * height)).round()
    zoom = draw(scale or (1.0, 1.0))
    ranges = [*(shear or []), 0.0, 0.0, 0.0, 0.0]
    lean_x = draw((ranges[0], ranges[1])).deg2rad()
    lean_y = draw((ranges[2], ranges[3])).deg2rad()
    # Rotation · shear · scale, inverted (torchvision's `_get_inverse_affine_matrix`).
    a = (angle - lean_y).cos() / lean_y.cos()
    b = -a * lean_x.tan() - angle.sin()
    c = (angle - lean_y).sin() / lean_y.cos()
    d = -c * lean_x.tan() + angle.cos()
    a, b, c, d = (value / zoom for value in (d, -b, -c, a))
    x, y = width / 2, height / 2
    e, f = x - a * (x + dx) - b * (y + dy), y - c * (x + dx) - d * (y + dy)
    return torch.stack([a, b, e, c, d, f], dim=1).float()


def _areas_and_ratios(
    number: int, image: tuple[int, int], scale: Range, ratio: Range, generator: Generator
) -> tuple[Tensor, Tensor]:
    shape = (number, _ATTEMPTS)
    areas = image[0] * image[1] * uniform(shape, scale, generator)
    logarithms = uniform(shape, (math.log(ratio[0]), math.log(ratio[1])), generator)
    return areas, logarithms.exp()


def _first(fits: Tensor, *values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Whether any attempt fits, and the values of the first that does."""
    first = fits.int().argmax(dim=1, keepdim=True)
    return fits.any(dim=1), [value.gather(1, first)[:, 0] for value in values]


def _placed(
    heights: Tensor, widths: Tensor, image: tuple[int, int], generator: Generator
) -> Tensor:
    """Boxes of given sizes, each place being as likely."""
    shares = torch.rand((2, len(heights)), generator=generator)
    top = (shares[0] * (image[0] - heights + 1)).floor().clamp(min=0)
    left = (shares[1] * (image[1] - widths + 1)).floor().clamp(min=0)
    return torch.stack([top, left, heights, widths], dim=1)


def _centre(image: tuple[int, int], ratio: Range) -> list[int]:
    """Where no attempt fits: the largest box in the middle with a ratio nearest to the image's."""
    height, width = image
    if width / height < ratio[0]:
        height = round(width / ratio[0])
    elif width / height > ratio[1]:
        width = round(height * ratio[1])
    return [(image[0] - height) // 2, (image[1] - width) // 2, height, width]
