"""Checkpoints as solo-learn lays them out."""

import random
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from ..errors import InputError
from ..files import add_name, read_json, replacing, write_json
from .callbacks import NonFiniteLossError, first_not_finite


class WholeFiles(TorchCheckpointIO):
    """Lightning's way to write a checkpoint, but whole or not at all, and only what is finite.

    Lightning writes to the temporary folder and moves the file, which is a copy, not a renaming,
    where that is another file system: a kill or a full disk then destroys the checkpoint before.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write it beside the file that it replaces.

        Raises:
            NonFiniteLossError: if a weight, a buffer or the optimizer's state is infinite or NaN.
            InputError: if it cannot be written.
        """
        if name := first_not_finite(checkpoint):
            raise NonFiniteLossError(checkpoint["epoch"], name, checkpoint["global_step"])
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)


class Checkpointer(Checkpoint):
    """`args.json` and `last.ckpt` in the run's folder, the latter after every n-th epoch.

    It is also written where the run ends, by itself or by one of the Trainer's limits. With
    `checkpoint.keep_prev` each of these checkpoints stays, as `<name>-ep=<epoch>.ckpt`; `last.ckpt`
    is then a second name of the newest, given to it once it is complete.

    Args:
        cfg: a complete config; its resolved content becomes `args.json`. With
            `checkpoint.frequency` 0 only the end is saved.
        folder: the run's folder.
    """

    def __init__(self, cfg: DictConfig, folder: Path):
        self.args = plain(cfg)
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `args.json`."""
        wandb = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        args = {**self.args, "wandb_run_id": wandb[0].version if wandb else None}
        _on_first_process(trainer, lambda: write_json(self.folder / "args.json", args))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a checkpoint if one is due.

        Lightning calls this at the end of a run, too, be it in the middle of an epoch.
        """
        frequency, epochs = self.args["checkpoint"]["frequency"], trainer.current_epoch + 1
        due = frequency > 0 and epochs % frequency == 0
        if (due or _ends(trainer)) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        last = file = self.folder / "last.ckpt"
        if self.args["checkpoint"]["keep_prev"]:
            file = self.folder / f"{self.args['name']}-ep={trainer.current_epoch}.ckpt"
        failure: Exception | None = None
        try:
            trainer.save_checkpoint(file, weights_only=False)
        except (InputError, NonFiniteLossError) as error:
            failure = error
            trainer.strategy.barrier()  # the other processes wait there for the first to have saved
        _raise_everywhere(trainer, failure)
        if file != last:
            _on_first_process(trainer, lambda: add_name(file, last))


def _on_first_process(trainer: pl.Trainer, write: Callable[[], None]) -> None:
    failure = None
    if trainer.is_global_zero:
        try:
            write()
        except InputError as error:
            failure = error
    _raise_everywhere(trainer, failure)


def _raise_everywhere(trainer: pl.Trainer, failure: Exception | None) -> None:
    """Stop every process if the first one has failed; the others would wait for it."""
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        raise failure


def _ends(trainer: pl.Trainer) -> bool:
    """Whether the epoch that has just ended is a run's last."""
    return (
        trainer.should_stop
        or trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        or 0 <= trainer.max_steps <= trainer.global_step
    )


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A config as a dictionary, interpolations resolved."""
    content = OmegaConf.to_container(cfg, resolve=True)
    return {str(key): value for key, value in content.items()}  # type: ignore[union-attr]


def read_args(folder: Path) -> dict[str, Any]:
    """A run's `args.json`; empty if there is none that can be read."""
    try:
        return read_json(folder / "args.json")
    except InputError:
        return {}


def new_run_folder(cfg: DictConfig) -> Path:
    """`<checkpoint.dir>/<method>/offline-<random>`, as solo-learn names a run without wandb."""
    generator = random.Random(time.time_ns())
    letters = generator.choices(string.ascii_lowercase, k=4) + generator.choices(string.digits, k=4)
    return Path(cfg.checkpoint.dir) / cfg.method / f"offline-{''.join(letters)}"
