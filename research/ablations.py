"""Variants of VICReg-Dual-Gating that the study of budgets has and the package does not.

python research/ablations.py --config-name vicreg_dual_cifar10 method=NAME [key=value ...]

is `python -m solo_gating.main_pretrain` that knows their NAMEs, too: see ABLATIONS.
"""

import math
import random
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from solo_gating import GATED_METHODS, METHODS
from solo_gating.backbones import ForwardPass
from solo_gating.backbones.paths import scope_of
from solo_gating.budgets import BudgetSchedule
from solo_gating.losses import unexplained_variance
from solo_gating.main_pretrain import main
from solo_gating.methods import GatedMethod, VICRegDual, global_mean

VICRegDistilled: Any = GATED_METHODS["vicreg_distilled"]


class HalfDense(VICRegDual):
    """In half of the steps, drawn at random, both views are dense."""

    def views_of_step(self) -> tuple[str, ...]:
        """As drawn."""
        draw = random.Random(f"dense, seed {self._seed}, step {self.global_step}").random()
        return ("dense",) * len(self.gating.views) if draw < 0.5 else super().views_of_step()


class InheritedBatchNorm(VICRegDual):
    """After the dense epochs at the start the gated BatchNorms become copies of the dense ones."""

    def on_train_epoch_start(self) -> None:
        """The copying."""
        super().on_train_epoch_start()
        if self.current_epoch == self.gating.warmup_epochs:
            for block in self.backbone.gated_blocks:
                block.gated_bn1.load_state_dict(block.bn1.state_dict())
                block.gated_bn2.load_state_dict(block.bn2.state_dict())


class DetachedDense(VICRegDual):
    """The dense view is a target of the gated one: its gradient ends behind the backbone."""

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.backbone.register_forward_hook(_detached_beside_gated)


def _detached_beside_gated(backbone: Any, args: Any, features: Tensor) -> Tensor:
    """Nothing of the epochs in which all views are dense."""
    scope = scope_of(backbone)
    paths = [view.path for view in scope.passes] if scope and backbone.training else []
    return features.detach() if paths == ["gated", "dense"] else features


class Diverse(VICRegDual):
    """Channels are rewarded for deciding differently from image to image.

    A view's loss gets −4 · the mean over channels of their masks' variance over the batch: −1 at
    the least.
    """

    def gate_losses(self, passes: list[ForwardPass], *args: Any) -> Tensor:
        """With the reward."""
        masks = [torch.cat(view.masks, dim=1) for view in passes]
        variances = torch.stack([mask.var(dim=0, correction=0).mean() for mask in masks])
        return super().gate_losses(passes, *args) - 4 * variances.sum()


class Shuffled(VICRegDual):
    """Each step draws which of the views take which of the paths."""

    def views_of_step(self) -> tuple[str, ...]:
        """As drawn."""
        views = list(super().views_of_step())
        random.Random(f"views, seed {self._seed}, step {self.global_step}").shuffle(views)
        return tuple(views)


class LogUniformSchedule(BudgetSchedule):
    """Budgets that are uniform in the logarithm."""

    def each(self, seed: int | None, step: int, epoch: int, images: int) -> list[float]:
        """As drawn."""
        low, high = self.ends(epoch)
        draws = self.draws(seed, step, images)
        return [min(high, low * math.exp(u * math.log(high / low))) for u in draws]


class SandwichSchedule(BudgetSchedule):
    """Successive steps take the lower end, the upper end, and a draw between, in turn.

    The sandwich rule of slimmable networks (arXiv:1903.05134) does all three in *every* step, at
    three times the cost.
    """

    def each(self, seed: int | None, step: int, epoch: int, images: int) -> list[float]:
        """As drawn."""
        if step % 3 < 2:
            return [self.ends(epoch)[step % 3]] * images
        return super().each(seed, step, epoch, images)


class LogUniform(VICRegDual):
    """Steps draw from a range as `LogUniformSchedule`."""

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.budget_schedule = LogUniformSchedule(**asdict(self.budget_schedule))


class Sandwich(VICRegDual):
    """Steps draw from a range as `SandwichSchedule`."""

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.budget_schedule = SandwichSchedule(**asdict(self.budget_schedule))


class DistilledProjections(VICRegDistilled):
    """The projector's outputs are regressed to, not the backbone's."""

    def third_pass(self, views: Any, dense: ForwardPass, told: Tensor | None) -> Any:
        """With both passes' features projected."""
        third, told, _ = super().third_pass(views, dense, told)
        with torch.no_grad():
            target = self.projector(dense.features[: len(third.features)])
        found = self.projector(third.features)
        loss = unexplained_variance(found, target, global_mean)
        return third, told, self.gating.distillation_weight * loss


class DistilledAcrossViews(VICRegDistilled):
    """The second view's gated features regress to the first one's dense features."""

    def third_pass(self, views: Any, dense: ForwardPass, told: Tensor | None) -> Any:
        """With the views swapped."""
        return super().third_pass(views[::-1], dense, told)


class DistilledGates(VICRegDistilled):
    """The regression's gradient reaches gates and gated BatchNorms only, not the shared weights."""

    def third_pass(self, views: Any, dense: ForwardPass, told: Tensor | None) -> Any:
        """With the shared weights as constants."""
        own = {p for module in self.backbone.gated_only for p in module.parameters()}
        weights = {
            n: p for n, p in self.backbone.named_parameters() if p not in own and p.requires_grad
        }
        for weight in weights.values():
            weight.requires_grad_(False)
        try:
            return super().third_pass(views, dense, told)
        finally:
            for weight in weights.values():
                weight.requires_grad_(True)


ABLATIONS: dict[str, type[GatedMethod]] = {
    "vicreg_half_dense": HalfDense,
    "vicreg_inherited_bn": InheritedBatchNorm,
    "vicreg_diverse": Diverse,
    "vicreg_detached_dense": DetachedDense,
    "vicreg_shuffled": Shuffled,
    "vicreg_log_uniform": LogUniform,
    "vicreg_sandwich": Sandwich,
    "vicreg_distilled_projections": DistilledProjections,
    "vicreg_distilled_across_views": DistilledAcrossViews,
    "vicreg_distilled_gates": DistilledGates,
}
GATED_METHODS.update(ABLATIONS)
METHODS.update(ABLATIONS)

if __name__ == "__main__":
    main()
