"""The model of a config, ready to be trained as fast as the group `performance` allows."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from ..checks import require, true_or_false
from ..errors import InputError
from ..solo_learn import METHODS

PERFORMANCE = {"disable_channel_last": False, "compile": False}

# The gates' noise is then that of the uncompiled step: the same seed gives the same run.
_COMPILER_OPTIONS: dict[str, Any] = {"fallback_random": True}


def build_model(cfg: DictConfig) -> Any:
    """The method of a config, from its seed, in its memory format and, if so wished, compiled.

    Compiling changes no name in the state dict: checkpoints load everywhere.

    Args:
        cfg: a complete config.
    """
    seed_everything(cfg.seed, verbose=False)
    model = METHODS[cfg.method](cfg)
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    if cfg.performance.compile:
        compile_model(model, options=_COMPILER_OPTIONS)
    return model


def compile_model(model: Any, **kwargs: Any) -> None:
    """Compile a method's backbone, each path by itself, and its projector, in place.

    Args:
        model: a method.
        kwargs: those of `torch.compile`.
    """
    model.backbone.compile(**kwargs)
    if getattr(model, "projector", None) is not None:
        model.projector.compile(**kwargs)


def check_performance(group: Any) -> None:
    """Refuse a group `performance` that cannot be used.

    Raises:
        InputError: naming the key, what was found and what is accepted.
    """
    keys = ", ".join(PERFORMANCE)
    require("performance", group, lambda v: isinstance(v, Mapping), f"a group with {keys}")
    for key, value in group.items():
        if key not in PERFORMANCE:
            raise InputError(f"performance.{key}: no such key, accepted are {keys}")
        true_or_false(f"performance.{key}", value)
