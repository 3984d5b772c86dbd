"""Frozen encoders as teachers: checkpoints of solo-learn and of this package, torchvision's, MoCo's."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backbones import ResNet, TwoPathResNet
from ..errors import InputError
from ..files import read_json
from ..solo_learn import METHODS
from .encoder import encoder_of
from .pretrained import dense_weights, resnet_weights
from .reading import no_weight, read_args, read_weights

_STEMS = {7: "imagenet", 3: "cifar"}
_MOCO_PREFIX = "module.encoder_q."
# MoCo v2's head, and MoCo v1's, whose name in other files is a classifier's.
_MLP = ("fc.0", "fc.2")
_LINEAR = ("fc",)


def load_teacher(
    file: str | Path,
    path: str = "dense",
    head: bool | None = None,
    key: str = "method_kwargs.teacher",
) -> nn.Sequential:
    """An encoder, in evaluation mode and frozen, with or without the head of its own pre-training.

    Where solo-learn's `args.json` (of the modern line) lies beside the file, it says which network
    this is. Elsewhere the weights do: a ResNet of torchvision's names with basic or bottleneck blocks,
    of any depth and width, 3×3 stems being solo-learn's for small images.

    Args:
        file: a checkpoint of solo-learn or of this package, a state dict of torchvision's, or MoCo's
            file (`module.encoder_q.`).
        path: "dense", or "gated" for a gated encoder's other path.
        head: True for the head (solo-learn's projector, MoCo's `fc`), False for features; None for the
            head if there is one.
        key: that names the file, for messages.

    Returns:
        `backbone` and `head`; images B × 3 × H × W → B × D.

    Raises:
        InputError: for a file that is none of these, or without the path or the head that is asked for.
    """
    args = Path(file).parent / "args.json"
    described = args.is_file() and isinstance(read_json(args, key).get("backbone"), Mapping)
    if described:
        backbone, own = _described(Path(file), args, path, head, key)
    else:
        backbone, own = _recognised(file, path, head, key)
    if head and own is None:
        raise InputError(
            f"{key.rpartition('.')[0]}.teacher_head: got true, {str(file)!r} has no head that is "
            "known; expected false"
        )
    teacher = nn.Sequential()
    teacher.add_module("backbone", backbone)
    teacher.add_module("head", nn.Identity() if own is None else own)
    return teacher.eval().requires_grad_(False)


_Parts = tuple[nn.Module, nn.Module | None]


def _described(file: Path, args_file: Path, path: str, head: bool | None, key: str) -> _Parts:
    method = read_args(args_file, key).method
    has_head = getattr(METHODS.get(method), "has_projector", method in METHODS) and any(
        name.startswith("projector.") for name in read_weights(file, key)
    )
    wanted = has_head and head is not False
    encoder = encoder_of(file, "projector" if wanted else "backbone", key)
    if path != "dense" and not isinstance(encoder.backbone, TwoPathResNet):
        raise _no_gates(file, path, key)
    if path not in encoder.trained_paths:
        raise InputError(
            f"{_path_key(key)}: got {path}, pre-training of {str(file)!r} trained "
            f"{' and '.join(encoder.trained_paths)} only"
        )
    if isinstance(encoder.backbone, TwoPathResNet):
        encoder.backbone.default_path = path
    return encoder.backbone, encoder.head if wanted else None


def _recognised(file: str | Path, path: str, head: bool | None, key: str) -> _Parts:
    if path != "dense":
        raise _no_gates(file, path, key)
    prefix, weights = resnet_weights(file, key)
    where = f"{key}: {str(file)!r}"
    with torch.device("meta"):  # whatever sizes the file speaks of, it takes no memory
        net = _resnet_like(weights, where)
    found = dense_weights(net, weights, where, "the ResNet that its first layers look like")
    net.load_state_dict(found, assign=True)
    net.to(torch.get_default_dtype())
    own = None if head is False else _moco_head(weights, prefix, net.inplanes, where)
    return net, own


def _resnet_like(weights: Mapping[str, Tensor], where: str) -> ResNet:
    stem = tuple(weights["conv1.weight"].shape)
    if len(stem) != 4 or stem[-1] not in _STEMS:
        raise InputError(f"{where}: conv1.weight is {stem}, expected a convolution of 7×7 or 3×3")
    found = {match.groups() for n in weights if (match := re.match(r"layer([1-4])\.(\d+)\.", n))}
    layers = [sum(stage == number for stage, _ in found) for number in "1234"]
    if not all(layers):
        raise InputError(f"{where} lacks layer{layers.index(0) + 1} of a ResNet")
    block = "bottleneck" if any(".conv3." in name for name in weights) else "basic"
    net = ResNet(layers, width=stem[0], stem=_STEMS[stem[-1]], block=block)
    net.fc = nn.Identity()
    return net


def _moco_head(
    weights: Mapping[str, Tensor], prefix: str, features: int, where: str
) -> nn.Sequential | None:
    """Linear–ReLU–Linear, or MoCo v1's Linear; None if there is neither."""
    names = {name.rpartition(".")[0] for name in weights if name.startswith("fc.")}
    layers: tuple[str, ...]
    if names == set(_MLP):
        layers = _MLP
    elif names == set(_LINEAR) and prefix == _MOCO_PREFIX:
        layers = _LINEAR
    else:
        return None
    head, width = nn.Sequential(), features
    for layer in layers:
        own = {part: weights.get(f"{layer}.{part}", torch.empty(0)) for part in ("weight", "bias")}
        shapes = {part: tuple(value.shape) for part, value in own.items()}
        out = shapes["weight"][0] if shapes["weight"] else 0
        if shapes != {"weight": (out, width), "bias": (out,)}:
            raise InputError(
                f"{where}: {layer} has weight and bias of {shapes['weight']} and {shapes['bias']}, "
                f"expected a linear layer of {width} features"
            )
        for part, value in own.items():
            if reason := no_weight(part, value, torch.get_default_dtype()):
                raise InputError(f"{where} cannot be used: {layer}.{part} {reason}")
        linear = nn.Linear(width, out)
        linear.load_state_dict(own)
        head.extend([nn.ReLU(), linear] if len(head) else [linear])
        width = out
    return head


def _path_key(key: str) -> str:
    return f"{key.rpartition('.')[0]}.teacher_path"


def _no_gates(file: str | Path, path: str, key: str) -> InputError:
    return InputError(
        f"{_path_key(key)}: got {path}, {str(file)!r} is no gated encoder with its args.json beside "
        "it; expected dense"
    )
