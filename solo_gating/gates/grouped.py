"""What gates that cut a convolution into groups have in common."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import is_int, shown
from ..errors import InputError


def check_divides(key: str, value: Any, *channels: int) -> None:
    """Refuse a number of groups, heads or the like that does not divide numbers of channels.

    Args:
        key: of `gate_kwargs`.
        value: the number.
        channels: the numbers of channels.

    Raises:
        InputError: naming the key.
    """
    if not is_int(value, 1) or any(number % value for number in channels):
        named = " and ".join(map(str, dict.fromkeys(channels)))
        raise InputError(
            f"gate_kwargs.{key}: got {shown(value)}, expected a divisor of a convolution's {named} "
            "channels"
        )


def grouped(conv: nn.Conv2d, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A convolution with another's stride, padding, dilation and bias, in groups.

    Args:
        conv: the other one.
        x: B × C × H × W.
        weight: C_out × C / groups × k × k.
        groups: how many.
    """
    padding: Any = conv.padding
    return F.conv2d(x, weight, conv.bias, conv.stride, padding, conv.dilation, groups)
