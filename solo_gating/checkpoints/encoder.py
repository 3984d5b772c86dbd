"""Encoders from checkpoints, ready to be evaluated."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..backbones import PATHS, TwoPathResNet
from ..checks import shown
from ..errors import InputError
from ..metrics import pretraining_of
from ..solo_learn import METHODS, BaseMethod
from .reading import (
    args_beside,
    check_architecture,
    read_checkpoint,
    trained_paths,
    weights_of,
)

HEADS = ("backbone", "projector")


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder and where it comes from.

    Attributes:
        backbone: without a classifier, in evaluation mode.
        head: what follows it: nothing (`nn.Identity`) or the projector of pre-training.
        args: the pre-training's complete config, its `args.json`.
        checkpoint: the file.
        epochs: epochs of pre-training.
    """

    backbone: nn.Module
    head: nn.Module
    args: DictConfig
    checkpoint: Path
    epochs: int

    @property
    def trained_paths(self) -> tuple[str, ...]:
        """The paths that pre-training took, dense first; ("dense",) for a network with one."""
        if not isinstance(self.backbone, TwoPathResNet):
            return ("dense",)
        return trained_paths(self.args.get("gating") or {})

    def paths(self, wanted: str) -> tuple[str, ...]:
        """The paths that a config's `path` means.

        Args:
            wanted: "dense", "gated", or "both" for all that were trained.

        Raises:
            InputError: for another word, or a gated path that the network does not have.
        """
        if wanted == "both":
            return self.trained_paths
        if wanted not in PATHS:
            raise InputError(f"path: got {wanted!r}, expected dense, gated and both")
        if wanted == "gated" and not isinstance(self.backbone, TwoPathResNet):
            raise InputError(
                f"path: got gated, the encoder of {str(self.checkpoint)!r} "
                f"({self.args.backbone.name}) has no gates; expected dense"
            )
        return (wanted,)

    def warn_of_statistics(self, path: str | None) -> None:
        """Say where a gated path is about to be used with BatchNorm statistics of another width."""
        method: Any = METHODS.get(self.args.method)
        if path == "gated" and getattr(method, "recalibrate", False):
            warnings.warn(
                f"{self.args.method} has BatchNorm statistics of its full width only; evaluations and "
                "exports estimate those of a budget from images (recalibrate), this does not",
                stacklevel=3,
            )

    @property
    def crop_size(self) -> int:
        """Side of the images of pre-training's first view, in pixels.

        Raises:
            InputError: if the args.json does not say.
        """
        size = OmegaConf.select(self.args, "augmentations[0].crop_size")
        if size is None:
            file = self.checkpoint.parent / "args.json"
            raise InputError(f"{str(file)!r} lacks augmentations[0].crop_size")
        return size

    def description(self) -> dict[str, Any]:
        """The key `pretraining` of every `metrics.json`: which pre-training this was."""
        return pretraining_of(self.args, self.epochs, self.checkpoint)


def encoder_of(checkpoint: str | Path, head: str = "backbone", key: str = "checkpoint") -> Encoder:
    """Load the encoder of any pre-training of this package or of solo-learn's modern line.

    Args:
        checkpoint: a Lightning checkpoint with solo-learn's `args.json` beside it.
        head: "backbone" for the backbone's features, "projector" for the projections.
        key: that names the checkpoint, for messages.

    Raises:
        InputError: for files that are missing, damaged, or do not belong together.
    """
    if head not in HEADS:
        raise InputError(f"features: got {head!r}, expected {', '.join(HEADS)}")
    path = Path(checkpoint)
    content = read_checkpoint(path, key)
    args = args_beside(path, key)
    if head != "backbone" and args.method not in METHODS:
        raise InputError(f"features: method {shown(args.method)} is not known, expected backbone")
    if head != "backbone" and not getattr(METHODS[args.method], "has_projector", True):
        raise InputError(f"features: method {args.method!r} has no projector, expected backbone")
    if args.backbone.name in ("resnet18", "resnet34"):  # the same network, whose FLOPs are known
        args.backbone.name += "_plain"
    with torch.device("meta"):  # whatever sizes the files speak of, it takes no memory
        check_architecture(_build(head, args, path, key), content, path, ("backbone", head))
    model = _build(head, args, path, key)
    model.load_state_dict(weights_of(content["state_dict"], ("backbone", head)), strict=False)
    model.eval().requires_grad_(False)
    projector = nn.Identity() if head == "backbone" else model.projector
    return Encoder(model.backbone, projector, args, path, int(content.get("epoch", -1)) + 1)


def load_encoder(
    checkpoint: str | Path,
    *,
    path: str | None = None,
    budget: float | None = None,
    threshold: float | None = None,
) -> nn.Module:
    """The backbone of a checkpoint, ready to use: in evaluation mode, its weights frozen.

        backbone = load_encoder("last.ckpt", path="gated")
        features = backbone(images)        # B × 3 × H × W → B × C

    A backbone with two paths can be set later, too: `backbone.path`, `.budget`, `.threshold`.

    Args:
        checkpoint: a Lightning checkpoint of this package or of solo-learn's modern line, with its
            `args.json` beside it.
        path: "dense" or "gated"; None for the checkpoint's own default, which is dense.
        budget: that the gates are told, of a network trained for a range; None for its middle.
        threshold: of the gates' logits; None for 0.

    Raises:
        InputError: for files that are missing, damaged, or do not belong together, or a setting that
            the network does not have.
    """
    encoder = encoder_of(checkpoint)
    if path is not None:
        encoder.paths(path)
    encoder.warn_of_statistics(path)
    backbone: Any = encoder.backbone
    if isinstance(backbone, TwoPathResNet):
        for name, value in (("path", path), ("budget", budget), ("threshold", threshold)):
            if value is not None:
                setattr(backbone, name, value)
    elif budget is not None or threshold:
        raise InputError(f"budget, threshold: {str(encoder.checkpoint)!r} has no gates")
    return backbone


def _build(head: str, args: DictConfig, path: Path, key: str) -> Any:
    if args.backbone.name not in BaseMethod._BACKBONES:
        raise InputError(
            f"{key}: the backbone {shown(args.backbone.name)} of {str(path)!r} is not known, expected "
            f"one of {', '.join(sorted(BaseMethod._BACKBONES))}"
        )
    args = args.copy()
    args.data.num_classes = 2  # of solo-learn's online classifier, which is not loaded
    try:
        # The base class is the backbone with solo-learn's changes to it, whatever the method.
        model = METHODS["base" if head == "backbone" else args.method](args)
    except InputError as error:
        raise InputError(f"{key}: the args.json beside {str(path)!r}: {error}") from error
    except Exception as error:  # whatever a foreign file makes solo-learn and torchvision say
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{key}: the args.json beside {str(path)!r} describes no network ({reason})"
        ) from error
    if not hasattr(model, head):
        raise InputError(f"features: method {shown(args.method)} has no {head}")
    return model
