"""The dense encoder of a checkpoint on its own, for readers that do not know this package."""

from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn

from ..backbones import ResNet, SlicedResNet
from ..checkpoints.encoder import Encoder
from ..checkpoints.reading import read_checkpoint
from ..errors import InputError
from ..methods import GATED_METHODS, plain_method
from ..solo_learn import METHODS, WITH_CIFAR_STEM

_OURS = ("gated", "two_encoders", "plain")


def dense_state_dict(encoder: Encoder) -> dict[str, Tensor]:
    """The dense path's weights under torchvision's names, without `fc`.

    Args:
        encoder: its width and stem are what they are; at width 64 with the ImageNet stem the
            weights fit `torchvision.models.resnet18` strictly, apart from its `fc`.
    """
    if isinstance(encoder.backbone, ResNet):
        return encoder.backbone.dense_state_dict()
    return encoder.backbone.state_dict()


def dense_network(encoder: Encoder) -> ResNet:
    """The dense path as torchvision's ResNet, without `fc`, in evaluation mode.

    Args:
        encoder: of one of this package's backbones.

    Raises:
        InputError: for another backbone.
    """
    source = encoder.backbone
    if not isinstance(source, ResNet):
        raise InputError(f"checkpoint: the backbone {encoder.args.backbone.name!r} is no ResNet")
    return dense_resnet(source)


def dense_resnet(backbone: ResNet) -> ResNet:
    """The dense path of a backbone without `fc`, as a ResNet of its own in evaluation mode."""
    cls = SlicedResNet if isinstance(backbone, SlicedResNet) else ResNet
    net = cls(**backbone.architecture)
    net.fc = nn.Identity()
    net.load_state_dict(backbone.dense_state_dict())
    return net.eval().requires_grad_(False)


def solo_learn_args(encoder: Encoder) -> dict[str, Any]:
    """The pre-training's `args.json` for the method without gates and torchvision's backbone.

    Args:
        encoder: of a run with a ResNet of width 64, the only one that solo-learn has.

    Raises:
        InputError: for another width or widths of its own, or a stem that solo-learn would not build.
    """
    args: Any = OmegaConf.to_container(encoder.args, resolve=True)
    kwargs = args["backbone"].get("kwargs") or {}
    width, stem = kwargs.get("width", 64), kwargs.get("stem", "imagenet")
    if isinstance(encoder.backbone, SlicedResNet):
        name = args["backbone"]["name"]
        raise InputError(f"format: got solo-learn with backbone {name!r}, which solo-learn has not")
    if width != 64:
        raise InputError(
            f"format: got solo-learn with an encoder of width {width}; solo-learn has 64 only"
        )
    small = args["data"]["dataset"] in WITH_CIFAR_STEM
    if small != (stem == "cifar"):
        raise InputError(
            f"format: got solo-learn with the {stem} stem on {args['data']['dataset']}; solo-learn "
            f"has the cifar stem on {' and '.join(WITH_CIFAR_STEM)} only"
        )
    method = args["method"]
    if method in GATED_METHODS:
        plain, own = plain_method(GATED_METHODS[method]), method
        method = next((name for name, cls in METHODS.items() if cls is plain), None)
        if method is None:
            raise InputError(f"format: got solo-learn with method {own}, which solo-learn has not")
    depth, _, kind = args["backbone"]["name"].partition("_")
    own = {"width", "stem", "path", "threshold", "budget", "budget_range", "open_start"}
    own |= {"reduction", "temperature", "separate_bn", "gate", "gate_kwargs"}
    args["method"] = method
    args["backbone"] = {
        "name": depth if kind in _OURS else args["backbone"]["name"],
        "kwargs": {key: value for key, value in kwargs.items() if key not in own},
    }
    args.pop("gating", None)
    return args


def solo_learn_checkpoint(encoder: Encoder) -> dict[str, Any]:
    """The checkpoint's content for `solo_learn_args`: dense weights, and the rest of the method's.

    A momentum method's teacher stays behind.

    Args:
        encoder: whose checkpoint is read again.
    """
    content = read_checkpoint(encoder.checkpoint, "--checkpoint")
    state = {
        name: value
        for name, value in content["state_dict"].items()
        if not name.startswith(("backbone.", "momentum_", "path_knn."))
    }
    state |= {f"backbone.{name}": value for name, value in dense_state_dict(encoder).items()}
    kept = ("epoch", "global_step", "pytorch-lightning_version")
    return {key: content[key] for key in kept if key in content} | {"state_dict": state}
