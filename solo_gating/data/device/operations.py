"""Pillow's image operations for whole batches, on any device, with parameters for each image.

Images are float32, B × 3 × height × width, and hold whole levels from 0 to 255; so do results.
Each function does Pillow's arithmetic, its rounding included. Nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
from kornia.color import hsv_to_rgb, rgb_to_hsv
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import functional as tv

_TURN = 2 * torch.pi
# A quotient of levels that is a whole number may come out a little below it.
_SLACK = 1e-3
_BLUR_PASSES = 3


def resized_crop(
    images: Tensor, boxes: Tensor, size: tuple[int, int], mirrored: Tensor | None = None
) -> Tensor:
    """Cut a box out of each image and resize it: bicubic, antialiased, columns before rows.

    Args:
        images: levels.
        boxes: B × 4: top, left, height, width in whole pixels.
        size: height and width of the result.
        mirrored: B, 1 for what is to be flipped horizontally, else 0.
    """
    top, left, height, width = boxes.unbind(1)
    columns = _resampling(left, width, images.shape[3], size[1])
    if mirrored is not None:
        columns = torch.where(mirrored.bool()[:, None, None], columns.flip(1), columns)
    rows = _resampling(top, height, images.shape[2], size[0])
    return _rounded(rows[:, None] @ _rounded(images @ columns[:, None].mT))


def _resampling(start: Tensor, length: Tensor, before: int, after: int) -> Tensor:
    """B × after × before: the weight of each pixel in each new one (Pillow's Resample.c)."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / after
    centre = (torch.arange(after, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(before, device=start.device) - start
    weight = _cubic((pixel + 0.5 - centre) / scale.clamp(min=1))
    weight = weight * ((pixel >= 0) & (pixel < length))
    return weight / weight.sum(2, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Move each image: bilinear, black where it has no pixel.

    Args:
        images: levels.
        matrices: B × 6, from a place in the result to a place in the image, in pixels
            (as `Image.transform` with `AFFINE` takes them).
    """
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    x = torch.arange(width, device=images.device) + 0.5
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    x, y = a * x + b * y + c, d * x + e * y + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=3)
    found = grid_sample(images, grid, padding_mode="border", align_corners=False)
    return (found + _SLACK).floor() * inside[:, None]


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Mix with black.

    Args:
        images: levels.
        factors: B; 1 changes nothing.
    """
    return (images * _each(factors)).floor().clamp(max=255)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Mix with the mean of the grey image; arguments as of `brightness`."""
    mean = (luma(images).mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _mixed(mean, images, factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Mix with the grey image; arguments as of `brightness`."""
    return _mixed(luma(images), images, factors)


def hue(images: Tensor, factors: Tensor) -> Tensor:
    """Turn the hue, which like saturation and value is held in 8 bits meanwhile.

    Args:
        images: levels.
        factors: B, in turns.
    """
    angle, share, value = rgb_to_hsv(images / 255).unbind(1)
    angle = (angle * (255 / _TURN) + _SLACK).floor()
    angle = (angle + (factors * 255).trunc()[:, None, None]) % 256
    share = (share * 255 + _SLACK).floor() / 255
    return _rounded(hsv_to_rgb(torch.stack([angle * (_TURN / 255), share, value], dim=1)) * 255)


def grey(images: Tensor) -> Tensor:
    """The grey image, in three channels."""
    return luma(images).expand_as(images)


def luma(images: Tensor) -> Tensor:
    """B × 1 × height × width: the grey image."""
    red, green, blue = images.split(1, dim=1)
    # Whole numbers below 2²⁴: exact.
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor()


def blur(images: Tensor, sigmas: Tensor, largest: float) -> Tensor:
    """Pillow's Gaussian blur: three box blurs of a width that need not be whole.

    Pillow rounds after each of the three, this after all of them.

    Args:
        images: levels.
        sigmas: B, in pixels.
        largest: at least every sigma.
    """
    rows, columns = (_blurring(sigmas, n, largest) for n in images.shape[2:])
    return _rounded(rows[:, None] @ _rounded(images @ columns[:, None].mT))


def _blurring(sigmas: Tensor, pixels: int, largest: float) -> Tensor:
    """B × pixels × pixels: the weight of each pixel in each new one (Pillow's BoxBlur.c)."""
    radius = _box_radius(sigmas)
    reach = int(_box_radius(torch.tensor([largest]))) + 1
    whole, width = radius.floor()[:, None], 2 * radius[:, None] + 1
    offset = torch.arange(-reach, reach + 1, device=sigmas.device)
    edge = (width - (2 * whole + 1)) / 2
    weight = torch.where(offset.abs() <= whole, 1.0, (offset.abs() == whole + 1) * edge) / width
    place = torch.arange(pixels, device=sigmas.device)
    source = (place + offset[:, None]).clamp(0, pixels - 1)
    shifts = (source[:, :, None] == place).to(weight.dtype)  # offsets × pixels × pixels
    box = (weight @ shifts.flatten(1)).view(-1, pixels, pixels)
    return torch.linalg.matrix_power(box, _BLUR_PASSES)


def _box_radius(sigmas: Tensor) -> Tensor:
    variance = sigmas**2 / _BLUR_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    above = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + above / (6 * (variance - (whole + 1) ** 2))


def solarised(images: Tensor) -> Tensor:
    """Levels from 128 on are inverted."""
    return torch.where(images < 128, images, 255 - images)


def equalised(images: Tensor) -> Tensor:
    """Each channel with a histogram as even as can be."""
    return tv.equalize(images.to(torch.uint8)).to(images.dtype)


def erased(images: Tensor, boxes: Tensor) -> Tensor:
    """Zeros in one box of each image (of any values).

    Args:
        images: B × 3 × height × width.
        boxes: B × 4: top, left, height, width in pixels.
    """
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    top, left, height, width = boxes[:, :, None, None].unbind(1)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return images.masked_fill(inside[:, None], 0.0)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(levels / 255 - mean) / std, a new tensor."""
    images = images / 255
    for channel, (centre, width) in enumerate(zip(mean, std, strict=True)):
        images[:, channel].sub_(centre).div_(width)  # plain numbers: nothing is sent to the device
    return images


def _mixed(other: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    return (other + _each(factors) * (images - other)).floor().clamp(0, 255)


def _each(factors: Tensor) -> Tensor:
    return factors[:, None, None, None]


def _rounded(images: Tensor) -> Tensor:
    return (images + 0.5).floor().clamp(0, 255)
