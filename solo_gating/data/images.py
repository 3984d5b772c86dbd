"""One image, from whatever Pillow reads to 8-bit RGB."""

from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import InputError

_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
# Formats that hold at most 16 bits, unsigned; Pillow's mode for those is "I" in some versions.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
_TIFF_BITS, _TIFF_INTERPRETATION, _TIFF_WHITE_IS_ZERO = 258, 262, 0


class ImageFileError(InputError):
    """An image that cannot be used; its message is one sentence that names the file.

    It stays that sentence where a worker of a DataLoader raises it: PyTorch builds it anew in the
    main process, from a whole stack trace whose last line is the sentence.
    """

    def __init__(self, sentence: str):
        super().__init__(sentence.rstrip().rsplit(f"{type(self).__name__}: ", 1)[-1])


class DamagedImageError(ImageFileError):
    """An image that cannot be read, which `data.on_damaged: skip` leaves out."""

    def __init__(self, sentence: str):
        advice = "; data.on_damaged=skip leaves such images out"
        super().__init__(sentence.rstrip().removesuffix(advice) + advice)


def read_image(source: str | BinaryIO, name: str) -> Image.Image:
    """Read an image as 8-bit RGB.

    Grey levels of 16 bits are divided by 257, so that black stays black and white white; channels
    of 16 bits are reduced to 8 by Pillow. Transparency is dropped.

    Args:
        source: a file.
        name: key and name, with which messages begin.

    Raises:
        DamagedImageError: for what cannot be read.
        ImageFileError: for levels whose black and white nobody knows (32 bits, signed, floats).
    """
    try:
        with Image.open(source) as image:
            image.load()
            levels = _highest_level(image)
            if levels == 255:
                return _rgb(image)
            if levels is not None:
                return _eight_bits(image, levels).convert("RGB")
            mode, kind = image.mode, image.format
    except UnidentifiedImageError as error:
        raise DamagedImageError(f"{name} is no image of a format that is known") from error
    except Exception as error:  # Pillow's readers raise of every kind at what is damaged
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        raise DamagedImageError(f"{name} cannot be read as an image ({reason})") from error
    raise ImageFileError(
        f"{name} is an image of mode {mode} ({kind}), whose black and white are not defined, "
        "expected 8 bits, and unsigned 16 bits"
    )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # or Pillow warns; the colours are the same
    return image.convert("RGB")


def _highest_level(image: Image.Image) -> int | None:
    """The level of white; None where nothing says it."""
    if image.mode in _WIDE_MODES:
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, (16,))
        return 2 ** int(bits[0]) - 1
    if image.mode == "I":
        return 65535 if image.format in _SIXTEEN_BIT_FORMATS else None
    return None if image.mode == "F" else 255


def _eight_bits(image: Image.Image, highest: int) -> Image.Image:
    levels = np.asarray(image).astype(np.int64).clip(0, highest)
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_TIFF_INTERPRETATION) == _TIFF_WHITE_IS_ZERO:  # Pillow heeds it with 8 bits only
        levels = highest - levels
    return Image.fromarray(((levels * 255 + highest // 2) // highest).astype(np.uint8))
