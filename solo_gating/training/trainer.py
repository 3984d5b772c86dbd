"""Lightning's Trainer from solo-learn's config keys."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from ..backbones import gated_backbones
from ..errors import InputError
from ..gates import gate_class
from ..methods import GATED_METHODS
from .callbacks import RunProgress, StopAtNonFiniteLoss
from .checkpoints import Checkpointer, WholeFiles, plain, read_args
from .logs import CSVLog, next_version
from .processes import EndBySignal


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """A Trainer that writes nothing yet; every Trainer argument in the config counts.

    Args:
        cfg: a complete config.

    Raises:
        InputError: for a value that Lightning refuses.
    """
    callbacks: list[Any] = [EndBySignal(), StopAtNonFiniteLoss()]
    if cfg.get("enable_progress_bar", True):
        callbacks.append(RunProgress())

    config = plain(cfg)
    accepted = inspect.signature(pl.Trainer.__init__).parameters
    arguments: dict[str, Any] = {"enable_model_summary": False, "num_sanity_val_steps": 0}
    arguments |= {name: config[name] for name in accepted if name in config}
    arguments.update(
        callbacks=callbacks,
        logger=False,  # see attach_outputs
        enable_checkpointing=False,
        default_root_dir=None,
        strategy=_strategy(cfg),
    )
    if _on_cpu(cfg):
        if str(cfg.precision).startswith("16"):
            rank_zero_warn(
                f"precision {cfg.precision} needs a GPU; this run on the CPU uses 32-true"
            )
            arguments["precision"] = "32-true"
        if cfg.sync_batchnorm:
            arguments["sync_batchnorm"] = False
            if cfg.strategy not in ("auto", None):
                rank_zero_warn(
                    "sync_batchnorm needs GPUs; on the CPU each process has its own statistics"
                )
    try:
        return pl.Trainer(**arguments)
    except Exception as error:  # whatever a value, or SLURM's variables, make Lightning say
        raise InputError(refusal("Trainer", error)) from error


def refusal(what: str, error: Exception) -> str:
    """One sentence of what Lightning refuses.

    Args:
        what: of Lightning's refuses.
        error: that it raised.
    """
    reason = " ".join(str(error).split()) or type(error).__name__
    if "SLURM" in reason:
        reason += " (with SLURM_JOB_NAME=bash in the environment it is one process without srun)"
    return f"Lightning's {what} refuses this config: {reason}"


@contextmanager
def refusals() -> Iterator[None]:
    """What Lightning refuses only when it has seen model and data becomes one sentence, too.

    Raises:
        InputError: for that.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise InputError(refusal("Trainer", error)) from error
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise InputError(refusal("Trainer", error)) from error


def attach_outputs(trainer: pl.Trainer, cfg: DictConfig, folder: Path) -> None:
    """Give a Trainer its loggers and its checkpoints.

    Args:
        trainer: from `build_trainer`.
        cfg: the complete config, learning rates scaled.
        folder: the run's folder; a wandb run that its `args.json` names is continued.

    Raises:
        InputError: if wandb is asked for and not installed.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    loggers: list[Logger] = [CSVLog(next_version(folder / "logs"))]
    if cfg.wandb.enabled:
        loggers.append(_wandb(cfg, folder))
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    trainer.loggers = loggers
    trainer.strategy.checkpoint_io = WholeFiles()
    if cfg.checkpoint.enabled:
        callbacks.append(Checkpointer(cfg, folder))  # last: after the check of the losses


def _on_cpu(cfg: DictConfig) -> bool:
    if cfg.accelerator in ("auto", None):
        return not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return cfg.accelerator == "cpu"


def _strategy(cfg: DictConfig) -> Any:
    # Of several processes Lightning makes DDP, too, but for notebooks, where it has a form of its own.
    several = (cfg.num_nodes != 1 or _devices(cfg) > 1) and not hasattr(sys, "ps1")
    if cfg.strategy == "ddp" or (cfg.strategy in ("auto", None) and several):
        return DDPStrategy(find_unused_parameters=_some_are_unused(cfg))
    return cfg.strategy or "auto"


def _devices(cfg: DictConfig) -> int:
    """On how many this machine's part of a run trains."""
    if cfg.devices in ("auto", -1, "-1", None):
        return 1 if _on_cpu(cfg) else max(1, torch.cuda.device_count())
    if isinstance(cfg.devices, str) and "," in cfg.devices:
        return sum(number.strip() != "" for number in cfg.devices.split(","))
    return len(cfg.devices) if OmegaConf.is_list(cfg.devices) else int(cfg.devices)


def _some_are_unused(cfg: DictConfig) -> bool:
    """Whether a step's backward pass leaves parameters out."""
    if cfg.method not in GATED_METHODS:
        return cfg.backbone.name in gated_backbones()  # whose gates nothing trains
    # While the gates rest, their parameters and the gated BatchNorms have no gradient; nor have
    # BatchNorms that no view takes and gates replace, those of a gated encoder of its own among them;
    # and in a method of several backward passes none reaches all parameters.
    gating: Any = cfg.gating
    taken = "dense" in gating.views and "two_encoders" not in cfg.backbone.name
    replaced = getattr(gate_class(gating.gate), "has_output_norm", False) and not taken
    return gating.warmup_epochs > 0 or replaced or GATED_METHODS[cfg.method].several_passes


def _wandb(cfg: DictConfig, folder: Path) -> WandbLogger:
    run_id = read_args(folder).get("wandb_run_id")
    try:
        logger = WandbLogger(
            name=cfg.name,
            project=cfg.wandb.project,
            entity=cfg.wandb.entity,
            offline=cfg.wandb.offline,
            resume="allow" if run_id else None,
            id=run_id,
        )
    except ModuleNotFoundError as error:
        raise InputError("wandb.enabled: got true, which needs `pip install wandb`") from error
    logger.log_hyperparams(plain(cfg))
    return logger
