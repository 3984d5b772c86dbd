"""The backbones, and their names in solo-learn's registry.

| name | paths | what it is |
|---|---|---|
| `resnet18_gated`, `resnet34_gated` | dense, gated | one encoder; gates choose its channels |
| `resnet18_two_encoders`, `resnet34_two_encoders` | dense, gated | a dense and a gated one |
| `resnet18_plain`, `resnet34_plain` | dense | torchvision's, with `width` and `stem` |

The names start with `resnet` because solo-learn removes `fc` and reads `inplanes` for those.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from .gated_resnet import GatedBasicBlock, GatedResNet, TwoEncoderResNet, TwoPathResNet
from .paths import PATHS, ForwardPass, checked_path
from .resnet import ResNet
from .sliced_resnet import SlicedResNet

_DEPTHS = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}
_KINDS: dict[str, type[ResNet]] = {
    "gated": GatedResNet,
    "two_encoders": TwoEncoderResNet,
    "plain": ResNet,
}


def _build(
    cls: type[ResNet], layers: list[int], method: str | None = None, **kwargs: Any
) -> ResNet:
    """Build a backbone as solo-learn's registry does: `factory(method, **backbone.kwargs)`."""
    return cls(layers, **kwargs)


BACKBONES: dict[str, Callable[..., ResNet]] = {
    f"{depth}_{kind}": partial(_build, cls, layers)
    for kind, cls in _KINDS.items()
    for depth, layers in _DEPTHS.items()
}

GATED_BACKBONES = tuple(name for name in BACKBONES if not name.endswith("_plain"))

__all__ = [
    "BACKBONES",
    "GATED_BACKBONES",
    "PATHS",
    "ForwardPass",
    "GatedBasicBlock",
    "GatedResNet",
    "ResNet",
    "SlicedResNet",
    "TwoEncoderResNet",
    "TwoPathResNet",
    "checked_path",
]
