"""Pre-train an encoder without labels: dense and gated at once, or any solo-learn method.

    python -m solo_gating.main_pretrain --config-name vicreg_dual_cifar100 [key=value ...]

The config is solo-learn's, plus the group `gating`, and any Lightning Trainer argument. Some keys:

    gating.target_budget=0.3        share of the dense FLOPs that the gated path should use
    data.train_path, data.val_path  where the images are
    data.format=npz                 arrays: `images` uint8 N×H×W×3 and `labels`
    backbone.kwargs.width=16        a narrower network; backbone.kwargs.stem=cifar for small images
    max_epochs, optimizer.lr, optimizer.batch_size, devices, strategy, precision
    auto_resume.enabled=true        continue an interrupted run with the same config

Writes into <checkpoint.dir>/<method>/<run>/: args.json and last.ckpt (solo-learn's layout),
logs/, metrics.json and training.png; run.lock keeps a second process out of it. `--help` beside a
--config-name prints that config.
"""

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf

from ..checkpoints.reading import read_checkpoint
from ..config.pretraining import prepare_config, scale_learning_rates
from ..config.schema import own_copy
from ..data import evaluation_loader, has_labels, place_of, training_loader
from ..errors import InputError
from ..evaluate.evaluation import statistics_loader
from ..evaluate.table import final_table, format_table
from ..files import make_folder, read_json, remove_leftovers, write_json
from ..gates import gate_class
from ..metrics import data_of, pretraining_of
from ..plots.training import draw_curves
from ..process_state import process_state_kept
from ..terminal import say
from .checkpoints import new_run_folder, read_args
from .continuation import (
    Continuation,
    changes,
    check_continuable,
    find_checkpoint,
    locked,
    refuse_if_running,
    whole_epochs,
)
from .model import build_model
from .processes import announce_dead_processes
from .trainer import attach_outputs, build_trainer, refusals


@process_state_kept()
def pretrain(cfg: DictConfig) -> dict[str, Any]:
    """Run one pre-training from start, or from a checkpoint, to end.

    Args:
        cfg: solo-learn's schema plus `gating`; left as it is.

    Returns:
        What `metrics.json` holds: the last logged figures, and the final table's rows.

    Raises:
        InputError: before training, for a config, checkpoint or data that cannot be used.
        NonFiniteLossError: for a loss or a weight that becomes infinite or NaN.
    """
    with ExitStack() as run:
        return _pretrain(cfg, run)


def _pretrain(cfg: DictConfig, run: ExitStack) -> dict[str, Any]:
    cfg = prepare_config(own_copy(cfg))
    trainer = build_trainer(cfg)
    train = training_loader(cfg, place_of(trainer))
    val = None if cfg.data.val_path is None else evaluation_loader(cfg, "val")
    if cfg.final_knn.enabled:
        for split, loader in (("train", train), ("val", val)):
            if not has_labels(loader):
                raise InputError(
                    f"data.{split}_path: no image has a label, final_knn.enabled=true needs some"
                )
    scale_learning_rates(cfg, trainer.world_size)
    model = build_model(cfg)  # completes the config, with which checkpoints are compared
    checkpoint = _checkpoint_to_continue(cfg, trainer.is_global_zero)
    folder = checkpoint.parent if checkpoint else new_run_folder(cfg)
    if checkpoint is not None:
        content = read_checkpoint(checkpoint, "resume_from_checkpoint")
        check_continuable(model, content, cfg, checkpoint)
    if trainer.is_global_zero:
        remove_leftovers(folder.parent)  # of a run that never came to its first checkpoint, too
        weights = sum(value.nbytes for value in model.state_dict().values())
        make_folder(folder, weights if cfg.checkpoint.enabled else 0)
        run.enter_context(locked(folder))
    continuation = Continuation(changes(read_args(folder), cfg) if checkpoint else {})
    trainer.callbacks.append(continuation)  # type: ignore[attr-defined]
    attach_outputs(trainer, cfg, folder)

    pretrained = None
    if cfg.pretrained is not None and cfg.final_knn.enabled:
        # For the table; its file may be gone at the end of the run.
        pretrained = copy.deepcopy(model.backbone)
    if trainer.is_global_zero:
        say(f"{'continuing' if checkpoint else 'writing to'} {folder}")
    announce_dead_processes()
    with refusals():
        trainer.fit(model, train, val, ckpt_path=checkpoint)
    epochs, file = whole_epochs(trainer), folder / "metrics.json"
    if not continuation.trained and file.is_file():
        before = read_json(file)
        if before.get("steps") == trainer.global_step:
            if trainer.is_global_zero:
                say(f"nothing left to train after {epochs} epochs: {file} stays as it is")
            return before
    metrics: dict[str, Any] = {
        "pretraining": pretraining_of(cfg, epochs, _saved(trainer, folder)),
        "data": data_of(
            cfg,
            len(train.dataset),
            len(val.dataset) if val else 0,  # type: ignore[arg-type]
            train=train,
            val=val,
        ),
        "epochs": epochs,
        "finished": epochs >= cfg.max_epochs,  # not if a limit of the Trainer stopped it
        "steps": trainer.global_step,
        "continued": continuation.sessions,
        "logged": continuation.logged(trainer),
    }
    if cfg.final_knn.enabled:  # on every process: each computes its share of the features
        table = _final_table(cfg, model, pretrained, trainer.strategy.root_device)
        metrics.update(table)
    if not trainer.is_global_zero:
        return metrics

    write_json(folder / "metrics.json", metrics)
    gating = cfg.get("gating") or {}
    dial = gate_class(gating.get("gate", "channel")).dial
    picture = draw_curves(folder, gating.get("target_budget"), cfg.name, dial)
    if cfg.final_knn.enabled:
        say(f"\n{format_table(table)}\n")
    say("\n".join(str(file) for file in (folder / "metrics.json", picture) if file))
    return metrics


def _checkpoint_to_continue(cfg: DictConfig, is_first: bool) -> Path | None:
    if cfg.resume_from_checkpoint is not None:
        return Path(cfg.resume_from_checkpoint)
    if not cfg.auto_resume.enabled:
        return None
    checkpoint, why = find_checkpoint(cfg)
    if is_first:
        refuse_if_running(cfg)
        if why:
            say(f"auto_resume starts from zero: {why}")
    return checkpoint


def _saved(trainer: pl.Trainer, folder: Path) -> Path | None:
    """`last.ckpt`, if it holds what the Trainer has trained."""
    file = folder / "last.ckpt"
    try:
        content = read_checkpoint(file, "last.ckpt")
    except InputError:  # with checkpoint.enabled=false: there is none, or a damaged one
        return None
    return file if content.get("global_step") == trainer.global_step else None


def _final_table(cfg: DictConfig, model: Any, start: Any, device: torch.device) -> dict[str, Any]:
    paths = getattr(model, "trained_paths", (None,))
    images = getattr(model, "recalibrate", 0)
    if start is None:
        # The same seed: as it was before training. Not worth compiling for one pass over the images.
        uncompiled: Any = OmegaConf.merge(cfg, {"performance": {"compile": False}})
        start = build_model(uncompiled).backbone
    return final_table(
        model.to(device).backbone,
        start.to(device),
        paths,
        evaluation_loader(cfg, "train"),
        evaluation_loader(cfg, "val"),
        cfg.final_knn.labels_per_class,
        cfg.final_knn.draws,
        cfg.final_knn.budgets,
        statistics_loader(cfg, images) if images else None,
        "untrained" if cfg.pretrained is None else "pretrained",
    )
