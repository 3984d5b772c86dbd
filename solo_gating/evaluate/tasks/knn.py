"""k-nearest-neighbour accuracy of a frozen encoder, on its dense and its gated path.

    python -m solo_gating.main_knn checkpoint=PATH/last.ckpt [key=value ...]

    path=dense|gated|both       default: both, if both were trained
    k=1 distance=euclidean      the papers'; distance=cosine votes with exp(cosine / temperature)
    normalize=true              scale features to length 1 first
    features=projector          the projector's output instead of the backbone's
    'k=[1,5,20]'                a list, of any of k, distance, temperature: every combination
    dataset=cifar10             other images than the checkpoint's (transfer), from data.train_path,
                                data.val_path, data.format
    threshold=0.4               of the gates (main_policy --calibrate)
    budget=0.3                  that the gates are told, of a network trained for a range
    recalibrate=2048            BatchNorm statistics of the path at this budget, from so many unlabelled
                                training images; 0: those of training. Default: 2048 for us3l, else 0

Writes metrics.json into a folder beside the checkpoint (output=...).
"""

from dataclasses import replace
from itertools import product
from typing import Any

from omegaconf import DictConfig, ListConfig

from ...checks import is_int, is_positive, require
from ...config.schema import EVALUATIONS, own_copy
from ...process_state import process_state_kept
from ..evaluation import flops_row, prepare_evaluation
from ..knn import DISTANCES, knn_top1

_SETTINGS = ("k", "distance", "temperature", "normalize")


@process_state_kept()
def evaluate_knn(cfg: DictConfig) -> dict[str, Any]:
    """Classify the validation images by their nearest training images.

    Args:
        cfg: a kNN config; left as it is.

    Returns:
        What `metrics.json` holds: for each path `knn_top1` of the first combination of settings,
        and `knn`, a list of all of them.

    Raises:
        InputError: before any long work, for a config, checkpoint or data that cannot be used.
    """
    cfg = own_copy(cfg, EVALUATIONS["knn"])
    combinations = _combinations(cfg)
    evaluation = prepare_evaluation(cfg, "knn", _SETTINGS, ("train", "val"))
    _check_neighbors(combinations, len(evaluation.loaders["train"].dataset))  # type: ignore[arg-type]
    rows: dict[str, dict[str, Any]] = {}
    for path in evaluation.paths:
        with evaluation.of_path(path):
            train = evaluation.extract_labelled("train", path)
            _check_neighbors(combinations, int((train.targets >= 0).sum()))
            val = evaluation.extract_labelled("val", path)
        results = []
        for settings in combinations:
            top1 = knn_top1(
                (train.features, train.targets),
                (val.features, val.targets),
                **settings,
                normalize=cfg.normalize,
            )
            results.append(settings | {"knn_top1": top1})
            words = ", ".join(f"{key} {value}" for key, value in settings.items())
            evaluation.say(f"{path}: {top1:.2f} % ({words})")
        rows[path] = {
            "knn_top1": results[0]["knn_top1"],
            "knn": results,
            **flops_row(val, evaluation.encoder),
        }
        if "flops_cut" in rows[path]:
            evaluation.say(f"{path}: FLOPs cut by {rows[path]['flops_cut']:.2%}")
    first = replace(evaluation, settings=evaluation.settings | combinations[0])
    return first.write(rows, len(train.targets))


def _check_neighbors(combinations: list[dict[str, Any]], images: int) -> None:
    for settings in combinations:
        require("k", settings["k"], lambda k: k <= images, f"at most {images}, the training images")


def _combinations(cfg: DictConfig) -> list[dict[str, Any]]:
    """Every combination of settings, checked; the temperature only where it has an effect."""
    values = {key: _listed(cfg[key]) for key in ("k", "distance", "temperature")}
    for key, listed in values.items():
        require(key, listed, len, "a value, or a list of at least one")
    for k in values["k"]:
        require("k", k, lambda v: is_int(v, 1), "an integer ≥ 1, or a list of them")
    for distance in values["distance"]:
        require("distance", distance, lambda v: v in DISTANCES, " or ".join(DISTANCES))
    for temperature in values["temperature"]:
        require("temperature", temperature, is_positive, "a number > 0")
    found = []
    for k, distance, temperature in product(*values.values()):
        settings = {"k": k, "distance": distance}
        if distance == "cosine":
            settings["temperature"] = temperature
        if settings not in found:
            found.append(settings)
    return found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, ListConfig)) else [value]
