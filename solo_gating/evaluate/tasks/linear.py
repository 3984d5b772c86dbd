"""Linear evaluation of a frozen encoder, on its dense and its gated path.

    python -m solo_gating.main_linear checkpoint=PATH/last.ckpt [key=value ...]

    path=dense|gated|both       default: both, if both were trained
    seeds=5                     classifiers to train; the result is mean ± std over them
    augment=false               compute features once, for all epochs and seeds: much faster, and
                                not quite the published recipe
    dataset=cifar10             other images than the checkpoint's (transfer), from data.train_path,
                                data.val_path, data.format
    threshold=0.4               of the gates (main_policy --calibrate)
    budget=0.3                  that the gates are told, of a network trained for a range
    recalibrate=2048            BatchNorm statistics of the path at this budget, as for main_knn

Without --config-name: the images of pre-training. Writes metrics.json and a file for each finished
classifier into a folder beside the checkpoint (output=...); the same command again trains only the
missing ones.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from ...checks import is_not_negative, require
from ...config.pretraining import check_optimizer
from ...config.schema import EVALUATIONS, SEED, own_copy
from ...data import classification_loader
from ...files import read_json, write_json
from ...process_state import process_state_kept
from ...texts import aligned
from ..evaluation import Evaluation, flops_row, prepare_evaluation
from ..extract import Extraction
from ..linear import train_on_features, train_on_images
from ..table import figure

_SETTINGS = ("max_epochs", "augment", "optimizer", "scheduler")


@process_state_kept()
def evaluate_linear(cfg: DictConfig) -> dict[str, Any]:
    """Train the missing classifiers and write the figures of all.

    Args:
        cfg: a linear-evaluation config; left as it is.

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: before training, for a config, checkpoint or data that cannot be used.
    """
    cfg = own_copy(cfg, EVALUATIONS["linear"])
    SEED.check("seed + seeds", cfg.seed + cfg.seeds)
    check_optimizer(cfg.optimizer)
    cfg.optimizer.setdefault("scale_lr", False)
    splits = ("val",) if cfg.augment else ("train", "val")
    evaluation = prepare_evaluation(cfg, "linear", _SETTINGS, splits)
    augmented = classification_loader(cfg) if cfg.augment else None
    finished = {path: _finished(evaluation, path) for path in evaluation.paths}
    rows = {}
    for path in evaluation.paths:
        with evaluation.of_path(path):
            val = evaluation.extract_labelled("val", path)
            results = _train_missing(evaluation, path, augmented, val, finished[path])
        rows[path] = summarise(results) | flops_row(val, evaluation.encoder)
    train: Any = augmented or evaluation.loaders["train"]
    metrics = evaluation.write(rows, len(train.dataset), train)
    evaluation.say("\n" + format_rows(rows) + "\n")
    return metrics


def _seeds(evaluation: Evaluation, path: str) -> dict[int, Path]:
    """Each seed, and the file of its result."""
    cfg = evaluation.cfg
    return {
        seed: evaluation.folder / f"{path}-seed{seed}.json"
        for seed in range(cfg.seed, cfg.seed + cfg.seeds)
    }


def _finished(evaluation: Evaluation, path: str) -> dict[int, dict[str, Any]]:
    """The results of seeds that have one in the same settings.

    Raises:
        InputError: for a file that cannot be one.
    """
    found = {}
    for seed, file in _seeds(evaluation, path).items():
        result = read_json(file) if file.exists() else {}
        if result.get("settings") == evaluation.identity:
            for key in ("top1", "top5"):
                require(
                    f"{str(file)!r}: {key}",
                    result.get(key),
                    lambda v: is_not_negative(v) and v <= 100,
                    "a number from 0 to 100; without the file the classifier is trained again",
                )
            found[seed] = result
    return found


def _train_missing(
    evaluation: Evaluation,
    path: str,
    augmented: Any,
    val: Extraction,
    finished: dict[int, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Each seed's result: one that is finished, or from a training whose result then gets a file."""
    cfg, train = evaluation.cfg, None
    results: list[dict[str, Any]] = []
    for seed, file in _seeds(evaluation, path).items():
        result = finished.get(seed, {})
        if not result:
            start = time.perf_counter()
            if augmented is not None:
                accuracies = train_on_images(evaluation, path, augmented, val, seed)
            else:
                train = train or evaluation.extract_labelled("train", path)
                accuracies = train_on_features(cfg, train, val, seed, evaluation.fabric.device)
            result = {
                **accuracies,
                "seconds": time.perf_counter() - start,
                "settings": evaluation.identity,
            }
            if evaluation.fabric.is_global_zero:
                write_json(file, result)
            evaluation.say(f"{path}, seed {seed}: top-1 {result['top1']:.2f} %")
            evaluation.fabric.barrier()
        results.append(result)
    return results


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of `metrics.json`: mean and standard deviation over seeds, as in the papers' tables.

    The deviation is that of a sample (n − 1); absent for a single seed.
    """
    top1 = [result["top1"] for result in results]
    row: dict[str, Any] = {
        "linear_top1": float(np.mean(top1)),
        "linear_top5": float(np.mean([result["top5"] for result in results])),
        "linear_top1_seeds": top1,
    }
    if len(top1) > 1:
        row["linear_top1_std"] = float(np.std(top1, ddof=1))
    return row


def format_rows(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [["linear, %", "top-1", "top-5", "FLOPs/image", "cut"]]
    for path, row in rows.items():
        top1 = f"{row['linear_top1']:.2f}"
        if "linear_top1_std" in row:
            top1 += f" ± {row['linear_top1_std']:.2f}"
        kinds = {"linear_top5": ".2f", "flops": ".4g", "flops_cut": ".2%"}
        lines.append([path, top1, *(figure(row.get(key), kind) for key, kind in kinds.items())])
    return "\n".join(aligned(lines))
