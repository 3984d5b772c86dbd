"""US3L: one training of a network for every width (CVPR 2023, arXiv:2303.06870).

Written from the paper's description and checked against its code (megvii-research/US3L-CVPR2023:
`workers/ssl.py`, `utils/ssl_algorithms/`, `losses/`), none of which is copied.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from ..backbones.narrow import can_be_narrowed, narrowed
from ..backbones.statistics import untracked
from ..budgets import WidthSchedule
from ..errors import InputError
from ..gates.shares import number_of_channels
from ..losses import group_penalty, negative_cosine, nt_xent, output_groups
from ..solo_learn import MomentumMethod
from .gated import GatedMethod

SLIMMABLE = ("slimmable", "fixed")

# Keys of a config's that a batch of several widths leaves no choice.
_DECIDED: dict[str, Any] = {
    "gating.separate_bn": False,
    "gating.budget_anneal": 0,
    "gating.budget_hold": 0,
    "gating.relative_budget_loss": False,
    "gating.budget_per_image": False,
    "gating.warmup_epochs": 0,
    "gating.distillation_images": 1,
    "gating.train": "all",
    "gating.momentum_path": "dense",
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "max_steps": -1,
}


class US3L(MomentumMethod, GatedMethod):
    """A universally slimmable network: the full width is taught by its own moving average, and teaches.

    Each batch is seen at the widths of a `WidthSchedule`, one after the other, both views at each:

        width 1:   SimCLR's loss between projections of the student and the other view's of the teacher
                   (`base_loss=simclr`), or −cos of predictions and the teacher's projections (`byol`)
        narrower:  −cos of predictions, by a predictor of their own, and the teacher's projections of
                   the other view at width 1

    each plus `group_penalty` in the place of weight decay, and after each the optimiser makes a step
    (`optimizer_steps=per_width`, as published: three a batch once the narrow widths have begun), or
    after all of them (`per_batch`). The teacher has width 1, and follows once a batch. Widths are those
    of gates that decide nothing (`slimmable`: all channels of a layer; `fixed`: those between a block's
    convolutions). BatchNorms normalise by the batch at every width; their running statistics are those
    of width 1, so that other widths are evaluated with statistics of their own (`recalibrate`). The
    similarities of `simclr` are those within a process's batch.

    A batch costs 8 full forward passes in the first quarter of the epochs, and about 16, 13 and 11 in
    the others, 12 on average, where a plain two-view method's costs 6. Where backbone, gates or BatchNorms
    are of another kind (`can_be_narrowed`), masks do the same in the time of 20 passes.

    Args:
        cfg: `method_kwargs`: proj_hidden_dim, proj_output_dim, pred_hidden_dim; base_loss, temperature,
            optimizer_steps, group_penalty (λ), group_slope (a). `gating.target_budget`: [LOW, 1.0].
            `gating.distillation_weight` is that of the narrow widths' loss.

    Raises:
        InputError: for a config that `check_config` refuses.
    """

    default_views = ("dense", "dense")
    regresses = True
    several_passes = True
    recalibrate = 2048
    gating_defaults: ClassVar[Mapping[str, Any]] = {
        "gate": "slimmable",
        "target_budget": [0.25, 1.0],
        "separate_bn": False,
        "distillation_weight": 1.0,
    }

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.check_config(cfg)
        self.automatic_optimization = not self.several_passes
        kwargs = {**_METHOD_DEFAULTS, **cfg.method_kwargs}
        self.narrow_weight: Any = self.gating.distillation_weight
        self.temperature = kwargs["temperature"]
        self.penalty, self.slope = kwargs["group_penalty"], kwargs["group_slope"]
        self.step_at_each_width = kwargs["optimizer_steps"] == "per_width"
        self.widths = WidthSchedule(self.gating.budget_range[0], cfg.max_epochs)  # type: ignore[index]
        hidden, out, between = (
            kwargs[key] for key in ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim")
        )
        self.projector = nn.Sequential(
            *(nn.Linear(self.features_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
            nn.Linear(hidden, out),
        )
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.narrow_predictor = _predictor(out, between)
        self._groups: dict[bool, list[Tensor]] = {}
        self.predictor = _predictor(out, between) if kwargs["base_loss"] == "byol" else None

    @classmethod
    def check_config(cls, cfg: DictConfig) -> None:
        """Refuse, before training, what a batch of several widths cannot do.

        Raises:
            InputError: naming the key, what was found and what is accepted.
        """
        for key, value in _DECIDED.items():
            group, _, name = key.rpartition(".")
            found = (cfg[group] if group else cfg).get(name)
            if found not in (None, value):
                raise InputError(f"{key}: got {found!r} with method us3l, expected {value!r}")
        if cfg.gating.gate not in SLIMMABLE:
            raise InputError(
                f"gating.gate: got {cfg.gating.gate!r} with method us3l, whose widths are the same "
                f"for all images; expected {' or '.join(SLIMMABLE)}"
            )
        if cfg.gating.gate_kwargs.get("count") is not None:
            raise InputError(
                f"gating.gate_kwargs.count: got {cfg.gating.gate_kwargs.count} with method us3l, whose "
                "gates have the channels of each width; expected none"
            )
        budget: Any = cfg.gating.target_budget
        if isinstance(budget, (int, float)) or budget[1] != 1:
            raise InputError(
                f"gating.target_budget: got {budget} with method us3l, which trains the full width; "
                "expected a range that ends at it, like [0.25, 1.0]"
            )
        if "two_encoders" in cfg.backbone.name:
            raise InputError(
                f"backbone.name: got {cfg.backbone.name!r} with method us3l, whose widths share their "
                "weights; expected one like resnet18_gated"
            )
        momentum = cfg.momentum
        if momentum.base_tau != momentum.final_tau:
            raise InputError(
                f"momentum.final_tau: got {momentum.final_tau} with method us3l, whose momentum is "
                f"constant; expected momentum.base_tau={momentum.base_tau}"
            )
        if cfg.optimizer.weight_decay and cfg.method_kwargs.get("group_penalty", 1):
            raise InputError(
                f"optimizer.weight_decay: got {cfg.optimizer.weight_decay} beside "
                "method_kwargs.group_penalty, which takes its place; expected 0 for one of them"
            )

    @property
    def trained_paths(self) -> tuple[str, ...]:
        """What validation during training describes: only width 1 has statistics then."""
        return ("dense",)

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Projector and predictors beside solo-learn's groups."""
        heads = {
            name: getattr(self, name) for name in ("projector", "narrow_predictor", "predictor")
        }
        return super().learnable_params + [
            {"name": name, "params": list(head.parameters())}
            for name, head in heads.items()
            if head is not None
        ]

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The projector follows, too."""
        return [*super().momentum_pairs, (self.projector, self.momentum_projector)]

    def training_step(self, batch: list[Any], batch_idx: int) -> Any:
        """Losses, gradients and the optimiser's steps of a batch; gives the sum of the losses."""
        _, views, targets = batch
        optimizer: Any = self.optimizers()
        widths = self.widths.at(self._seed, self.current_epoch, batch_idx)
        teacher = [self._shared_step_momentum(view, targets) for view in views]
        with torch.no_grad():
            taught = [self.momentum_projector(out["feats"]) for out in teacher]
        narrow, shares, total = [], [], torch.zeros((), device=targets.device)
        optimizer.zero_grad()
        for width in widths:
            if width == 1:
                loss = self.full_width_loss(batch, batch_idx, taught)
                loss = loss + sum(out["loss"] for out in teacher if "loss" in out) / len(teacher)
            else:
                loss, share = self.narrow_loss(views, taught, width)
                narrow.append(loss.detach())
                shares.append(share)
                loss = self.narrow_weight * loss
            loss = loss + self._penalty(width)
            self.manual_backward(loss)
            total = total + loss.detach()
            if self.step_at_each_width or width == widths[-1]:
                optimizer.step()
                optimizer.zero_grad()
                torch.clear_autocast_cache()  # which holds the weights as they were before the step
        if narrow:
            self.log("train_narrow_loss", torch.stack(narrow).mean(), on_epoch=True, sync_dist=True)
            self.log("train_flops_share", sum(shares) / len(shares), on_epoch=True)
        self._follow_schedule("step")
        return total

    def full_width_loss(self, batch: list[Any], batch_idx: int, taught: list[Tensor]) -> Tensor:
        """The base loss, and solo-learn's classification loss, at width 1.

        Args:
            batch: as in `training_step`.
            batch_idx: its number.
            taught: the teacher's projections of each view, B × D.
        """
        with self.backbone.path("dense") as passes:
            # solo-learn's base step; that of a momentum method would ask the teacher once more.
            outs = super(GatedMethod, self).training_step(batch, batch_idx)
        self._remember(passes, batch[-1])
        name, student = "train_nce_loss", [self.projector(features) for features in outs["feats"]]
        if self.predictor is None:
            losses = [nt_xent(s, t, self.temperature) for s, t in _crossed(student, taught)]
        else:
            name, student = "train_neg_cos_sim", [self.predictor(z) for z in student]
            losses = [negative_cosine(s, t) for s, t in _crossed(student, taught)]
        loss = torch.stack(losses).mean()
        self.log(name, loss.detach(), on_epoch=True, sync_dist=True)
        return outs["loss"] + loss

    def narrow_loss(
        self, views: list[Tensor], taught: list[Tensor], width: float
    ) -> tuple[Tensor, float]:
        """The loss at a width below 1, and the share of the FLOPs that it takes.

        Args:
            views: B × 3 × H × W each.
            taught: the teacher's projections of each view, B × D.
            width: told to the gates.
        """
        with untracked(self.backbone, self.projector):
            features = [self._narrow_features(view, width) for view in views]
            student = [self.narrow_predictor(self.projector(one)) for one in features]
        losses = [negative_cosine(s, t) for s, t in _crossed(student, taught)]
        flops = self.flops((views[0].shape[-2], views[0].shape[-1]))
        used = torch.tensor([number_of_channels(width, gate.channels) for gate in flops.gates])
        return torch.stack(losses).mean(), float(flops.share(used.double()))

    def _narrow_features(self, images: Tensor, width: float) -> Tensor:
        """B × 3 × H × W → B × C, of which the first ⌈w·C⌉ are not zero."""
        if not can_be_narrowed(self.backbone):
            told = torch.full((), width, device=images.device)
            with self.backbone.path("gated", budget=told):
                return self.backbone(images)
        with narrowed(self.backbone, width), self.backbone.path("dense"):
            features = self.backbone(images)
        return F.pad(features, (0, self.features_dim - features.shape[1]))

    def _penalty(self, width: float) -> Tensor:
        ramp = min(1.0, self.current_epoch / max(1, self.widths.epochs // 2))
        heads = [self.projector, self.predictor if width == 1 else self.narrow_predictor]
        modules = [self.backbone, *(head for head in heads if head is not None)]
        parameters = [p for module in modules for p in module.parameters()]
        if (width == 1) not in self._groups:
            self._groups[width == 1] = [output_groups(p) for p in parameters]
        penalty = group_penalty(
            parameters, self._groups[width == 1], self.penalty, ramp * self.slope
        )
        if width == 1:
            self.log("train_group_penalty", penalty.detach(), on_epoch=True)
        return penalty

    def on_train_epoch_end(self) -> None:
        """Schedules by epochs; Lightning steps none where a method steps its optimiser itself."""
        self._follow_schedule("epoch")

    def _follow_schedule(self, interval: str) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval:
                config.scheduler.step()  # type: ignore[call-arg]


_METHOD_DEFAULTS = {
    "base_loss": "simclr",
    "temperature": 0.5,
    "optimizer_steps": "per_width",
    "group_penalty": 5e-5,
    "group_slope": 0.05,
}


def _predictor(features: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, features),
    )


def _crossed(student: list[Tensor], taught: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each view's, with what the teacher made of the other view."""
    return list(zip(student, reversed(taught), strict=True))
