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
logs/, metrics.json and training.png. `--help` beside a --config-name prints that config.
"""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from .cli import run
from .config import prepare_config, scale_learning_rates
from .data import evaluation_loader, place_of, training_loader
from .evaluate.curves import draw_curves
from .evaluate.encoder import describe_pretraining
from .evaluate.final_table import final_table, format_table
from .files import write_json
from .reading import check_architecture, read_checkpoint
from .training.checkpoints import find_checkpoint, new_run_folder
from .training.model import build_model
from .training.processes import announce_dead_processes
from .training.trainer import attach_outputs, build_trainer


def pretrain(cfg: DictConfig) -> dict[str, Any]:
    """Run one pre-training from start, or from a checkpoint, to end.

    Args:
        cfg: solo-learn's schema plus `gating`; completed in place.

    Returns:
        What `metrics.json` holds: the last logged figures, and the final table's rows.

    Raises:
        InputError: before training, for a config, checkpoint or data that cannot be used.
        NonFiniteLossError: for a loss that becomes infinite or NaN.
    """
    prepare_config(cfg)
    trainer = build_trainer(cfg)
    train = training_loader(cfg, place_of(trainer))
    val = None if cfg.data.val_path is None else evaluation_loader(cfg, "val")
    scale_learning_rates(cfg, trainer.world_size)
    model = build_model(cfg)  # completes the config, with which checkpoints are compared
    checkpoint = _checkpoint_to_continue(cfg)
    folder = checkpoint.parent if checkpoint else new_run_folder(cfg)
    if checkpoint is not None:
        check_architecture(model, read_checkpoint(checkpoint, "resume_from_checkpoint"), checkpoint)
    attach_outputs(trainer, cfg, folder)

    if trainer.is_global_zero:
        print(f"{'continuing' if checkpoint else 'writing to'} {folder}", flush=True)
    announce_dead_processes()
    trainer.fit(model, train, val, ckpt_path=checkpoint)
    metrics: dict[str, Any] = {
        "pretraining": describe_pretraining(cfg, trainer.current_epoch, folder / "last.ckpt"),
        "data": {
            "dataset": cfg.data.dataset,
            "train_images": len(train.dataset),
            "val_images": len(val.dataset) if val else 0,  # type: ignore[arg-type]
            "resolution": [cfg.augmentations[0].crop_size] * 2,
        },
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
    if cfg.final_knn.enabled:  # on every process: each computes its share of the features
        table = _final_table(cfg, model, trainer.strategy.root_device)
        metrics.update(table)
    if not trainer.is_global_zero:
        return metrics

    if cfg.final_knn.enabled:
        print(f"\n{format_table(table)}\n")
    write_json(folder / "metrics.json", metrics)
    picture = draw_curves(folder, (cfg.get("gating") or {}).get("target_budget"), cfg.name)
    print("\n".join(str(file) for file in (folder / "metrics.json", picture) if file))
    return metrics


def _checkpoint_to_continue(cfg: DictConfig) -> Path | None:
    if cfg.resume_from_checkpoint is not None:
        return Path(cfg.resume_from_checkpoint)
    return find_checkpoint(cfg) if cfg.auto_resume.enabled else None


def _final_table(cfg: DictConfig, model: Any, device: torch.device) -> dict[str, Any]:
    paths = getattr(model, "trained_paths", (None,))
    # The same seed: as it was before training. Not worth compiling for one pass over the images.
    untrained: Any = build_model(OmegaConf.merge(cfg, {"performance": {"compile": False}}))  # type: ignore[arg-type]
    return final_table(
        model.to(device).backbone,
        untrained.to(device).backbone,
        paths,
        evaluation_loader(cfg, "train"),
        evaluation_loader(cfg, "val"),
        cfg.final_knn.labels_per_class,
        cfg.final_knn.draws,
        cfg.final_knn.budgets,
    )


def main() -> None:
    """Entry point."""
    run(pretrain)


if __name__ == "__main__":
    main()
