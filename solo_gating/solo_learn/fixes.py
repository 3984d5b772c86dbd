"""What both lines share and is mended in one place.

Broken under current torchmetrics and PyTorch: the kNN classifier, batches without labels, the
checkpoints of methods with a static learning rate, the momentum of continued runs. Slow: losses with a boolean mask, VICReg's of
the covariances and Barlow Twins'. New: VICReg's statistics over parts of a batch.
"""

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from functools import wraps
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torchmetrics import Metric

from ..distributed import rank_and_processes
from ..randomness import StepSeeds

MOMENTUM = {"base_tau": 0.99, "final_tau": 1.0, "classifier": False}
_QUERIES_AT_ONCE = 1024
_STATISTICS_IMAGES: ContextVar[int | None] = ContextVar("statistics_images", default=None)
_BANKS = ("train_features", "train_targets", "test_features", "test_targets")


def current_knn(base: type[Metric]) -> type[Metric]:
    """solo-learn's WeightedKNNClassifier for torchmetrics ≥ 1.

    Both lines pass `compute_on_step` to torchmetrics, which has removed it. Both count the classes
    of the test images only and fail where the training images have more; 1.0.2 also fails without
    features, and forgets to normalise them for the cosine distance. Both hold the distances of
    some queries to all training images at once. The vote is the same.
    """

    class WeightedKNNClassifier(base):  # type: ignore[misc,valid-type]
        """Weighted k-nearest-neighbour accuracy; see `solo/utils/knn.py` of solo-learn.

        Args:
            k: number of neighbours.
            T: temperature of the cosine distance.
            max_distance_matrix_size: largest number of distances held at once.
            distance_fx: "cosine" or "euclidean".
            epsilon: added to a euclidean distance before it is inverted.
            dist_sync_on_step: as in torchmetrics.
        """

        def __init__(
            self,
            k: int = 20,
            T: float = 0.07,
            max_distance_matrix_size: int = int(5e6),
            distance_fx: str = "cosine",
            epsilon: float = 0.00001,
            dist_sync_on_step: bool = False,
        ):
            Metric.__init__(self, dist_sync_on_step=dist_sync_on_step)
            self.k = k
            self.T = T
            self.max_distance_matrix_size = max_distance_matrix_size
            self.distance_fx = distance_fx
            self.epsilon = epsilon
            for name in _BANKS:
                self.add_state(name, default=[], persistent=False)

        def forward(self, *args: Any, **kwargs: Any) -> None:
            """Store features; the accuracy is computed on demand only."""
            self.update(*args, **kwargs)

        def compute(self) -> tuple[float, float]:
            """Top-1 and top-5 accuracy in percent over the labelled; (-1, -1) without such."""
            banks = {name: list(getattr(self, name)) for name in _BANKS}
            self.reset()
            if not all(sum(map(len, parts)) for parts in banks.values()):
                return -1, -1
            train, labels, test, targets = (torch.cat(banks[name]) for name in _BANKS)
            train, labels = train[labels >= 0], labels[labels >= 0]
            test, targets = test[targets >= 0], targets[targets >= 0]
            if not (len(train) and len(test)):
                return -1, -1
            if self.distance_fx == "cosine":
                train, test = F.normalize(train), F.normalize(test)
            classes = int(max(labels.max(), targets.max())) + 1
            correct = torch.zeros(2, dtype=torch.float64)
            rows = min(len(test), _QUERIES_AT_ONCE)
            columns = max(1, self.max_distance_matrix_size // rows)
            for queries, truth in zip(test.split(rows), targets.split(rows), strict=True):
                nearness, neighbours = self._nearest(queries, train, labels, columns)
                if self.distance_fx == "cosine":
                    # Relative to the nearest: the same vote, finite at any temperature.
                    weights = torch.exp((nearness - nearness[:, :1]) / self.T)
                else:
                    weights = 1 / (self.epsilon - nearness)
                votes = weights.new_zeros(len(queries), classes)
                votes.scatter_add_(1, neighbours, weights)
                hits = votes.topk(min(5, classes)).indices == truth[:, None]
                correct += torch.stack([hits[:, 0].sum(), hits.sum()]).cpu()
            top1, top5 = (100 * correct / len(test)).tolist()
            return top1, top5

        def _nearest(
            self, queries: Tensor, train: Tensor, labels: Tensor, columns: int
        ) -> tuple[Tensor, Tensor]:
            """Nearness (cosine, or minus the distance) and labels of the k nearest, B × k each."""
            best = queries.new_empty(len(queries), 0)
            best_labels = labels.new_empty(len(queries), 0)
            for part, part_labels in zip(train.split(columns), labels.split(columns), strict=True):
                if self.distance_fx == "cosine":
                    nearness = queries @ part.T
                else:
                    nearness = -torch.cdist(queries, part)
                nearness, index = nearness.topk(min(self.k, len(part)))
                best = torch.cat([best, nearness], dim=1)
                best_labels = torch.cat([best_labels, part_labels[index]], dim=1)
                best, order = best.topk(min(self.k, best.shape[1]))
                best_labels = best_labels.gather(1, order)
            return best, best_labels

    return WeightedKNNClassifier


def covariance_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """VICReg's: Σ of the squared covariances between features / D, of both views.

    The value of `solo/losses/vicreg.py`, which picks the D² − D of them out with a boolean mask: that
    waits for a GPU, and on a CPU takes longer than the covariances themselves.

    Args:
        z1: N × D.
        z2: N × D.
    """
    return sum(_off_diagonal_squares(z) for z in (z1, z2)) / z1.shape[1]  # type: ignore[return-value]


def _off_diagonal_squares(z: Tensor) -> Tensor:
    z = z - z.mean(dim=0)
    squares = (z.T @ z / (len(z) - 1)).pow(2)
    squares.diagonal().zero_()
    return squares.sum()


def barlow_loss(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    """Barlow Twins': scale · (Σ (1 − C_ii)² + λ · Σ C_ij²), C the views' cross-correlations.

    The value, and the gradients, of `solo/losses/barlow.py`, which multiplies by λ behind a boolean
    mask and so waits for a GPU.

    Args:
        z1: N × D.
        z2: N × D.
        lamb: λ.
        scale_loss: the scale.
    """
    one, other = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    correlations = one.T @ other / len(z1)
    _, processes = rank_and_processes()
    if processes > 1:
        dist.all_reduce(correlations)
        correlations /= processes
    aim = torch.eye(z1.shape[1], dtype=z1.dtype, device=z1.device)
    weights = torch.full_like(correlations, lamb).fill_diagonal_(1)
    return scale_loss * (weights * (correlations - aim).pow(2)).sum()


def mend(
    base_method: type[Any], vicreg_method: type[Any], vicreg: ModuleType, barlow_twins: ModuleType
) -> None:
    """Mend solo-learn's BaseMethod, VICReg and two losses in place, once.

    - A batch without a single label has the classification loss 0 (it was 0 / 0 = NaN, which also
      spoilt the online classifier's weights), and a batch's accuracy is that of its labelled images.
    - Validation figures are means over all labelled images of all processes; without any, there
      are none.
    - The scheduler of a method with a static learning rate (SimSiam) held a
      `functools.partial`; without it checkpoints load with `torch.load(weights_only=True)`, and
      resuming puts it back, since `configure_optimizers` runs first.
    - Each step draws its random numbers anew from the config's `seed`: every continuation of a run
      repeated those of the run's start.
    - VICReg takes `method_kwargs.statistics_images`: its variances and covariances are those of so
      many images at a time, the loss their mean over the whole batch of all processes. (The papers'
      runs have 256 images on each of two GPUs, and each GPU statistics of its own.)

    Args:
        base_method: the class.
        vicreg_method: VICReg's class.
        vicreg: the module of the loss.
        barlow_twins: the module of the method.
    """
    if getattr(base_method, "_solo_gating_mended", False):
        return
    mend_validation(base_method, "_base_shared_step")
    base_method.on_validation_epoch_end = _log_validation
    base_method.teacher_pass = lambda self: nullcontext()
    base_method.on_save_checkpoint = _without_functions
    base_method.configure_callbacks = _step_seeds
    vicreg_method.training_step = _of_so_many_images(vicreg_method.training_step)
    vicreg.variance_loss = _mean_over_parts(vicreg.variance_loss)  # type: ignore[attr-defined]
    vicreg.covariance_loss = _mean_over_parts(covariance_loss)  # type: ignore[attr-defined]
    barlow_twins.barlow_loss_func = barlow_loss  # type: ignore[attr-defined]
    base_method._solo_gating_mended = True


def mend_validation(method: type[Any], shared_step: str) -> None:
    """Make the figures of a class of solo-learn's those of its labelled images, in place.

    Args:
        method: BaseMethod or BaseMomentumMethod.
        shared_step: the name of its step on one view.
    """
    setattr(method, shared_step, _of_labelled(getattr(method, shared_step)))
    method.validation_step = _counting_labelled(method.validation_step)


def mend_momentum(method: type[Any], updater: type[Any], base: ModuleType) -> None:
    """Mend solo-learn's BaseMomentumMethod in place, once, before `mend`.

    - Validation figures as `mend` has them. The end of a validation epoch is the base method's,
      whose means are those of the momentum classifier, too: what stands between the two classes
      (a gated method) is asked as well.
    - The momentum classifier accepts fewer than 5 classes, as the other one does.
    - A continued run goes on with the momentum of its step; it began anew.
    - The momentum network is updated in place.
    - A config without the group `momentum` has solo-learn's defaults; it was an AttributeError.
    - Every pass through it stands in the method's `teacher_pass`, a context.

    Args:
        method: the class.
        updater: MomentumUpdater.
        base: the module of the class.
    """
    mend_validation(method, "_shared_step_momentum")
    for hook in ("on_validation_epoch_end", "validation_epoch_end"):
        if hook in vars(method):
            delattr(method, hook)
    method._shared_step_momentum = _as_a_teacher(method._shared_step_momentum)
    method.on_train_start = _go_on
    if "add_and_assert_specific_cfg" in vars(method):  # the modern line's; the other is bridged
        complete = method.add_and_assert_specific_cfg
        method.add_and_assert_specific_cfg = staticmethod(lambda cfg: complete(with_momentum(cfg)))
    updater.update = _update
    base.accuracy_at_k = _of_classes(base.accuracy_at_k)  # type: ignore[attr-defined]


def with_momentum(cfg: DictConfig) -> DictConfig:
    """A config with a complete group `momentum`: what it leaves out is solo-learn's, in place."""
    given = {key: value for key, value in (cfg.get("momentum") or {}).items() if value is not None}
    cfg.momentum = {**MOMENTUM, **given}
    return cfg


def _as_a_teacher(shared_step: Callable[..., dict[str, Any]]) -> Callable[..., dict]:
    @wraps(shared_step)
    def step(self: Any, X: Tensor, targets: Tensor) -> dict[str, Any]:
        with self.teacher_pass():
            return shared_step(self, X, targets)

    return step


def _go_on(self: Any) -> None:
    """A run's start: its momentum is that of its step, which for a continued run is not the first."""
    self.last_step = step = self.trainer.global_step
    if step > 0:
        steps = self.trainer.estimated_stepping_batches
        self.momentum_updater.update_tau(cur_step=step, max_steps=steps)


@torch.no_grad()
def _update(self: Any, online_net: nn.Module, momentum_net: nn.Module) -> None:
    """solo-learn's, in place: new tensors have other strides than what comes from a checkpoint.

    Convolutions with them round differently, so that a continued run would.
    """
    for new, old in zip(online_net.parameters(), momentum_net.parameters(), strict=True):
        old.mul_(self.cur_tau).add_((1 - self.cur_tau) * new)


def _of_classes(accuracy: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(accuracy)
    def at_most_all(outputs: Tensor, targets: Tensor, top_k: Any = (1, 5)) -> Any:
        return accuracy(outputs, targets, [min(k, outputs.size(1)) for k in top_k])

    return at_most_all


def _of_labelled(shared_step: Callable[..., dict[str, Any]]) -> Callable[..., dict]:
    @wraps(shared_step)
    def step(self: Any, X: Tensor, targets: Tensor) -> dict[str, Any]:
        labelled = (targets != -1).sum()
        any_label = labelled > 0
        out = shared_step(self, X, torch.where(any_label, targets, torch.zeros_like(targets)))
        if "loss" in out:  # a momentum method need not have a classifier
            out["loss"] = out["loss"] * any_label
            for key in ("acc1", "acc5"):  # solo-learn's are per image of the batch
                out[key] = out[key] * any_label * (len(targets) / labelled.clamp(min=1))
        return out

    return step


def _counting_labelled(validation_step: Callable[..., dict[str, Any]]) -> Callable[..., dict]:
    @wraps(validation_step)
    def step(self: Any, batch: list[Tensor], *args: Any, **kwargs: Any) -> dict[str, Any]:
        metrics = validation_step(self, batch, *args, **kwargs)
        metrics["batch_size"] = (batch[1] != -1).sum()
        return metrics

    return step


def _of_so_many_images(training_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(training_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        outer = _STATISTICS_IMAGES.set(self.cfg.method_kwargs.get("statistics_images"))
        try:
            return training_step(self, *args, **kwargs)
        finally:
            _STATISTICS_IMAGES.reset(outer)

    return step


def labelled_means(outputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Means of validation figures over the labelled images of all processes.

    Args:
        outputs: for each batch its figures, tensors of one number, and as `batch_size` its number
            of labelled images.

    Returns:
        A number for each figure; nothing if no image is labelled.
    """
    names = [name for name in outputs[0] if name != "batch_size"] if outputs else []
    number = sum(out["batch_size"] for out in outputs)
    sums = [sum(out["batch_size"] * out[name] for out in outputs).reshape(()) for name in names]
    _, processes = rank_and_processes()
    if processes > 1:
        every = torch.stack([number.to(sums[0]), *sums])
        dist.all_reduce(every)
        number, *sums = every
    if not number:
        return {}
    return {name: total / number for name, total in zip(names, sums, strict=True)}


def _log_validation(self: Any) -> None:
    """The end of a validation epoch of solo-learn's BaseMethod, over labelled images only."""
    log: dict[str, Any] = labelled_means(self.validation_step_outputs)
    self.validation_step_outputs.clear()
    if self.knn_eval and not self.trainer.sanity_checking:
        acc1, acc5 = self.knn.compute()
        if acc1 >= 0:
            log |= {"val_knn_acc1": acc1, "val_knn_acc5": acc5}
    self.log_dict(log, sync_dist=True)


def _mean_over_parts(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    @wraps(loss)
    def mean(z1: Tensor, z2: Tensor) -> Tensor:
        images = _STATISTICS_IMAGES.get() or len(z1)
        if images >= len(z1):
            return loss(z1, z2)
        parts = zip(z1.split(images), z2.split(images), strict=True)
        return sum(len(one) * loss(one, other) for one, other in parts) / len(z1)  # type: ignore[return-value]

    return mean


def _without_functions(self: Any, checkpoint: dict[str, Any]) -> None:
    for scheduler in checkpoint.get("lr_schedulers", []):
        for key in [key for key, value in scheduler.items() if callable(value)]:
            del scheduler[key]


def _step_seeds(self: Any) -> list[StepSeeds]:
    seed = self.cfg.get("seed")
    return [] if seed is None else [StepSeeds(seed)]
