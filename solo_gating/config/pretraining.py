"""solo-learn's config schema: defaults and checks, before any long work begins."""

import inspect
import os
import re
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from ..backbones.sliced import POLICY
from ..budgets import checked_budget
from ..checkpoints.reading import as_text
from ..checks import at_least, is_not_negative, no_such_key, one_of, require, shown
from ..data import (
    DATASETS,
    FORMATS,
    NUM_CLASSES,
    PIPELINES,
    check_augmentations,
    check_data,
    check_device_pipeline,
    check_view,
    count_class_folders,
)
from ..errors import InputError
from ..methods import (
    GATED_METHODS,
    REFUSED,
    StudentMethod,
    check_gated_backbone,
    plain_method,
    record_widths,
)
from ..solo_learn import (
    METHODS,
    WITH_CIFAR_STEM,
    BaseMethod,
    BaseMomentumMethod,
    VICReg,
    with_momentum,
)
from .defaults import DEFAULTS
from .gating import GatingConfig
from .schema import (
    METHOD_KWARGS,
    METHOD_NEEDS,
    OWN_METHOD_KWARGS,
    PATH_OR_NULL,
    PRETRAINING,
    QUEUE_SIZE,
    QUEUES,
    VIEW,
    at_home,
    check_values,
)

_OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "lars": {"momentum": 0.9, "eta": 1e-3, "clip_lr": False, "exclude_bias_n_norm": False},
    "adamw": {"betas": [0.9, 0.999]},
}


# A Trainer argument, and the key that decides the same.
_DECIDED_BY = {
    "enable_checkpointing": "checkpoint.enabled",
    "default_root_dir": "checkpoint.dir",
}


def prepare_config(cfg: DictConfig) -> DictConfig:
    """Complete and check a pre-training config, in place.

    Fills in solo-learn's defaults, counts the crops, sets `data.num_classes`, checks everything
    that can be checked without opening the data, and completes the group `gating`. Learning rates
    are left alone; `scale_learning_rates` does those once it is known how many processes there are.

    Args:
        cfg: solo-learn's schema, plus `gating`.

    Returns:
        The same config.

    Raises:
        InputError: naming the key, what was found and what is accepted.
    """
    OmegaConf.set_struct(cfg, False)
    check_values(cfg, PRETRAINING)
    for key in ("backbone.kwargs", "optimizer.kwargs", "method_kwargs"):
        if OmegaConf.select(cfg, key, default={}) is None:
            OmegaConf.update(cfg, key, {})
    cfg.merge_with(OmegaConf.merge(DEFAULTS, cfg))
    cfg.name = as_text(str(cfg.name))
    for key in ("method", "backbone.name", "data.dataset", "data.train_path", "optimizer.name"):
        if OmegaConf.select(cfg, key, default=None) is None or OmegaConf.is_missing(cfg, key):
            raise InputError(f"{key}: missing, a pre-training config needs it")
    refused = re.sub("_(dual|gated|distilled)$", "", str(cfg.method))
    if cfg.method not in METHODS and refused in REFUSED:
        raise InputError(
            f"method: got {cfg.method!r}, but {refused!r} cannot be gated: {REFUSED[refused]}"
        )
    one_of("method", cfg.method, [m for m in METHODS if m not in ("base", "linear")])
    one_of("backbone.name", cfg.backbone.name, BaseMethod._BACKBONES)
    _check_policy(cfg)
    one_of("data.dataset", cfg.data.dataset, DATASETS)
    _check_stem(cfg)
    one_of("data.format", cfg.data.format, FORMATS)
    one_of("data.pipeline", cfg.data.pipeline, PIPELINES)
    if cfg.data.pipeline == "device":
        check_device_pipeline(cfg.data)
        if cfg.get("overfit_batches"):
            raise InputError(
                f"overfit_batches: got {cfg.overfit_batches} with data.pipeline=device, whose loader "
                "Lightning cannot cut; expected 0, or data.pipeline=workers"
            )
    check_optimizer(cfg.optimizer, least_batch=2)  # for BatchNorm
    if cfg.scheduler.name == "step" and not cfg.scheduler.get("lr_decay_steps"):
        raise InputError(
            "scheduler.lr_decay_steps: missing, scheduler.name=step needs a list of epochs"
        )
    check_data(cfg.data)
    _check_trainer(cfg)
    _check_method_kwargs(cfg)
    _check_momentum(cfg)
    _check_views(cfg)
    big = cfg.augmentations[0].crop_size
    crops = {True: 0, False: 0}
    for view in cfg.augmentations:
        crops[view.crop_size == big] += view.num_crops
    cfg.data.num_large_crops, cfg.data.num_small_crops = crops[True], crops[False]
    if issubclass(METHODS[cfg.method], StudentMethod):
        if list(crops.values()) != [1, 0]:
            raise InputError(
                f"augmentations: got {crops[True]} crops of {big} pixels and {crops[False]} others, "
                f"{cfg.method!r} takes 1, which teacher and student see"
            )
    elif crops[True] != 2 and cfg.method.split("_")[0] not in ("wmse", "mae"):
        raise InputError(
            f"augmentations: got {crops[True]} crops of {big} pixels, {cfg.method!r} compares 2"
        )
    _check_statistics(cfg)
    cfg.data.num_classes = number_of_classes(cfg.data)
    if cfg.final_knn.enabled and (cfg.data.val_path is None or cfg.data.no_labels):
        raise InputError("final_knn.enabled: got true, which needs data.val_path and labels")

    if cfg.method in GATED_METHODS:
        method = GATED_METHODS[cfg.method]
        gating = method.gating_config(cfg)
        check_gated_backbone(cfg)
        method.check_config(cfg)
        if cfg.pretrained is not None and not os.path.isfile(cfg.pretrained):
            raise InputError(f"pretrained: {str(cfg.pretrained)!r} is not a file")
        if cfg.pretrained is not None and "two_encoders" in cfg.backbone.name:
            raise InputError(
                f"backbone.name: got {cfg.backbone.name!r} with pretrained, whose dense encoder's "
                "weights the gated path shares; expected a backbone *_gated"
            )
        if gating.momentum_path != "dense" and "momentum" not in cfg:
            raise InputError(
                f"gating.momentum_path: got {gating.momentum_path!r}, but method {cfg.method!r} has "
                "no momentum encoder; expected dense, or no such key"
            )
        _check_final_budgets(cfg.final_knn, gating)
        _warn_of_short_run(gating, cfg.max_epochs)
    elif cfg.pretrained is not None:
        raise InputError(
            f"pretrained: got {shown(cfg.pretrained)}, but method {cfg.method!r} has no gates to learn"
        )
    elif cfg.get("gating") is not None:
        raise InputError(
            f"gating: method {cfg.method!r} has no gates; those that do are "
            f"{', '.join(sorted(GATED_METHODS))}"
        )
    return cfg


def _check_policy(cfg: DictConfig) -> None:
    """The file of a student's widths, if one is named; then the widths take its place."""
    file = cfg.backbone.kwargs.get("policy")
    PATH_OR_NULL.check(POLICY, file)
    if file is not None:
        at_home(cfg, POLICY, file)
    record_widths(cfg)


def _check_stem(cfg: DictConfig) -> None:
    """solo-learn gives every ResNet its CIFAR stem where the data set is called so."""
    stem = cfg.backbone.kwargs.get("stem")
    if cfg.data.dataset in WITH_CIFAR_STEM and stem not in (None, "cifar"):
        raise InputError(
            f"backbone.kwargs.stem: got {shown(stem)} with data.dataset={cfg.data.dataset}, on which "
            "solo-learn's stem is cifar; expected that, or data.dataset=custom"
        )


def _check_statistics(cfg: DictConfig) -> None:
    key, images = "method_kwargs.statistics_images", cfg.method_kwargs.get("statistics_images")
    if images is None:
        cfg.method_kwargs.pop("statistics_images", None)  # as runs from before it came are recorded
        return
    if not issubclass(METHODS[cfg.method], VICReg):
        raise InputError(
            f"{key}: got {images!r}, method {cfg.method!r} is no VICReg; expected null"
        )
    at_least(key, images, 2)
    batch = cfg.optimizer.batch_size
    if batch % images and images % batch:
        raise InputError(
            f"{key}: got {images}, expected a divisor or a multiple of optimizer.batch_size={batch}"
        )


def _check_trainer(cfg: DictConfig) -> None:
    """Refuse a Trainer argument against the key that decides the same."""
    for argument, key in _DECIDED_BY.items():
        decided = OmegaConf.select(cfg, key)
        if cfg.get(argument) not in (None, decided):
            raise InputError(
                f"{argument}: got {shown(cfg[argument])} with {key}={decided}; expected {key} alone"
            )
    if (cfg.get("min_epochs") or 1) > cfg.max_epochs:
        raise InputError(
            f"min_epochs: got {cfg.min_epochs}, expected at most max_epochs={cfg.max_epochs}"
        )


def _check_method_kwargs(cfg: DictConfig) -> None:
    method = plain_method(METHODS[cfg.method])
    known = method.__module__.startswith(("solo.", "solo_gating."))
    for key, value in cfg.method_kwargs.items():
        owners = OWN_METHOD_KWARGS.get(key, ())
        if known and owners and _solo_name(cfg.method) not in owners:
            raise InputError(
                f"method_kwargs.{key}: got {shown(value)}, method {cfg.method!r} does not read it; "
                f"those that do are {', '.join(owners)}"
            )
        if key in METHOD_KWARGS:
            value = (
                OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            )
            METHOD_KWARGS[key].check(f"method_kwargs.{key}", value)
            if METHOD_KWARGS[key] is PATH_OR_NULL:
                at_home(cfg, f"method_kwargs.{key}", value)
        elif known:
            raise no_such_key(f"method_kwargs.{key}", [f"method_kwargs.{k}" for k in METHOD_KWARGS])
    for key in METHOD_NEEDS.get(_solo_name(cfg.method), ()):
        if OmegaConf.is_missing(cfg.method_kwargs, key) or cfg.method_kwargs.get(key) is None:
            raise InputError(f"method_kwargs.{key}: missing, {cfg.method!r} needs it")
    _check_queue(cfg, 1)


def _solo_name(method: str) -> str:
    """The name of the method of solo-learn's that a method is, or is made of."""
    plain = plain_method(METHODS[method])
    return next((name for name, cls in METHODS.items() if cls is plain), method)


def _check_queue(cfg: DictConfig, processes: int) -> None:
    """Refuse a queue that whole steps do not fill."""
    if _solo_name(cfg.method) not in QUEUES:
        return
    size = cfg.method_kwargs.get("queue_size") or QUEUE_SIZE
    images = cfg.optimizer.batch_size * processes
    if size % images:
        raise InputError(
            f"method_kwargs.queue_size: got {size}, expected a multiple of the {images} images of a "
            "step of all processes (optimizer.batch_size)"
        )


def _check_momentum(cfg: DictConfig) -> None:
    """Complete and check the group `momentum`, in place."""
    if not issubclass(METHODS[cfg.method], BaseMomentumMethod):
        if cfg.get("momentum"):
            raise InputError(
                f"momentum: got a group, but method {cfg.method!r} has no momentum encoder; "
                "expected no such key"
            )
        return
    with_momentum(cfg)
    if cfg.momentum.base_tau > cfg.momentum.final_tau:
        raise InputError(
            f"momentum.base_tau: got {cfg.momentum.base_tau}, expected at most "
            f"momentum.final_tau={cfg.momentum.final_tau}"
        )


def _check_views(cfg: DictConfig) -> None:
    views = cfg.get("augmentations")
    if not OmegaConf.is_list(views) or not all(OmegaConf.is_dict(view) for view in views):
        raise InputError(
            f"augmentations: got {shown(views) if views else 'none'}, expected a list of groups"
        )
    check_augmentations(views)
    for number, view in enumerate(views):
        try:
            check_values(view, VIEW)
            check_view(cfg.data.dataset, view)
        except InputError as error:
            raise InputError(f"augmentations[{number}].{error}") from error


def _warn_of_short_run(gating: GatingConfig, epochs: int) -> None:
    """Where gates learn nothing, or not the budget that is asked for."""
    if gating.warmup_epochs >= epochs:
        rank_zero_warn(
            f"gating.warmup_epochs: got {gating.warmup_epochs} with max_epochs={epochs}, so that the "
            "gates rest to the end and the gated path learns nothing"
        )
        return
    schedule = gating.schedule(epochs)
    last, _ = schedule.ends(epochs - gating.warmup_epochs - 1)
    if last > schedule.low + 1e-9:
        rank_zero_warn(
            f"gating.budget_anneal, gating.budget_hold: the budget is still {last:.2f} in the last of "
            f"{epochs} epochs, and {schedule.low} never"
        )


def _check_final_budgets(final_knn: DictConfig, gating: GatingConfig) -> None:
    """They are a range's: a run for one budget, in which a config may be changed, has none."""
    if not gating.told:
        final_knn.budgets = []
    elif not OmegaConf.is_list(final_knn.budgets):
        raise InputError(
            f"final_knn.budgets: got {final_knn.budgets!r}, expected a list like [0.1, 0.3]"
        )
    for budget in final_knn.budgets:
        checked_budget(budget, gating.budget_range, "final_knn.budgets")


def check_optimizer(optimizer: DictConfig, least_batch: int = 1) -> None:
    """Complete and check a config's group `optimizer`, in place.

    Args:
        optimizer: name, batch_size, lr, weight_decay, kwargs.
        least_batch: the smallest batch that is accepted.

    Raises:
        InputError: naming the key, what was found and what is accepted.
    """
    one_of("optimizer.name", optimizer.get("name"), BaseMethod._OPTIMIZERS)
    at_least("optimizer.batch_size", optimizer.get("batch_size"), least_batch)
    require("optimizer.lr", optimizer.get("lr"), is_not_negative, "a number ≥ 0")
    for key, value in _OPTIMIZER_DEFAULTS.get(optimizer.name, {}).items():
        optimizer.kwargs.setdefault(key, value)
    cls = BaseMethod._OPTIMIZERS[optimizer.name]
    parameters = inspect.signature(cls).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [key for key in parameters if key not in ("params", "lr", "weight_decay")]
    for key in optimizer.kwargs:
        if key in ("lr", "weight_decay"):
            raise InputError(f"optimizer.kwargs.{key}: expected optimizer.{key} alone")
        if key not in known and not open_ended:
            raise InputError(
                f"optimizer.kwargs.{key}: {optimizer.name} has no such argument, expected "
                f"{', '.join(known)}; `~optimizer.kwargs.{key}` removes it"
            )
    _try(cls, optimizer)


def _try(cls: Any, optimizer: DictConfig) -> None:
    """One step of the optimiser: what it refuses, it refuses there at the latest."""
    weight = torch.nn.Parameter(torch.ones(1, 1))
    weight.grad = torch.ones(1, 1)
    rates = {key: float(optimizer.get(key) or 0) for key in ("lr", "weight_decay")}
    kwargs: Any = OmegaConf.to_container(optimizer.kwargs, resolve=True)
    try:
        cls([weight], **rates, **kwargs).step()
    except Exception as error:  # whatever a value makes PyTorch say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"optimizer.kwargs: {optimizer.name} refuses them ({reason})") from error


def scale_learning_rates(cfg: DictConfig, world_size: int) -> None:
    """Multiply learning rates, given per 256 images, by the global batch size / 256, in place.

    solo-learn's rule (`solo/args/pretrain.py`), except that the online classifier's rate is
    scaled without validation data too.

    Args:
        cfg: a complete config.
        world_size: number of processes.

    Raises:
        InputError: for a queue that the steps of so many processes do not fill.
    """
    _check_queue(cfg, world_size)
    scale = cfg.optimizer.batch_size * world_size / 256
    cfg.optimizer.lr *= scale
    cfg.optimizer.classifier_lr *= scale


def number_of_classes(data: DictConfig) -> int:
    """The number of classes that a config's `data` has.

    Args:
        data: known data sets have theirs, folders of labelled images are counted, else
            `num_classes` says it.

    Raises:
        InputError: if it is missing, or not the data set's.
    """
    if data.dataset in NUM_CLASSES:
        known = NUM_CLASSES[data.dataset]
        if data.num_classes not in (None, known):
            raise InputError(
                f"data.num_classes: got {data.num_classes}, {data.dataset} has {known}"
            )
        return known
    if data.num_classes is None and data.format == "image_folder" and not data.no_labels:
        folders = count_class_folders(str(data.train_path))
        if not folders:
            raise InputError(
                f"data.train_path: {shown(str(data.train_path))} does not exist or has no class folders"
            )
        return folders
    at_least("data.num_classes", data.num_classes, 1)
    return data.num_classes
