"""Checkpoints as solo-learn lays them out."""

import json
import pickle
import random
import string
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..errors import InputError
from ..files import write_json


class Checkpointer(ModelCheckpoint):
    """`args.json` and `last.ckpt` in the run's folder, the latter after every n-th epoch.

    With `checkpoint.keep_prev` each epoch's checkpoint stays, as `<name>-ep=<epoch>.ckpt`. Files
    are replaced whole: a run that is killed while writing leaves the checkpoint before.

    Args:
        cfg: a complete config; its resolved content becomes `args.json`.
        folder: the run's folder.
    """

    def __init__(self, cfg: DictConfig, folder: Path):
        super().__init__(
            dirpath=folder,
            filename=f"{cfg.name}-ep={{epoch}}" if cfg.checkpoint.keep_prev else "last",
            save_top_k=-1 if cfg.checkpoint.keep_prev else 1,
            save_last=cfg.checkpoint.keep_prev,
            every_n_epochs=cfg.checkpoint.frequency,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )
        self.args = plain(cfg)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `args.json`."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            wandb = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
            args = {**self.args, "wandb_run_id": wandb[0].version if wandb else None}
            write_json(Path(str(self.dirpath)) / "args.json", args)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A config as a dictionary, interpolations resolved."""
    content = OmegaConf.to_container(cfg, resolve=True)
    return {str(key): value for key, value in content.items()}  # type: ignore[union-attr]


def read_args(folder: Path) -> dict[str, Any]:
    """A run's `args.json`; empty if there is none that can be read."""
    try:
        content = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def new_run_folder(cfg: DictConfig) -> Path:
    """`<checkpoint.dir>/<method>/offline-<random>`, as solo-learn names a run without wandb."""
    generator = random.Random(time.time_ns())
    letters = generator.choices(string.ascii_lowercase, k=4) + generator.choices(string.digits, k=4)
    return Path(cfg.checkpoint.dir) / cfg.method / f"offline-{''.join(letters)}"


def read_checkpoint(path: str | Path, key: str) -> dict[str, Any]:
    """Load a checkpoint's content to the CPU, without running code from it.

    Args:
        path: a Lightning checkpoint.
        key: the config key that names it, for messages.

    Raises:
        InputError: if there is no such file, it is damaged, or it is no checkpoint.
    """
    if not Path(path).is_file():
        raise InputError(f"{key}: {str(path)!r} is not a file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words advise to run whatever is in it
        raise InputError(
            f"{key}: cannot read {str(path)!r} as a checkpoint (it is damaged, or holds code)"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{key}: cannot read {str(path)!r} as a checkpoint ({reason})") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise InputError(
            f"{key}: {str(path)!r} holds no `state_dict`, accepted is a Lightning checkpoint"
        )
    return content


def check_architecture(module: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint whose weights do not fit a model.

    Raises:
        InputError: naming the first weight that differs.
    """
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"checkpoint {str(path)!r} is of another architecture: {name} is "
                f"{theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} in this config"
            )
