"""Gating for any solo-learn method that compares views: `class X(Method, DualMethod)`."""

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn

from ..backbones import ForwardPass, gated_backbones
from ..checkpoints.older import add_gates_group
from ..config.gating import GatingConfig
from ..distributed import rank_and_processes
from ..errors import InputError
from ..flops import BackboneFlops, count_flops, selected_channels
from ..losses import bound_loss, budget_loss, unexplained_variance
from ..solo_learn import BaseMethod, WeightedKNNClassifier
from ..transfer import send


class GatedMethod(BaseMethod):
    """The base step of solo-learn's BaseMethod, each view on its path, plus budget and bound.

    Put it behind a solo-learn method, as in `class VICRegDual(VICReg, DualMethod)`: the method's
    `training_step` calls its base's, finds this one, and adds what comes back to its own loss:

        total = SSL(z_1, z_2) + classification + Σ over gated views of (budget + bound)

    and, for kinds of gates that have one, their own penalty, the mean over the gated views.
    (unification paper, Eqs. 1 and 3; the classifier sees detached features.) Nothing else of the
    method changes, whichever it is. A momentum method's teacher, a copy of the whole backbone that
    follows it, takes the path that `gating.momentum_path` says; losses, metrics and the kNN are the
    student's. Where `gating.target_budget` is a range, each step has a budget
    of its own, of all its gated views, or each of its images has; validation is at the middle of
    the range.

    Raises:
        InputError: for a backbone without gates, or a `gating` group that cannot be used.
    """

    default_views: tuple[str, ...] = ("gated", "dense")
    # Whether gated passes beside the views' regress to a target: `DistilledMethod`'s third one, or US3L's.
    regresses = False
    gating_defaults: ClassVar[Mapping[str, Any]] = {}  # where a config's `gating` says nothing
    several_passes = False  # whether it steps its optimiser itself, after several backward passes
    # As many training images re-estimate a path's BatchNorm statistics before it is evaluated, unless
    # the evaluation's config says otherwise.
    recalibrate = 0

    def __init__(self, cfg: DictConfig):
        self.gating = self.gating_config(cfg)
        cfg.backbone.kwargs = {**(cfg.backbone.get("kwargs") or {}), **self.gating.backbone_kwargs}
        check_gated_backbone(cfg)
        self._teacher_passes: deque[tuple[str, Tensor | None, int]] = deque()
        super().__init__(cfg)
        self._losses = self.backbone.gates[0].losses
        self._seed = cfg.get("seed")
        self.budget_schedule = self.gating.schedule(cfg.max_epochs)
        self._flops: dict[tuple[int, int], BackboneFlops] = {}
        # solo-learn's own kNN mixes the views; here each path has a bank of its own.
        self.path_knn = nn.ModuleDict()
        if self.knn_eval:
            self.knn_eval: bool = False
            del self.knn
            for path in self.trained_paths:
                self.path_knn[path] = WeightedKNNClassifier(
                    k=self.knn_k, distance_fx=cfg.knn_eval.distance_func
                )

    @classmethod
    def gating_config(cls, cfg: DictConfig) -> GatingConfig:
        """The group `gating` of a config for this method, complete in the config, too."""
        return GatingConfig.from_config(cfg, cls.default_views, cls.regresses, cls.gating_defaults)

    @classmethod
    def check_config(cls, cfg: DictConfig) -> None:
        """Refuse, before training, what this method cannot do; most can do all of it.

        Args:
            cfg: complete.
        """

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """solo-learn's groups, the backbone's divided in two: without the gates, and the gates."""
        backbone, *others = super().learnable_params
        gates, parameters = self._gate_parameters, list(backbone["params"])
        own = {
            "name": "gates",
            "params": [p for p in parameters if p in gates],
            "weight_decay": self.gating.weight_decay,
        }
        backbone["params"] = [p for p in parameters if p not in gates]
        groups = [backbone, own, *others]
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        return groups

    @property
    def _gate_parameters(self) -> set[nn.Parameter]:
        return {p for gate in self.backbone.gates for p in gate.parameters()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fit the optimiser's state of an earlier version to today's parameter groups."""
        super().on_load_checkpoint(checkpoint)
        add_gates_group(
            checkpoint,
            list(self.backbone.parameters()),
            self._gate_parameters,
            self.gating.weight_decay,
        )

    @property
    def trained_paths(self) -> tuple[str, ...]:
        """The paths that the step takes, the one that solo-learn's own metrics describe first."""
        return self.gating.trained_paths

    def flops(self, resolution: tuple[int, int]) -> BackboneFlops:
        """FLOPs of the backbone for images of a size; counted once for each size."""
        if resolution not in self._flops:
            self._flops[resolution] = count_flops(self.backbone, resolution)
        return self._flops[resolution]

    def training_step(self, batch: list[Any], batch_idx: int) -> dict[str, Any]:
        """solo-learn's base step; its "loss" also holds the gates' losses."""
        epoch = self.current_epoch - self.gating.warmup_epochs
        views = self.views_of_step() if epoch >= 0 else ("dense",) * len(self.gating.views)
        budget, told = self.budget_of_step(max(epoch, 0), batch[-1])
        self._prepare_teacher(views, told)
        with self.backbone.path(*views, budget=told) as passes:
            outs = super().training_step(batch, batch_idx)
        large = list(passes)[: self.num_large_crops]
        gated = [view for view in passes if view.path == "gated"]
        if self.regresses and epoch >= 0:
            third, told, loss = self.third_pass(batch[1], large[0], told)
            outs["loss"] = outs["loss"] + loss
            gated.append(third)
            large.append(third)
        if gated:
            outs["loss"] = outs["loss"] + self.gate_losses(gated, epoch, budget, told)
        self._remember(large, batch[-1])
        return outs

    def third_pass(
        self, views: list[Tensor] | Tensor, dense: ForwardPass, told: Tensor | None
    ) -> tuple[ForwardPass, Tensor | None, Tensor]:
        """A pass beside those of the views; for methods that have one.

        Args:
            views: the step's images, a batch for each view.
            dense: the first view's pass.
            told: what the gates are told, as in `budget_of_step`.

        Returns:
            The pass, what its gates were told, and what it adds to the step's loss.
        """
        raise NotImplementedError(f"{type(self).__name__} has no third pass")

    def _prepare_teacher(self, views: tuple[str, ...], told: Tensor | None) -> None:
        """A momentum method's teacher sees the large crops; while the gates rest, dense."""
        path = self.gating.momentum_path
        follows = path == "same" or "gated" not in views
        self._teacher_passes = deque(
            (view if follows else path, told, number)
            for number, view in enumerate(views[: self.num_large_crops])
        )

    def teacher_pass(self) -> AbstractContextManager[Any]:
        """A context for a momentum method's teacher: the path, and what the gates are told.

        In a training step those of the next view; else `gating.momentum_path`, where "same" means
        the path that solo-learn's own metrics describe.
        """
        path, told, number = self.gating.momentum_path, None, 0
        if self._teacher_passes:
            path, told, number = self._teacher_passes.popleft()
        elif path == "same":
            path = self.trained_paths[0]
        return self.momentum_backbone.path(path, budget=told, view=number)

    def views_of_step(self) -> tuple[str, ...]:
        """The path of each view of this step; like the budget the same on every process.

        The epochs of warm-up, in which all are dense, are not asked for.
        """
        return self.gating.views

    def budget_of_step(self, epoch: int, targets: Tensor) -> tuple[float, Tensor | None]:
        """The budget of this step.

        Args:
            epoch: since the end of warm-up.
            targets: B, this process's labels: how many images there are, and on which device.

        Returns:
            The budget, of which the step's losses speak, the mean over the images of all processes;
            and what the gates are told: a number, one for each image (B), or None.
        """
        schedule, step = self.budget_schedule, self.global_step
        if not (self.gating.budget_per_image and self.gating.told):
            budget = schedule.at(self._seed, step, epoch)
            told = torch.full((), budget, device=targets.device) if self.gating.told else None
            return budget, told
        rank, processes = rank_and_processes()
        images = len(targets)
        every = schedule.each(self._seed, step, epoch, images * processes)
        own = every[rank * images : (rank + 1) * images]
        return sum(every) / len(every), send(torch.tensor(own), targets.device)

    def gate_losses(
        self, passes: list[ForwardPass], epoch: int, target: float, told: Tensor | None
    ) -> Tensor:
        """Σ over the gated views of (budget + bound), those that the kind of gates has, and its penalty.

        All are logged, with the share of the FLOPs that was used.

        Args:
            passes: the gated views' forward passes.
            epoch: since the end of warm-up.
            target: the step's budget.
            told: what the gates were told, as in `budget_of_step`.

        Returns:
            A number; its value is the same on every process.
        """
        every_share, means = [], []
        for view in passes:
            flops = self.flops(view.resolution)
            every_share.append(flops.share(selected_channels(view.masks)))
            # The bound loss has a gradient of its own.
            counted = selected_channels(view.masks, self.gating.bound_gradient).mean(dim=0)
            means.append(torch.cat([every_share[-1].mean()[None], flops.channel_shares(counted)]))
        strictness = self.gating.sparsity_weight, self.gating.relative_budget_loss
        shares, budgets, bounds = [], [], []
        for of_images, mean in zip(every_share, global_mean(torch.stack(means)), strict=True):
            share, in_bounds = mean[0], mean[1:]
            shares.append(share)
            if told is not None and told.ndim:
                off = budget_loss(of_images, told.to(of_images), *strictness)
                budgets.append(global_mean(off.mean()))
            else:
                budgets.append(budget_loss(share, target, *strictness))
            bounds.append(
                bound_loss(
                    in_bounds,
                    self.gating.bound_share(target),
                    epoch,
                    self.gating.bound_weight,
                    self.gating.bound_decay,
                )
            )
        losses = {
            "budget": torch.stack(budgets).sum(),
            "bound": torch.stack(bounds).sum(),
        }
        losses = {name: loss for name, loss in losses.items() if name in self._losses}
        metrics = {f"train_{name}_loss": loss for name, loss in losses.items()}
        penalties = [view.penalty for view in passes if view.penalty is not None]
        if penalties:
            losses["penalty"] = global_mean(torch.stack(penalties).mean())
            metrics["train_gate_penalty"] = losses["penalty"]
        metrics["train_flops_share"] = torch.stack(shares).mean()
        if not self.budget_schedule.constant:
            metrics["train_target_budget"] = torch.full_like(shares[0], target)
        # Already the same on every process. Not for Lightning's own bar, which reads its figures
        # whenever anything asks for one of the step's.
        self.log_dict({k: v.detach() for k, v in metrics.items()}, on_epoch=True)
        return sum(losses.values(), shares[0].new_zeros(()))

    def _remember(self, passes: Iterable[ForwardPass], targets: Tensor) -> None:
        for view in passes:
            if view.path in self.path_knn:
                own = targets[: len(view.features)]  # a third pass may have fewer images
                features = view.features.detach()[own != -1]
                knn: Any = self.path_knn[view.path]
                knn(train_features=features, train_targets=own[own != -1])

    def validation_step(
        self, batch: list[Tensor], batch_idx: int, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """solo-learn's step on the first trained path, and `val_<path>_acc1` of every path.

        solo-learn's end of the epoch logs the means of all that this returns.
        """
        X, targets = batch
        first, *others = self.trained_paths
        with self.backbone.path(first) as passes:
            metrics = super().validation_step(batch, batch_idx, *args, **kwargs)
        metrics[f"val_{first}_acc1"] = metrics["val_acc1"]
        self._log_validation(passes[-1], targets)
        for path in others:
            with self.backbone.path(path) as passes:
                out = self.base_validation_step(X, targets)
            metrics[f"val_{path}_acc1"] = out["acc1"]
            self._log_validation(passes[-1], targets)
        return metrics

    def _log_validation(self, view: ForwardPass, targets: Tensor) -> None:
        if view.masks:
            share = self.flops(view.resolution).share(selected_channels(view.masks)).mean()
            self.log("val_flops_share", share, sync_dist=True, batch_size=targets.size(0))
        if view.path in self.path_knn and not self.trainer.sanity_checking:
            knn: Any = self.path_knn[view.path]
            knn(test_features=view.features.detach(), test_targets=targets)

    def on_validation_epoch_end(self) -> None:
        """solo-learn's means over the epoch, and each path's kNN accuracy."""
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking:
            return
        for path, knn in self.path_knn.items():
            acc1, _ = knn.compute()  # type: ignore[operator]
            if acc1 >= 0:  # there were labelled training features
                self.log(f"val_{path}_knn_acc1", acc1, prog_bar=True, sync_dist=True)


class DualMethod(GatedMethod):
    """One view gated, the other dense, through the same weights (VICReg-Dual-Gating)."""

    default_views = ("gated", "dense")


class GatedViewsMethod(GatedMethod):
    """Both views gated (the papers' Baseline-2, and the SimSiam of the IMVIP paper)."""

    default_views = ("gated", "gated")


class DistilledMethod(GatedMethod):
    """Every view dense, as in the plain method; a third, gated pass regresses to the dense features.

    The views train the dense path exactly as the plain method does. Then the first view's images, or a
    share of them, take the gated path, and its features regress to the dense ones *of the same view*:

        loss += w · mean_c E(f_c − t_c)² / (Var t_c + 10⁻⁴)

    where t gets no gradient. (In-place distillation is of universally slimmable networks, Yu and
    Huang, arXiv:1903.05134, for one static network at a time; here each image has its own channels.)
    A step costs as much as 9 forward passes, where the plain method's costs 6; with a half or a
    quarter of the images, 7.5 or 6.75.
    """

    default_views = ("dense", "dense")
    regresses = True

    def third_pass(
        self, views: list[Tensor] | Tensor, dense: ForwardPass, told: Tensor | None
    ) -> tuple[ForwardPass, Tensor | None, Tensor]:
        """As in `GatedMethod`: the first view's images once more, gated."""
        images = first_view(views)
        share: Any = self.gating.distillation_images
        weight: Any = self.gating.distillation_weight
        number = min(len(images), max(2, round(share * len(images))))  # two, for BatchNorm
        if told is not None and told.ndim:
            told = told[:number]
        with self.backbone.path("gated", budget=told) as passes:
            self.backbone(images[:number])
        third = passes[-1]
        loss = unexplained_variance(third.features, dense.features[:number], global_mean)
        self.log("train_unexplained_variance", loss.detach(), on_epoch=True)
        return third, told, weight * loss


class LearntGates(GatedMethod):
    """In front of a distilled method: with `gating.train=gates` its step is the third pass alone.

    The dense path is then a teacher in evaluation mode, of the first view, and gates and gated
    BatchNorms are what learns, beside solo-learn's online classifier. A step costs as much as 4 forward
    passes.
    """

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self._resting: list[nn.Module] = []
        if self.gating.train == "gates":
            learnt = {m for module in self.backbone.gated_only for m in module.modules()}
            own = {p for module in learnt for p in module.parameters()}
            for name, module in self.named_children():
                if name != "classifier":
                    for parameter in module.parameters():
                        parameter.requires_grad_(parameter in own)
            self._resting = [
                m for m in self.backbone.modules() if m not in learnt and not list(m.children())
            ]

    def training_step(self, batch: list[Any], batch_idx: int) -> Any:
        """The method's, or the gates' alone."""
        if self.gating.train == "all":
            return super().training_step(batch, batch_idx)
        # Here, because it is Lightning that says when a model is in training mode.
        for module in self._resting:
            module.training = False
        views, targets = batch[1], batch[-1]
        budget, told = self.budget_of_step(self.current_epoch, targets)
        with self.backbone.path("dense") as passes:
            outs = self.base_training_step(first_view(views), targets)
        third, told, loss = self.third_pass(views, passes[-1], told)
        self.log("train_class_loss", outs["loss"].detach(), on_epoch=True)
        self._remember([passes[-1], third], targets)
        return outs["loss"] + loss + self.gate_losses([third], self.current_epoch, budget, told)


def first_view(views: list[Tensor] | Tensor) -> Tensor:
    """The first view's images of a batch, whose only view may be a tensor by itself."""
    return views if isinstance(views, Tensor) else views[0]


def plain_method(method: type[Any]) -> type[Any]:
    """The method of solo-learn's, or of one's own, that a gated one is made of; else the method."""
    return next(cls for cls in method.__mro__ if not issubclass(cls, GatedMethod))


def check_gated_backbone(cfg: DictConfig) -> None:
    """Refuse a backbone that a gated method cannot train.

    Args:
        cfg: with a complete group `gating`.

    Raises:
        InputError: for a backbone without gates, or a dense encoder that no view would train.
    """
    name, views = cfg.backbone.name, cfg.gating.views
    if name not in gated_backbones():
        raise InputError(
            f"backbone.name: got {name!r}, method {cfg.method!r} needs gates; "
            f"expected {', '.join(gated_backbones())}"
        )
    if "two_encoders" in name and "dense" not in views:
        raise InputError(
            f"gating.views: got {list(views)}, backbone {name!r} needs a dense view to train "
            "its dense encoder"
        )


def global_mean(values: Tensor) -> Tensor:
    """Mean over all processes, of a mean over this process's batch.

    The value is global, the gradient that of this process's part: DDP averages the processes'
    gradients, so that N processes with batch B give the gradients of one with N·B.
    """
    _, processes = rank_and_processes()
    if processes == 1:
        return values
    mean = values.detach().clone()
    dist.all_reduce(mean)
    return values + (mean / processes - values.detach())
