"""Checkpoints as solo-learn lays them out, and finding the one to continue from."""

import json
import random
import string
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from ..config import DEFAULTS
from ..files import write_json

# What may differ between a run and its continuation.
_FREE_TO_CHANGE = (
    "resume_from_checkpoint",
    "auto_resume",
    "checkpoint",
    "wandb",
    "wandb_run_id",
    "devices",
    "num_nodes",
    "accelerator",
    "strategy",
    "enable_progress_bar",
    "log_every_n_steps",
    "performance",
    "final_knn",
    "flops",
)


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
        return json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        return {}


def new_run_folder(cfg: DictConfig) -> Path:
    """`<checkpoint.dir>/<method>/offline-<random>`, as solo-learn names a run without wandb."""
    generator = random.Random(time.time_ns())
    letters = generator.choices(string.ascii_lowercase, k=4) + generator.choices(string.digits, k=4)
    return Path(cfg.checkpoint.dir) / cfg.method / f"offline-{''.join(letters)}"


def find_checkpoint(cfg: DictConfig) -> Path | None:
    """The latest checkpoint of an unfinished run with the same config, if there is one.

    solo-learn compares a dozen keys; here everything counts but what cannot change the result, so
    that a run with another target budget is not continued by mistake.

    Args:
        cfg: a complete config; `auto_resume.max_hours` bounds the checkpoint's age.
    """
    wanted = _what_matters(plain(cfg))
    found = []
    for file in (Path(cfg.checkpoint.dir) / cfg.method).glob("*/last.ckpt"):
        written = file.stat().st_mtime
        if time.time() - written > cfg.auto_resume.max_hours * 3600:
            continue
        args = read_args(file.parent)
        # A run of an earlier version took the defaults of keys that have come since.
        args = plain(OmegaConf.merge(DEFAULTS, args))  # type: ignore[arg-type]
        if _what_matters(args) == wanted and not (file.parent / "metrics.json").exists():
            found.append((written, file))
    return max(found)[1] if found else None


def _what_matters(args: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in args.items() if key not in _FREE_TO_CHANGE}
