"""What a `metrics.json` holds: one definition for those who write it and those who read it.

    {
      "pretraining": {...},             which run it is of, see `pretraining_of`
      "data": {                         see `data_of`
        "dataset": "cifar100", "train_images": 50000, "val_images": 10000,
        "resolution": [32, 32],         height and width
        "skipped_images": {...}         damaged ones, where these do not stop a run
      },

      of a pre-training:
      "epochs": 500, "finished": true, "steps": 97500, "continued": [...],
      "logged": {...},                  the last figures of the log
      "raw", "untrained" (or "pretrained"), "dense", "gated", "gated at 0.1": {...}    of its 1-NN table

      of an evaluation:
      "evaluation": "knn",              linear, knn, policy or umap
      "identity": "3fa9c1",             of settings, data and encoder; other paths of it share the file
      "settings": {...},                those that decide the result; absent ones: DEFAULT_SETTINGS
      "dense", "gated": {               a row for each path
        "knn_top1": 55.5,               accuracy in percent; linear_top1 with linear_top1_std
        "flops": 703560448,             multiply-accumulates per image, exact mean over the images
        "flops_cut": 0.67, ...          1 − share of the dense FLOPs, on the gated path
      }
    }

A figure that does not exist is null.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .data import skipped_images

ACCURACIES = ("linear", "knn")

# What an evaluation does if its `settings` do not say otherwise; so does a pre-training's own 1-NN.
DEFAULT_SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"threshold": 0.0, "precision": "32-true"},
    "knn": {
        "k": 1,
        "distance": "euclidean",
        "normalize": False,
        "features": "backbone",
        "threshold": 0.0,
        "precision": "32-true",
    },
}


def pretraining_of(args: DictConfig, epochs: int, checkpoint: Path | None) -> dict[str, Any]:
    """The key `pretraining`: method, data, network, length, budget, seed.

    The target budget is a number, or a list of both ends of a range. A student's `policy` says how many
    FLOPs the gated encoder used whose channels are its widths.

    Args:
        args: a complete pre-training config.
        epochs: epochs done.
        checkpoint: its file, if there is one.
    """

    def group(key: str) -> Any:
        return OmegaConf.to_container(args[key], resolve=True) if args.get(key) else None

    policy = OmegaConf.select(args, "backbone.policy")
    student = {} if policy is None else {"policy": OmegaConf.to_container(policy, resolve=True)}
    return {
        "name": args.get("name"),
        "method": args.method,
        "dataset": args.data.dataset,
        "backbone": args.backbone.name,
        "width": (args.backbone.get("kwargs") or {}).get("width", 64),
        "epochs": epochs,
        "target_budget": (group("gating") or {}).get("target_budget"),
        "gating": group("gating"),
        "method_kwargs": group("method_kwargs"),
        "optimizer": group("optimizer"),
        "fraction": args.data.get("fraction", -1),
        "seed": args.get("seed"),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        **student,
    }


def data_of(cfg: DictConfig, train_images: int, val_images: int, **loaders: Any) -> dict[str, Any]:
    """The key `data`.

    Args:
        cfg: a complete config, of a pre-training or an evaluation.
        train_images: how many there were.
        val_images: how many there were.
        loaders: by split, to count what they skipped.
    """
    return {
        "dataset": cfg.data.dataset,
        "train_images": train_images,
        "val_images": val_images,
        "resolution": [cfg.augmentations[0].crop_size] * 2,
        **skipped_images(cfg, **loaders),
    }
