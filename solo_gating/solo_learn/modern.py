"""The modern line (GitHub's 1.0.6 to 1.0.8): its own names, with the kNN that runs today."""

import solo.methods.base
import solo.utils.knn
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

from .fixes import current_knn, mend_momentum
from .lars import LARS

WeightedKNNClassifier = current_knn(_WeightedKNNClassifier)
solo.methods.base.WeightedKNNClassifier = WeightedKNNClassifier
solo.utils.knn.WeightedKNNClassifier = WeightedKNNClassifier  # for solo-learn's main_knn.py

mend_momentum(BaseMomentumMethod, MomentumUpdater, solo.methods.base)

MomentumMethod = BaseMomentumMethod  # to be derived from; the other line's takes no config

for trained in (BaseMethod, LinearModel):
    trained._OPTIMIZERS["lars"] = LARS

__all__ = [
    "LARS",
    "METHODS",
    "BarlowTwins",
    "BaseMethod",
    "BaseMomentumMethod",
    "FullTransformPipeline",
    "LinearModel",
    "MomentumMethod",
    "NCropAugmentation",
    "SimCLR",
    "SimSiam",
    "VICReg",
    "WeightedKNNClassifier",
    "accuracy_at_k",
    "build_transform_pipeline",
]
