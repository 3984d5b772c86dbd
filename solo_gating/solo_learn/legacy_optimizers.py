"""The modern line's optimisers and schedules for 1.0.2."""

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import Any

from omegaconf import DictConfig
from torch.optim.lr_scheduler import LambdaLR

from ..errors import InputError


def warmup_cosine(
    step: int, base_lr: float, *, start_lr: float, min_lr: float, warmup: float, total: float
) -> float:
    """Learning rate of the modern line's LinearWarmupCosineAnnealingLR at a step, in closed form.

    From start_lr linearly to base_lr at step `warmup` − 1, then a half cosine to min_lr at step
    `total` (`solo/utils/lr_scheduler.py`, which computes each rate from the one before).
    """
    if step == 0:
        return start_lr
    if step < warmup:
        return start_lr + step * (base_lr - start_lr) / (warmup - 1)
    if step == warmup:
        return base_lr
    # A fractional `warmup` is never hit: the cosine then starts from the last linear step.
    anchor = math.floor(warmup)
    bounds = {"start_lr": start_lr, "min_lr": min_lr, "warmup": warmup, "total": total}
    anchor_lr = warmup_cosine(anchor, base_lr, **bounds)

    def wave(t: float) -> float:
        return 1 + math.cos(math.pi * (t - warmup) / (total - warmup))

    return min_lr + (anchor_lr - min_lr) * wave(step) / wave(anchor)


def _without_decay_on_vectors(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split every group in two: matrices, and biases and norms without weight decay."""
    split = []
    for group in groups:
        parameters = list(group["params"])
        for decays, chosen in (
            (True, [p for p in parameters if p.ndim > 1]),
            (False, [p for p in parameters if p.ndim <= 1]),
        ):
            if chosen:
                extra = (
                    {} if decays else {"weight_decay": 0, "name": f"{group.get('name')}_no_decay"}
                )
                split.append({**group, "params": chosen, **extra})
    return split


def configure_optimizers(
    module: Any, cfg: DictConfig, groups: list[dict[str, Any]], optimizers: dict[str, Any]
) -> Any:
    """What the modern line's `configure_optimizers` does.

    Args:
        module: the LightningModule; gives the learning rates, scaled for accumulation.
        cfg: its config.
        groups: parameter groups; `static_lr` marks those without a schedule (SimSiam's predictor).
        optimizers: classes by name.

    Raises:
        InputError: for an optimiser or scheduler that does not exist.
    """
    scheduler = cfg.scheduler
    if cfg.optimizer.name not in optimizers:
        raise InputError(
            f"optimizer.name: got {cfg.optimizer.name!r}, expected {', '.join(optimizers)}"
        )
    if cfg.optimizer.exclude_bias_n_norm_wd:
        groups = _without_decay_on_vectors(groups)
    static = [group.pop("static_lr", False) for group in groups]
    optimizer = optimizers[cfg.optimizer.name](
        groups, lr=module.lr, weight_decay=module.weight_decay, **cfg.optimizer.kwargs
    )
    if scheduler.name == "none":
        return optimizer

    rate: Callable[[int, float], float]
    min_lr = getattr(module, "min_lr", scheduler.min_lr)
    start_lr = getattr(module, "warmup_start_lr", scheduler.warmup_start_lr)
    if scheduler.name == "warmup_cosine":
        total = cfg.max_epochs
        if scheduler.interval == "step":
            total = module.trainer.estimated_stepping_batches
        rate = partial(
            warmup_cosine,
            start_lr=start_lr if scheduler.warmup_epochs > 0 else module.lr,
            min_lr=min_lr,
            warmup=scheduler.warmup_epochs * total / cfg.max_epochs,
            total=total,
        )
        interval = scheduler.interval
    elif scheduler.name == "step":
        milestones = sorted(scheduler.lr_decay_steps)

        def rate(step: int, base_lr: float) -> float:
            return base_lr * 0.1 ** bisect_right(milestones, step)

        interval = "epoch"
    else:
        raise InputError(
            f"scheduler.name: got {scheduler.name!r}, expected warmup_cosine, step, none"
        )

    def factor(step: int, base_lr: float, is_static: bool) -> float:
        # As on the modern line, a static group leaves the schedule after its first value.
        lr = module.lr if is_static and step > 0 else rate(step, base_lr)
        return lr / base_lr if base_lr else 0.0

    factors: list[Callable[[int], float]] = [
        partial(factor, base_lr=group["lr"], is_static=is_static)
        for group, is_static in zip(optimizer.param_groups, static, strict=True)
    ]
    return [optimizer], [{"scheduler": LambdaLR(optimizer, factors), "interval": interval}]
