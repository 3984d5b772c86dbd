"""The modern line (GitHub's 1.0.6 to 1.0.8): its own names, with the kNN that runs today."""

from typing import Any

import solo.methods.base
import solo.utils.knn
import torch
from solo.data.pretrain_dataloader import (
    FullTransformPipeline,
    NCropAugmentation,
    build_transform_pipeline,
)
from solo.methods import METHODS, BarlowTwins, BaseMethod, LinearModel, SimCLR, SimSiam, VICReg
from solo.methods.base import BaseMomentumMethod
from solo.utils.knn import WeightedKNNClassifier as _WeightedKNNClassifier
from solo.utils.metrics import accuracy_at_k
from solo.utils.momentum import MomentumUpdater
from torch import nn

from .fixes import current_knn, mend_validation
from .lars import LARS

WeightedKNNClassifier = current_knn(_WeightedKNNClassifier)
solo.methods.base.WeightedKNNClassifier = WeightedKNNClassifier
solo.utils.knn.WeightedKNNClassifier = WeightedKNNClassifier  # for solo-learn's main_knn.py

mend_validation(solo.methods.base.BaseMomentumMethod, "_shared_step_momentum")

for trained in (BaseMethod, LinearModel):
    trained._OPTIMIZERS["lars"] = LARS


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


BaseMomentumMethod.on_train_start = _go_on
MomentumUpdater.update = _update

__all__ = [
    "LARS",
    "METHODS",
    "BarlowTwins",
    "BaseMethod",
    "FullTransformPipeline",
    "LinearModel",
    "NCropAugmentation",
    "SimCLR",
    "SimSiam",
    "VICReg",
    "WeightedKNNClassifier",
    "accuracy_at_k",
    "build_transform_pipeline",
]
