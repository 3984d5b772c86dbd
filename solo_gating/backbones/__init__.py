"""The backbones, and their names in solo-learn's registry.

| name | paths | what it is |
|---|---|---|
| `<resnet>_gated` | dense, gated | one encoder; gates choose its channels |
| `<resnet>_two_encoders` | dense, gated | a dense and a gated one |
| `<resnet>_plain` | dense | torchvision's, with `width` and `stem` |
| `<resnet>_policy` | dense | as wide inside its blocks as the channels of a gated one's policy |

<resnet> is resnet18, resnet34, resnet50, resnet101, or what `register_resnet` adds. All names start
with `resnet` because solo-learn removes `fc` and reads `inplanes` for those.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..checks import one_of, require
from .blocks import BLOCKS, GatedBasicBlock, GatedBlock, GatedBottleneck, Stage, convolutions
from .paths import PATHS, ForwardPass, checked_path
from .resnet import ResNet
from .sliced import SlicedResNet, resnet_of_policy
from .two_encoders import TwoEncoderResNet
from .two_path import GatedResNet, TwoPathResNet

_KINDS: dict[str, Callable[..., ResNet]] = {
    "gated": GatedResNet,
    "two_encoders": TwoEncoderResNet,
    "plain": ResNet,
    "policy": resnet_of_policy,
}
_WITHOUT_GATES = ("_plain", "_policy")

# One dictionary for its life: solo-learn's registry is filled from it, and follows it.
BACKBONES: dict[str, Callable[..., ResNet]] = {}
_LISTENERS: list[dict[str, Callable[..., ResNet]]] = []


def _build(
    make: Callable[..., ResNet],
    layers: list[int],
    block: str | type[nn.Module],
    method: str | None = None,
    **kwargs: Any,
) -> ResNet:
    """Build a backbone as solo-learn's registry does: `factory(method, **backbone.kwargs)`."""
    return make(layers, block=block, **kwargs)


def register_resnet(name: str, block: str | type[nn.Module], layers: list[int]) -> None:
    """Give a ResNet names: `<name>_gated`, `_two_encoders`, `_plain` and `_policy`.

    Args:
        name: starts with "resnet".
        block: a class of residual blocks as `blocks.gated_block` describes it, or a name in `BLOCKS`.
        layers: number of blocks of the four stages.

    Raises:
        InputError: for a name that does not start with "resnet".
    """
    wording = "a name that starts with resnet, for which solo-learn removes the classifier"
    require(
        "register_resnet", name, lambda v: isinstance(v, str) and v.startswith("resnet"), wording
    )
    made = {f"{name}_{kind}": partial(_build, make, layers, block) for kind, make in _KINDS.items()}
    for registry in (BACKBONES, *_LISTENERS):
        registry.update(made)


def keep_registered(registry: dict[str, Callable[..., Any]]) -> None:
    """Fill another registry with all backbones, those that are registered later included."""
    registry.update(BACKBONES)
    _LISTENERS.append(registry)


def gated_backbones() -> tuple[str, ...]:
    """The names of the backbones with gates."""
    return tuple(name for name in BACKBONES if not name.endswith(_WITHOUT_GATES))


def create_backbone(name: str, **kwargs: Any) -> ResNet:
    """A backbone without a classifier, with fresh weights.

        backbone = create_backbone("resnet18_gated", width=16, stem="cifar")
        features = backbone(images)

    Args:
        name: one of `BACKBONES`.
        kwargs: those of its kind: `ResNet`, `GatedResNet`, `TwoEncoderResNet`, `resnet_of_policy`.

    Raises:
        InputError: for a name or a value that is not accepted.
    """
    one_of("backbone", name, BACKBONES)
    backbone = BACKBONES[name](**kwargs)
    backbone.fc = nn.Identity()
    return backbone


register_resnet("resnet18", "basic", [2, 2, 2, 2])
register_resnet("resnet34", "basic", [3, 4, 6, 3])
register_resnet("resnet50", "bottleneck", [3, 4, 6, 3])
register_resnet("resnet101", "bottleneck", [3, 4, 23, 3])

__all__ = [
    "BACKBONES",
    "BLOCKS",
    "PATHS",
    "ForwardPass",
    "GatedBasicBlock",
    "GatedBlock",
    "GatedBottleneck",
    "GatedResNet",
    "ResNet",
    "SlicedResNet",
    "Stage",
    "TwoEncoderResNet",
    "TwoPathResNet",
    "checked_path",
    "convolutions",
    "create_backbone",
    "gated_backbones",
    "keep_registered",
    "register_resnet",
    "resnet_of_policy",
]
