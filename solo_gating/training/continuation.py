"""Which run is continued, who may do it, and what continuing means.

What a continued run takes from its checkpoint: weights, the optimiser's momenta, how far it is, and
what it has logged. All else is the config's, as if the run had had it from the start; what cannot
be is refused with one sentence.
"""

import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from ..checkpoints.reading import check_architecture
from ..config.defaults import DEFAULTS
from ..config.gating import as_it_was
from ..errors import InputError
from ..files import read_json
from .checkpoints import plain, read_args

# A run with another value here is still the run that `auto_resume` looks for: the result is the
# same, or these say how long to go on.
_FREE_TO_CHANGE = (
    "auto_resume",
    "checkpoint",
    "wandb",
    "devices",
    "num_nodes",
    "accelerator",
    "strategy",
    "enable_progress_bar",
    "log_every_n_steps",
    "check_val_every_n_epoch",
    "val_check_interval",
    "limit_val_batches",
    "profiler",
    "max_steps",
    "max_time",
    "min_epochs",
    "min_steps",
    "data.num_workers",
    "performance",
    "knn_eval",
    "final_knn",
    "flops",
)
# Of a session; and the size that each view's own crop_size repeats.
_NO_CHANGE = ("resume_from_checkpoint", "wandb_run_id", "image_size")
# What no run can change on its way, even where the weights would fit.
_FIXED = ("method", "optimizer.name")
# In a checkpoint: what its run has logged, and where it was continued.
_KEY = "solo_gating"
_NEEDED = ("loops", "epoch", "global_step", "optimizer_states", "lr_schedulers")
_SHOWN = 4  # differences in a sentence


class Search(NamedTuple):
    """What `auto_resume` found.

    Attributes:
        checkpoint: of the run to continue; None to start from zero.
        why: then, in one line, what keeps the nearest unfinished run from being continued; empty if
            there is none.
    """

    checkpoint: Path | None
    why: str


def find_checkpoint(cfg: DictConfig) -> Search:
    """The latest checkpoint of an unfinished run with the same config, if there is one.

    solo-learn compares a dozen keys; here everything counts but what cannot change the result, so
    that a run with another target budget is not continued by mistake.

    Args:
        cfg: a complete config; `auto_resume.max_hours` bounds the checkpoint's age.
    """
    found: list[tuple[float, Path]] = []
    others: list[tuple[int, float, str]] = []
    hours = cfg.auto_resume.max_hours
    for folder in _runs(cfg):
        checkpoint = folder / "last.ckpt"
        if not checkpoint.is_file():
            continue
        args = read_args(folder)
        written = checkpoint.stat().st_mtime
        differing = _decisive(changes(args, cfg))
        if not args:
            others.append((10**6, -written, f"args.json of {folder} cannot be read"))
        elif is_finished(folder, args):
            if not differing:
                others.append((0, -written, f"{folder} has this config and is finished"))
        elif differing:
            if not _is_running(folder):
                words = f"the unfinished run in {folder} has {_in_words(differing)}"
                others.append((len(differing), -written, words))
        elif time.time() - written > hours * 3600:
            words = f"the unfinished run in {folder} is older than auto_resume.max_hours={hours}"
            others.append((0, -written, words))
        else:
            found.append((written, checkpoint))
    if found:
        return Search(max(found)[1], "")
    return Search(None, min(others)[2] if others else "")


def refuse_if_running(cfg: DictConfig) -> None:
    """For `auto_resume`: one process for a run, one run for a config.

    Args:
        cfg: a complete config.

    Raises:
        InputError: if another process is training a run of the same config.
    """
    for folder in _runs(cfg):
        args = read_args(folder)
        if args and not _decisive(changes(args, cfg)) and _is_running(folder):
            raise _in_use(folder)


def is_finished(folder: Path, args: Mapping[str, Any]) -> bool:
    """Whether a run has trained all its epochs and written its results.

    One that a limit of the Trainer has stopped before (`max_steps`, `max_time`) is not finished.

    Args:
        folder: the run's folder.
        args: its `args.json`.
    """
    try:
        return read_json(folder / "metrics.json")["epochs"] >= args["max_epochs"]
    except (InputError, KeyError, TypeError):
        return False


def changes(args: Mapping[str, Any], cfg: DictConfig) -> dict[str, list[Any]]:
    """Where a config differs from that of an earlier session, as {key: [value then, value now]}.

    Args:
        args: the earlier one; of a version before a key came, it had the default. Empty if it is
            not known: then nothing differs.
        cfg: a complete config.
    """
    if not args:
        return {}
    complete = _completed(DEFAULTS, args)
    gating, optimizer = complete.get("gating"), complete["optimizer"]
    if isinstance(gating, Mapping) and isinstance(optimizer, Mapping):
        complete["gating"] = as_it_was(gating, optimizer["weight_decay"])
    then, now = _flat(complete), _flat(plain(cfg))
    return {
        key: [then.get(key, "absent"), now.get(key, "absent")]
        for key in {**now, **then}
        if then.get(key, "absent") != now.get(key, "absent") and key not in _NO_CHANGE
    }


def check_continuable(
    model: nn.Module, content: dict[str, Any], cfg: DictConfig, checkpoint: Path
) -> None:
    """Refuse a checkpoint from which a config cannot go on.

    Args:
        model: built from the config.
        content: of the checkpoint.
        cfg: a complete config.
        checkpoint: its path; `args.json` beside it, if there is one, names the keys that differ.

    Raises:
        InputError: naming the key, the checkpoint's value and the given one.
    """
    name = f"checkpoint {str(checkpoint)!r}"
    differing = _decisive(changes(read_args(checkpoint.parent), cfg))
    for key in _FIXED:
        if key in differing:
            then, now = differing[key]
            raise InputError(
                f"{key}: got {now!r}, {name} is of a run with {then!r}, which can be "
                "continued with that only"
            )
    try:
        check_architecture(model, content, checkpoint)
    except InputError as error:
        shapes = {
            key: values
            for key, values in differing.items()
            if key.startswith(("backbone", "method_kwargs", "gating", "data.num_classes"))
        }
        raise InputError(
            f"{error}" + (f"; it has {_in_words(shapes)}" if shapes else "")
        ) from error
    if missing := [key for key in _NEEDED if key not in content]:
        raise InputError(
            f"resume_from_checkpoint: {name} has no `{missing[0]}`, expected one with the state "
            "of its training, not the weights only"
        )
    try:
        epochs = _whole_epochs(content["loops"]["fit_loop"])
    except (KeyError, TypeError) as error:
        raise InputError(f"resume_from_checkpoint: {name} does not say how far it is") from error
    if cfg.max_epochs < epochs:
        raise InputError(
            f"max_epochs: got {cfg.max_epochs}, {name} has {epochs} epochs behind it; expected "
            f"an integer ≥ {epochs}"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process from writing a run's folder.

    The lock on its `run.lock` is the kernel's: it ends with its process, however that ends, workers
    do not inherit it, and a network file system passes it on to other machines.

    Args:
        folder: that exists.

    Raises:
        InputError: if another process has it, or it cannot be written.
    """
    try:
        file = open(folder / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(f"cannot write {str(folder)!r} ({error.strerror})") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(folder) from error
        except OSError as error:  # a file system without locks
            rank_zero_warn(f"cannot lock {folder} ({error.strerror}); start no second run in it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


class Continuation(Callback):
    """Makes a continued run do what its config says, and keeps what its sessions did.

    - The optimiser has the config's rates, weight decay and so on, with the checkpoint's momenta.
    - The schedule is that of an undisturbed run of the config: a new one, moved on as far as the
      epochs that are done. So neither another length nor other rates nor another batch size
      leaves a run on its old schedule.
    - An epoch that a limit of the Trainer has cut short is gone on with.
    - What was logged last, and where the run was continued, is in every checkpoint.

    Args:
        changed: what the config has changed, as `changes` says it.

    Attributes:
        sessions: where the run was continued: `epoch`, `step` and what was `changed`.
        trained: whether this session has begun to train; not if the run was at its end.
    """

    def __init__(self, changed: dict[str, list[Any]]):
        self.changed = changed
        self.sessions: list[dict[str, Any]] = []
        self.trained = False
        self._continued = False
        self._logged: dict[str, float] = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over what was logged; let the schedule be the config's."""
        kept = checkpoint.get(_KEY, {})
        self._logged, self.sessions = kept.get("logged", {}), kept.get("continued", [])
        self._continued = True
        checkpoint["lr_schedulers"] = []  # none is restored: see on_train_start
        _reopen_cut_epoch(checkpoint["loops"]["fit_loop"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning is about to restore the optimisers."""
        for optimizer in trainer.optimizers:
            optimizer.register_load_state_dict_pre_hook(_with_own_settings)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the schedules to where the run is."""
        self.trained = True
        if not self._continued:
            return
        progress: Any = trainer.fit_loop.epoch_progress.current
        epochs, steps = progress.processed, _steps_behind(trainer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, that the optimiser has made no step yet
            for config in trainer.lr_scheduler_configs:
                scheduler: Any = config.scheduler
                for _ in range(epochs if config.interval == "epoch" else steps):
                    scheduler.step()
        self.sessions = [
            *self.sessions,
            {"epoch": epochs, "step": trainer.global_step, "changed": self.changed},
        ]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what the next session needs to know."""
        checkpoint[_KEY] = {"logged": self.logged(trainer), "continued": self.sessions}

    def logged(self, trainer: pl.Trainer) -> dict[str, float]:
        """The last value of every figure that the run has logged in any of its sessions."""
        now = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {**self._logged, **now}


def whole_epochs(trainer: pl.Trainer) -> int:
    """How many epochs a Trainer has done from first to last batch, earlier sessions' included."""
    loop = trainer.fit_loop
    return _whole_epochs(
        {
            "epoch_progress": loop.epoch_progress.state_dict(),
            "epoch_loop.batch_progress": loop.epoch_loop.batch_progress.state_dict(),
        }
    )


def _whole_epochs(fit_loop: Mapping[str, Any]) -> int:
    return fit_loop["epoch_progress"]["current"]["processed"] - _is_cut(fit_loop)


def _is_cut(fit_loop: Mapping[str, Any]) -> bool:
    """Whether the last epoch that counts as processed ended before its last batch."""
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]["current"]
    counted = epochs["processed"] > 0 and epochs["processed"] == epochs["started"]
    return counted and not batches["is_last_batch"]


def _reopen_cut_epoch(fit_loop: dict[str, Any]) -> None:
    if _is_cut(fit_loop):
        for counts in fit_loop["epoch_progress"].values():
            counts["processed"] -= 1
            counts["completed"] = min(counts["completed"], counts["processed"])


def _steps_behind(trainer: pl.Trainer) -> int:
    """Optimiser steps after which an undisturbed run of this config is where this one is."""
    loop, accumulated = trainer.fit_loop, trainer.accumulate_grad_batches
    each = -(-int(trainer.num_training_batches) // accumulated)
    epochs: Any = loop.epoch_progress.current
    begun = epochs.started > epochs.processed
    batches = loop.epoch_loop.batch_progress.current.ready if begun else 0
    return epochs.processed * each + batches // accumulated


def _with_own_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state of an optimiser, with the rates, weight decay, ... that it has itself.

    Raises:
        InputError: if it is the state of another optimiser.
    """
    ours, theirs = optimizer.param_groups, state["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"resume_from_checkpoint: the checkpoint's optimizer has {_groups(sizes[0])}, this "
            f"config's {_groups(sizes[1])}; expected a config (and a version) with the same"
        )
    # Another version of PyTorch knows more settings or fewer, another optimiser knows others.
    keys = [set(group) - {"params"} for group in (theirs[0], ours[0])]
    if (keys[0] - keys[1]) and (keys[1] - keys[0]):
        raise InputError(
            f"optimizer.name: the checkpoint's optimizer has {', '.join(sorted(keys[0] - keys[1]))}, "
            f"this config's {', '.join(sorted(keys[1] - keys[0]))}; expected the same optimizer"
        )
    groups = [{**own, "params": saved["params"]} for own, saved in zip(ours, theirs, strict=True)]
    return {**state, "param_groups": groups}


def _groups(sizes: list[int]) -> str:
    return f"{len(sizes)} groups of {', '.join(map(str, sizes))} parameters"


def _runs(cfg: DictConfig) -> list[Path]:
    files = (Path(cfg.checkpoint.dir) / cfg.method).glob("*/args.json")
    return sorted(file.parent for file in files if file.is_file())


def _is_running(folder: Path) -> bool:
    try:
        with open(folder / "run.lock", "r+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or the file system has no locks
        return False
    return False


def _in_use(folder: Path) -> InputError:
    try:
        holder = (folder / "run.lock").read_text(encoding="utf-8").strip()
    except OSError:
        holder = ""
    return InputError(
        f"checkpoint.dir: {str(folder)!r} is in use by {holder or 'another process'}, which trains "
        "this run; wait for its end or stop it (another checkpoint.dir starts another run)"
    )


def _decisive(differing: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Those of `changes` that make another run."""
    return {
        key: values
        for key, values in differing.items()
        if not any(key == free or key.startswith(free + ".") for free in _FREE_TO_CHANGE)
    }


def _in_words(differing: dict[str, list[Any]]) -> str:
    shown = [
        f"{key} {then!r} (here {now!r})" for key, (then, now) in list(differing.items())[:_SHOWN]
    ]
    more = len(differing) - len(shown)
    return ", ".join(shown) + (f" and {more} more differences" if more else "")


def _completed(defaults: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """`args` with defaults; in plain dictionaries, since a strange file may hold interpolations."""
    merged = {**defaults, **args}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(merged[key], Mapping):
            merged[key] = _completed(default, merged[key])
    return merged


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested groups as {"group.key": value}; a list of groups is one of them by its numbers."""
    if isinstance(tree, list) and tree and all(isinstance(item, Mapping) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
