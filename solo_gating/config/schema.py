"""What each config key accepts, in one table for each command.

A key that is in no table, and that no other value refers to as `${key}`, is read by nothing: it is
refused, with the nearest key that exists. What depends on several keys is checked in `config`.
"""

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..backbones import PATHS
from ..checkpoints.reading import LARGEST_SIDE, as_text, literal
from ..checks import (
    Kind,
    are_three,
    is_int,
    is_not_negative,
    is_number,
    is_positive,
    no_such_key,
    shown,
)
from ..errors import InputError
from .arguments import ALIASES, todays_name

Table = Mapping[str, Kind]

_LONGEST_NAME = 200  # bytes; files of that name have an ending, too
_MOST_WORKERS = 1024
_MOST_REPEATS = 10_000


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()


def _is_name(value: Any) -> bool:
    """Whether a file can have the name; numbers are names, too."""
    text = str(value)
    return (
        (isinstance(value, str) or is_number(value))
        and text.isprintable()
        and "/" not in text
        and text.strip(" .") != ""
        and len(text.encode(errors="surrogateescape")) <= _LONGEST_NAME
    )


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and "\0" not in value


def _are_paths(value: Any) -> bool:
    return _is_path(value) or (
        isinstance(value, list) and value != [] and all(map(_is_path, value))
    )


def _is_devices(value: Any) -> bool:
    if isinstance(value, list):
        return value != [] and all(is_int(device, 0) for device in value)
    if isinstance(value, str):
        return re.fullmatch(r"auto|-1|[1-9]\d*|\d+(, ?\d+)*,?", value) is not None
    return value == -1 or is_int(value, 1)


def whole(least: int, most: int | None = None) -> Kind:
    """Integers."""
    if most is None:
        return Kind(lambda v: is_int(v, least), f"an integer ≥ {least}")
    return Kind(lambda v: is_int(v, least) and v <= most, f"an integer from {least} to {most}")


def among(*names: Any) -> Kind:
    """Some values, told apart from others that Python holds for equal."""
    return Kind(
        lambda v: any(v == name and type(v) is type(name) for name in names),
        "one of " + ", ".join("null" if name is None else str(name) for name in names),
    )


def _amount(least: int) -> Kind:
    """How much of the batches Lightning takes: so many, or a share of them."""
    return Kind(
        lambda v: (
            is_int(v, least) or (isinstance(v, float) and (v > 0 or least == 0) and 0 <= v <= 1)
        ),
        f"an integer ≥ {least} or a number {'in (0, 1]' if least else 'from 0 to 1'}",
    )


ANY = Kind(lambda v: True, "anything")  # it is checked elsewhere, or by Lightning
TRUTH = Kind(lambda v: isinstance(v, bool), "true or false")
COUNT = whole(1)
NUMBER = Kind(is_number, "a number")
NOT_NEGATIVE = Kind(is_not_negative, "a number ≥ 0")
POSITIVE = Kind(is_positive, "a number > 0")
PROBABILITY = Kind(lambda v: is_not_negative(v) and v <= 1, "a number from 0 to 1")
TEXT = Kind(_is_text, "a text")
NAME = Kind(_is_name, f"a name without / that is at most {_LONGEST_NAME} bytes long")
PATH = Kind(_is_path, "a path")
PATH_OR_NULL = PATH.or_null()
PATHS_OR_NULL = Kind(lambda v: v is None or _are_paths(v), "a path, or a list of them, or null")
GROUP = Kind(lambda v: v is None or isinstance(v, Mapping), "a group of keys")
SEED = whole(0, 2**32 - 1)
CROP = whole(1, LARGEST_SIDE)
PAIR = Kind(lambda v: isinstance(v, list) and len(v) == 2 and all(map(is_number, v)), "two numbers")

_PRECISIONS = [f"{kind}-{use}" for kind in ("16", "bf16") for use in ("mixed", "true")]
_HARDWARE: Table = {
    "seed": SEED,
    "accelerator": TEXT.or_null(),
    "devices": Kind(_is_devices, "an integer ≥ 1, -1, auto, or a list of devices' numbers"),
    "num_nodes": COUNT,
    "strategy": TEXT.or_null(),
    "precision": among(
        *_PRECISIONS, "32-true", "64-true", "16", "32", "64", "bf16", 16, 32, 64, None
    ),
}
_OPTIMIZATION: Table = {
    "max_epochs": COUNT,
    "optimizer.name": ANY,
    "optimizer.batch_size": ANY,
    "optimizer.lr": ANY,
    "optimizer.classifier_lr": NOT_NEGATIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.exclude_bias_n_norm_wd": TRUTH,
    "optimizer.layer_decay": NOT_NEGATIVE,
    "optimizer.kwargs": GROUP,
    "scheduler.name": among("warmup_cosine", "step", "none"),
    "scheduler.warmup_epochs": NOT_NEGATIVE,
    "scheduler.warmup_start_lr": NOT_NEGATIVE,
    "scheduler.min_lr": NOT_NEGATIVE,
    "scheduler.interval": among("step", "epoch"),
    "scheduler.lr_decay_steps": Kind(
        lambda v: isinstance(v, list) and v != [] and all(is_int(step, 0) for step in v),
        "a list of epochs",
    ).or_null(),
    "performance.disable_channel_last": TRUTH,
    "performance.compile": TRUTH,
    "enable_progress_bar": TRUTH,
}
_TRAINER: Table = {
    **{key: ANY for key in inspect.signature(pl.Trainer.__init__).parameters if key != "self"},
    "min_epochs": COUNT.or_null(),
    "max_steps": Kind(lambda v: v == -1 or is_int(v, 1), "an integer ≥ 1, or -1"),
    "min_steps": COUNT.or_null(),
    "limit_train_batches": _amount(1).or_null(),
    "limit_val_batches": _amount(0).or_null(),
    "overfit_batches": _amount(0),
    "val_check_interval": _amount(1).or_null(),
    "check_val_every_n_epoch": COUNT.or_null(),
    "log_every_n_steps": COUNT,
    "gradient_clip_val": POSITIVE.or_null(),
    "fast_dev_run": Kind(
        lambda v: isinstance(v, bool) or is_int(v, 1), "true, false or an integer"
    ),
    "enable_model_summary": TRUTH,
    "num_sanity_val_steps": whole(-1),
    "detect_anomaly": TRUTH,
    "deterministic": among(True, False, "warn", None),
    "benchmark": TRUTH.or_null(),
    "sync_batchnorm": TRUTH,
    "reload_dataloaders_every_n_epochs": whole(0),
    "callbacks": Kind(lambda v: v is None or v == [], "null: a config cannot hold them"),
    "plugins": Kind(lambda v: v is None or v == [], "null: a config cannot hold them"),
    "logger": among(True, None),  # of CSV files; wandb.enabled adds another
}

PRETRAINING: Table = {
    **_TRAINER,
    **_HARDWARE,
    **_OPTIMIZATION,
    "name": NAME,
    "method": ANY,
    "resume_from_checkpoint": PATH_OR_NULL,
    "pretrained": PATH_OR_NULL,
    "optimizer.layer_decay": Kind(lambda v: v == 0, "0: only linear evaluation reads it"),
    "accumulate_grad_batches": COUNT,
    "backbone.name": ANY,
    "backbone.kwargs": GROUP,
    "backbone.policy": GROUP,  # what a run records of it
    "data.dataset": ANY,
    "data.train_path": PATHS_OR_NULL,
    "data.val_path": PATHS_OR_NULL,
    "data.format": ANY,
    "data.pipeline": ANY,
    "data.no_labels": TRUTH,
    "data.fraction": ANY,
    "data.on_damaged": ANY,
    "data.num_workers": whole(0, _MOST_WORKERS),
    "data.num_classes": ANY,
    "data.split": among("train", "train+unlabeled", "unlabeled", None),
    "data.num_large_crops": ANY,
    "data.num_small_crops": ANY,
    "image_size": CROP.or_null(),  # what views in our configs refer to
    "augmentations": ANY,
    "checkpoint.enabled": TRUTH,
    "checkpoint.dir": PATH,
    "checkpoint.frequency": whole(0),
    "checkpoint.keep_prev": TRUTH,
    "auto_resume.enabled": TRUTH,
    "auto_resume.max_hours": NOT_NEGATIVE,
    "wandb.enabled": TRUTH,
    "wandb.entity": TEXT.or_null(),
    "wandb.project": TEXT,
    "wandb.offline": TRUTH,
    "wandb_run_id": ANY,
    "knn_eval.enabled": TRUTH,
    "knn_eval.k": COUNT,
    "knn_eval.distance_func": among("euclidean", "cosine"),
    "method_kwargs": GROUP,
    "momentum.base_tau": PROBABILITY,
    "momentum.final_tau": PROBABILITY,
    "momentum.classifier": TRUTH,
    "gating": ANY,
    "final_knn.enabled": TRUTH,
    "final_knn.labels_per_class": COUNT,
    "final_knn.draws": whole(1, _MOST_REPEATS),
    "final_knn.budgets": Kind(lambda v: v is None or isinstance(v, list), "a list like [0.1, 0.3]"),
    "flops.checkpoint": PATH_OR_NULL,
    "flops.images": COUNT,
    "flops.budget": NUMBER.or_null(),
    "flops.output": PATH_OR_NULL,
    # solo-learn's, of no effect here.
    **dict.fromkeys(("augmentations_cfg", "auto_umap", "dali", "debug_augmentations"), ANY),
    **dict.fromkeys(("finetune", "wandb_cfg", "hydra"), ANY),
}

# Of solo-learn's methods, on both lines, and of our students; those of one's own may have others.
METHOD_KWARGS: Table = {
    **dict.fromkeys(
        ("sim_loss_weight", "var_loss_weight", "cov_loss_weight", "lamb", "scale_loss"),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            *("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim", "queue_size", "sk_iters"),
            *("num_prototypes", "whitening_size", "whitening_iters", "kmeans_iters"),
            *("decoder_num_heads", "decoder_embed_dim", "decoder_depth"),
        ),
        COUNT,
    ),
    **dict.fromkeys(("temperature", "temperature_q", "temperature_k", "sk_epsilon"), POSITIVE),
    **dict.fromkeys(
        ("teacher_temperature", "student_temperature", "warmup_teacher_temperature"), POSITIVE
    ),
    **dict.fromkeys(("use_bn_in_head", "norm_last_layer", "norm_pix_loss", "iternorm"), TRUTH),
    **dict.fromkeys(
        ("freeze_prototypes_epochs", "epoch_queue_starts", "warmup_teacher_temperature_epochs"),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(("freeze_last_layer", "clip_grad", "whitening_eps", "mask_ratio"), ANY),
    "teacher": PATH_OR_NULL,
    "teacher_path": among(*PATHS),
    "teacher_head": TRUTH.or_null(),
    # Known to `config`.
    "statistics_images": ANY,
    # Of us3l.
    "base_loss": among("simclr", "byol"),
    "optimizer_steps": among("per_width", "per_batch"),
    "group_penalty": NOT_NEGATIVE,
    "group_slope": Kind(lambda v: is_not_negative(v) and v < 1 / 7, "a number from 0, below 1/7"),
}

# Of METHOD_KWARGS, those that say something to these methods alone.
OWN_METHOD_KWARGS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("teacher", "teacher_path", "teacher_head"), ("simreg", "seed")),
    **dict.fromkeys(("base_loss", "optimizer_steps", "group_penalty", "group_slope"), ("us3l",)),
}

_HEAD = ("proj_hidden_dim", "proj_output_dim")
_PREDICTOR = (*_HEAD, "pred_hidden_dim")
# The `method_kwargs` without which a method of solo-learn's cannot be built; others have defaults.
METHOD_NEEDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("vicreg", "vibcreg", "barlow_twins", "deepclusterv2"), _HEAD),
    **dict.fromkeys(("simclr", "supcon", "mocov2plus", "swav"), (*_HEAD, "temperature")),
    **dict.fromkeys(("simsiam", "byol", "nnsiam", "nnbyol", "us3l"), _PREDICTOR),
    **dict.fromkeys(("nnclr", "mocov3", "all4one"), (*_PREDICTOR, "temperature")),
    "ressl": (*_HEAD, "temperature_q", "temperature_k"),
    "dino": (*_HEAD, "num_prototypes"),
    "mae": ("decoder_embed_dim", "decoder_depth", "decoder_num_heads"),
    **dict.fromkeys(("simreg", "seed"), ("teacher",)),
}
# Those whose queue is filled by whole steps; and its size where a config says none.
QUEUES = ("mocov2plus", "nnclr", "nnsiam", "nnbyol", "ressl", "all4one", "seed")
QUEUE_SIZE = 65536

# Of an entry of `augmentations`, which `data.check_augmentations` has completed.
VIEW: Table = {
    "crop_size": CROP,
    "num_crops": COUNT,
    "mean": Kind(lambda v: are_three(v, is_number), "a list of 3 numbers"),
    "std": Kind(lambda v: are_three(v, is_positive), "a list of 3 numbers > 0"),
    "rrc.enabled": TRUTH,
    "rrc.crop_min_scale": PROBABILITY,
    "rrc.crop_max_scale": PROBABILITY,
    **{
        f"{operation}.prob": PROBABILITY
        for operation in (
            *("color_jitter", "grayscale", "gaussian_blur", "solarization", "equalization"),
            *("horizontal_flip", "erasing"),
        )
    },
    **{f"color_jitter.{key}": NOT_NEGATIVE for key in ("brightness", "contrast", "saturation")},
    "color_jitter.hue": Kind(lambda v: is_not_negative(v) and v <= 0.5, "a number from 0 to 0.5"),
    "erasing.scale": PAIR,
    "affine.degrees": ANY,
    "affine.translate": PAIR.or_null(),
    "affine.scale": PAIR.or_null(),
    "affine.shear": ANY,
}

_FROZEN: Table = {
    **_HARDWARE,
    "checkpoint": PATH,
    "path": ANY,
    "threshold": NUMBER,
    "budget": NUMBER.or_null(),
    "recalibrate": Kind(lambda v: is_int(v, 0) and v != 1, "0 or an integer ≥ 2").or_null(),
    "crop_size": CROP.or_null(),
    "batch_size": COUNT,
    "output": PATH_OR_NULL,
    "augmentations": ANY,
    "data.dataset": ANY,
    "data.train_path": PATHS_OR_NULL,
    "data.val_path": PATHS_OR_NULL,
    "data.format": ANY,
    "data.pipeline": ANY,
    "data.no_labels": TRUTH.or_null(),
    "data.fraction": ANY,
    "data.on_damaged": ANY,
    "data.num_workers": whole(0, _MOST_WORKERS).or_null(),
    "data.num_classes": ANY,
    "data.split": ANY,
    "data.num_large_crops": ANY,
    "data.num_small_crops": ANY,
    # Of the groups of data sets, which say it for pre-training.
    "backbone.kwargs": GROUP,
    "image_size": CROP.or_null(),
    "hydra": ANY,
}
EVALUATIONS: Mapping[str, Table] = {
    "linear": {
        **_FROZEN,
        **_OPTIMIZATION,
        "optimizer.scale_lr": TRUTH,
        "seeds": whole(1, _MOST_REPEATS),
        "augment": TRUTH,
    },
    "knn": {
        **_FROZEN,
        "features": ANY,
        "k": ANY,
        "distance": ANY,
        "temperature": ANY,
        "normalize": TRUTH,
    },
    "policy": {
        **_FROZEN,
        "calibrate": ANY,
        "calibration_images": COUNT,
        "sweep": TRUTH,
        "shares": ANY,
        "beside": ANY,
    },
    "umap": {
        **_FROZEN,
        "classes": ANY,
        "images": ANY,
        "neighbors": ANY,
        "min_dist": NOT_NEGATIVE,
    },
}


def own_copy(cfg: DictConfig | Mapping[str, Any], table: Table | None = None) -> DictConfig:
    """A copy of a config that a run may complete; the given one stays as it is.

    Numbers of NumPy's become Python's, and a path's `~` the home folder.

    Args:
        cfg: a config, or a dictionary.
        table: what its keys accept; None for a config that is checked later.

    Raises:
        InputError: naming the key, what was found and what is accepted.
    """
    own = cfg.copy() if isinstance(cfg, DictConfig) else OmegaConf.create(_python_values(cfg))
    OmegaConf.set_readonly(own, False)
    OmegaConf.set_struct(own, False)
    if table is not None:
        _rename(own, table)
        check_values(own, table)
    return own


def _rename(cfg: DictConfig, table: Table) -> None:
    """Give keys their names of today, in place; of two that disagree neither is taken."""
    for key in [key for key in cfg if key in ALIASES]:
        name = todays_name(str(key), table)
        if name == key:
            continue
        # Only a checkpoint has no default, which an earlier name overrides.
        if name == "checkpoint" and cfg.get(name) not in (None, cfg[key]):
            raise InputError(
                f"{name}: got {shown(cfg[name])}, and {key}: {shown(cfg[key])}; expected one "
                "of them"
            )
        cfg[name] = cfg._get_node(key)
        del cfg[key]


def check_values(cfg: DictConfig, table: Table) -> None:
    """Check every value of a config, and write out its paths' `~`, in place.

    Args:
        cfg: values that are missing (`???`) are left to others.
        table: what its keys accept.

    Raises:
        InputError: for a value that is not accepted, an interpolation that leads nowhere, or a key
            that nothing reads.
    """
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True)
        written: Any = OmegaConf.to_container(cfg, resolve=False)
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or "config"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{key}: its interpolation cannot be resolved ({reason})") from error
    groups = {key.rpartition(".")[0] for key in table if "." in key}
    referred = set(re.findall(r"\$\{\.*(\w+)", str(written)))
    for key, value in _leaves(values, table, groups, referred):
        if value == "???":
            continue
        table[key].check(key, value)
        if table[key] in (PATH, PATH_OR_NULL, PATHS_OR_NULL):
            at_home(cfg, key, value)


def _leaves(
    values: Mapping[str, Any], table: Table, groups: set[str], referred: set[str], above: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{above}{name}"
        if key in table:
            yield key, value
        elif key in groups:
            if not isinstance(value, Mapping):
                raise InputError(
                    f"{key}: got {shown(value)}, expected a group with {_below(key, table)}"
                )
            yield from _leaves(value, table, groups, referred, f"{key}.")
        elif above or str(name) not in referred:
            accepted = f"expected {_below(above[:-1], table)}" if above else ""
            raise no_such_key(key, [*table, *groups], accepted)


def _below(group: str, table: Table) -> str:
    keys = [key.removeprefix(f"{group}.") for key in table if key.startswith(f"{group}.")]
    return ", ".join(keys)


def at_home(cfg: DictConfig, key: str, value: Any) -> None:
    """Write out a path's `~`, in place.

    Args:
        cfg: a config.
        key: of the path, or of a list of them.
        value: what it has.
    """
    if isinstance(value, list) and any(path.startswith("~") for path in value):
        OmegaConf.update(cfg, key, literal([os.path.expanduser(path) for path in value]))
    elif isinstance(value, str) and value.startswith("~"):
        OmegaConf.update(cfg, key, as_text(os.path.expanduser(value)))


def _python_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _python_values(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_python_values(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
