"""The model of a config, ready to be trained as fast as the group `performance` allows."""

from typing import Any

import torch
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from ..checkpoints.pretrained import load_pretrained
from ..errors import InputError
from ..solo_learn import METHODS

# The gates' noise is then that of the uncompiled step: the same seed gives the same run.
_COMPILER_OPTIONS: dict[str, Any] = {"fallback_random": True}


def build_model(cfg: DictConfig) -> Any:
    """The method of a config, from its seed, in its memory format and, if so wished, compiled.

    Compiling changes no name in the state dict: checkpoints load everywhere.

    Args:
        cfg: a complete config.
    """
    seed_everything(cfg.seed, verbose=False)
    model = build_method(cfg)
    if cfg.get("pretrained") is not None:
        load_pretrained(model.backbone, cfg.pretrained)
        if "momentum" in cfg:  # the teacher began as a copy of other weights
            model.momentum_backbone.load_state_dict(model.backbone.state_dict())
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    if cfg.performance.compile:
        compile_model(model, options=_COMPILER_OPTIONS)
    return model


def build_method(cfg: DictConfig) -> Any:
    """The method of a config.

    Args:
        cfg: a complete config.

    Raises:
        InputError: for arguments that its backbone or its heads refuse.
    """
    try:
        return METHODS[cfg.method](cfg)
    except InputError:
        raise
    except Exception as error:  # whatever a value makes solo-learn, torchvision and PyTorch say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"backbone.kwargs, method_kwargs: {cfg.method} with {cfg.backbone.name} cannot be built "
            f"of them ({reason})"
        ) from error


def compile_model(model: Any, **kwargs: Any) -> None:
    """Compile a method's backbone, each path by itself, and its projector, in place.

    Args:
        model: a method.
        kwargs: those of `torch.compile`.
    """
    model.backbone.compile(**kwargs)
    if getattr(model, "projector", None) is not None:
        model.projector.compile(**kwargs)
