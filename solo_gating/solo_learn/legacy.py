"""PyPI's 1.0.2 under the modern line's names, signatures and config schema.

1.0.2 configures its classes by keyword arguments, calls the backbone `encoder`, has no backbone
registry and ends its validation epochs in a hook that Lightning 2 refuses. Its method classes are
used as they are; the bridge stands above and below them. For VICReg, from the top:

    VICReg (here)          a config becomes the method's keyword arguments
    solo's VICReg          projector, loss
    any subclass's mixins  see `solo_gating.methods`
    BaseMethod (here)      a config becomes the base class's keyword arguments; modern hooks
    solo's BaseMethod

so that a class written as `class Mine(VICReg, MyMixin)` with `MyMixin(BaseMethod)` has the same
order of methods on both lines. Momentum methods have solo's BaseMomentumMethod above the mixins.
Not bridged: W-MSE (it calls functions that PyTorch has removed), DINO (it has a `clip_gradients`
that is not today's Lightning's), ReSSL, SwAV, DeepCluster, fine-tuning, mixup. Unlike on the
modern line, the outputs of `base_training_step` hold no projections: 1.0.2 projects afterwards.
"""

import inspect
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from ..errors import InputError
from .fixes import current_knn, mend_momentum, with_momentum
from .legacy_import import import_solo

import_solo()

# ruff: noqa: E402 (1.0.2 can be imported only through import_solo)
import solo.methods.base as solo_base
import solo.methods.linear as solo_linear
import solo.methods.simclr as solo_simclr
import solo.methods.vicreg as solo_vicreg
from solo.methods import METHODS as SOLO_METHODS
from solo.methods.base import BaseMomentumMethod
from solo.utils.knn import WeightedKNNClassifier as _WeightedKNNClassifier
from solo.utils.metrics import accuracy_at_k
from solo.utils.momentum import MomentumUpdater
from solo.utils.pretrain_dataloader import (
    FullTransformPipeline,
    NCropAugmentation,
)

from .lars import LARS
from .legacy_augmentations import build_transform_pipeline
from .legacy_optimizers import configure_optimizers
from .line import WITH_CIFAR_STEM

WeightedKNNClassifier = current_knn(_WeightedKNNClassifier)
solo_base.WeightedKNNClassifier = WeightedKNNClassifier

_OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "lars": LARS,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_MODERN_DEFAULTS = {
    "backbone": {"kwargs": {}},
    "optimizer": {"exclude_bias_n_norm_wd": False, "kwargs": {}, "layer_decay": 0.0},
    "scheduler": {
        "lr_decay_steps": None,
        "min_lr": 0.0,
        "warmup_start_lr": 3e-5,
        "warmup_epochs": 10,
        "interval": "step",
    },
    "knn_eval": {"enabled": False, "k": 20, "distance_func": "euclidean"},
    "performance": {"disable_channel_last": False},
    "accumulate_grad_batches": 1,
    "finetune": False,
    "method_kwargs": {},
}


def _add_defaults(cfg: DictConfig, defaults: dict[str, Any]) -> DictConfig:
    """Fill in place what a config leaves out."""
    cfg.merge_with(OmegaConf.merge(defaults, cfg))
    return cfg


def _dropping_method(factory: Any) -> Any:
    return lambda method, *args, **kwargs: factory(*args, **kwargs)


class BaseMethod(solo_base.BaseMethod):
    """1.0.2's BaseMethod with the modern constructor, hooks and registries."""

    _BACKBONES = {
        name: _dropping_method(getattr(torchvision.models, name))
        for name in ("resnet18", "resnet50")
    }
    _OPTIMIZERS = _OPTIMIZERS
    _RENAMED = {"encoder": "backbone", "momentum_encoder": "momentum_backbone"}

    validation_epoch_end = None  # Lightning 2 refuses a method of this name
    # 1.0.2's methods read the old names.
    encoder = property(lambda self: self.backbone)
    momentum_encoder = property(lambda self: self.momentum_backbone)

    def __init__(self, cfg: DictConfig):
        cfg = self.add_and_assert_specific_cfg(cfg)
        self.cfg = cfg
        if cfg.backbone.name not in self._BACKBONES:
            raise InputError(
                f"backbone.name: got {cfg.backbone.name!r}, expected with solo-learn 1.0.2 are "
                f"{', '.join(sorted(self._BACKBONES))}"
            )
        data, optimizer, scheduler = cfg.data, cfg.optimizer, cfg.scheduler
        super().__init__(
            encoder="resnet18",  # only says that the backbone is a ResNet; see __setattr__
            num_classes=data.num_classes,
            backbone_args={**cfg.backbone.kwargs, "cifar": data.dataset in WITH_CIFAR_STEM},
            max_epochs=cfg.max_epochs,
            batch_size=optimizer.batch_size,
            optimizer=optimizer.name,
            lars=optimizer.name == "lars",
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            classifier_lr=optimizer.classifier_lr,
            exclude_bias_n_norm=False,
            accumulate_grad_batches=cfg.accumulate_grad_batches or 1,
            extra_optimizer_args=dict(optimizer.kwargs),
            scheduler=scheduler.name,
            min_lr=scheduler.min_lr,
            warmup_start_lr=scheduler.warmup_start_lr,
            warmup_epochs=scheduler.warmup_epochs,
            lr_decay_steps=scheduler.lr_decay_steps,
            num_large_crops=data.num_large_crops,
            num_small_crops=data.num_small_crops,
            knn_eval=cfg.knn_eval.enabled,
            knn_k=cfg.knn_eval.k,
        )
        if self.knn_eval:
            self.knn.distance_fx = cfg.knn_eval.distance_func
        self.no_channel_last = cfg.performance.disable_channel_last
        self.validation_step_outputs: list[dict[str, Any]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_model":  # 1.0.2 has its table of architectures inside __init__
            value = partial(self._BACKBONES[self.cfg.backbone.name], self.cfg.method)
        super().__setattr__(self._RENAMED.get(name, name), value)

    @classmethod
    def add_and_assert_specific_cfg(cls, cfg: DictConfig) -> DictConfig:
        """Fill in the modern line's defaults."""
        return _add_defaults(cfg, _MODERN_DEFAULTS)

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The parent's groups, the backbone's under its modern name."""
        groups = super().learnable_params
        groups[0]["name"] = "backbone"
        return groups

    def configure_optimizers(self) -> Any:
        """The modern line's optimisers and per-step schedules."""
        return configure_optimizers(self, self.cfg, self.learnable_params, self._OPTIMIZERS)

    def base_forward(self, X: Tensor) -> dict[str, Tensor]:
        """Features, and logits of the online classifier."""
        if not self.no_channel_last:
            X = X.to(memory_format=torch.channels_last)
        return super().base_forward(X)

    def _base_shared_step(self, X: Tensor, targets: Tensor) -> dict[str, Any]:
        return super()._base_shared_step(X, targets)

    def base_training_step(self, X: Tensor, targets: Tensor) -> dict[str, Any]:
        """One view of a training step."""
        return self._base_shared_step(X, targets)

    def base_validation_step(self, X: Tensor, targets: Tensor) -> dict[str, Any]:
        """One batch of validation images."""
        return self._base_shared_step(X, targets)

    def validation_step(
        self,
        batch: list[Tensor],
        batch_idx: int,
        dataloader_idx: int | None = None,
        update_validation_step_outputs: bool = True,
    ) -> dict[str, Any]:
        """Accuracies of one batch, kept for the end of the epoch."""
        metrics = super().validation_step(batch, batch_idx)
        if update_validation_step_outputs:
            self.validation_step_outputs.append(metrics)
        return metrics


solo_base.BaseMethod._BACKBONES = BaseMethod._BACKBONES  # where the modern line has them


def _momentum_forward(forward: Any) -> Any:
    @wraps(forward)
    def in_memory_format(self: Any, X: Tensor) -> dict[str, Tensor]:
        return forward(self, X if self.no_channel_last else X.to(memory_format=torch.channels_last))

    return in_memory_format


def _momentum_validation_step(
    self: Any,
    batch: list[Tensor],
    batch_idx: int,
    dataloader_idx: int | None = None,
    update_validation_step_outputs: bool = True,
) -> dict[str, Any]:
    """The modern line's: one set of figures, the momentum classifier's among them."""
    metrics = super(BaseMomentumMethod, self).validation_step(
        batch, batch_idx, update_validation_step_outputs=False
    )
    out = self._shared_step_momentum(*batch)
    if self.momentum_classifier is not None:
        metrics |= {f"momentum_val_{key}": out[key] for key in ("loss", "acc1", "acc5")}
    if update_validation_step_outputs:
        self.validation_step_outputs.append(metrics)
    return metrics


def _momentum_step(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
    """The modern line's: the momentum networks follow after a step of the optimiser's."""
    step = self.trainer.global_step
    if step > self.last_step:
        for pair in self.momentum_pairs:
            self.momentum_updater.update(*pair)
        self.log("tau", self.momentum_updater.cur_tau)
        steps = self.trainer.estimated_stepping_batches
        self.momentum_updater.update_tau(cur_step=step, max_steps=steps)
    self.last_step = step


BaseMomentumMethod.base_momentum_forward = _momentum_forward(
    BaseMomentumMethod.base_momentum_forward
)
BaseMomentumMethod.validation_step = _momentum_validation_step
BaseMomentumMethod.on_train_batch_end = _momentum_step
mend_momentum(BaseMomentumMethod, MomentumUpdater, solo_base)


class _FromConfig:
    """Top of a bridged method: `Method(cfg)` gives 1.0.2's class the arguments it names."""

    _METHOD_DEFAULTS: dict[str, Any] = {}

    def __init__(self, cfg: DictConfig):
        _add_defaults(cfg, {"method_kwargs": self._METHOD_DEFAULTS})
        momentum = {}
        if isinstance(self, BaseMomentumMethod):
            with_momentum(cfg)
            momentum = {
                "base_tau_momentum": cfg.momentum.base_tau,
                "final_tau_momentum": cfg.momentum.final_tau,
                "momentum_classifier": cfg.momentum.classifier,
            }
        names = inspect.signature(self._SOLO_CLASS.__init__).parameters  # type: ignore
        accepted = {key: value for key, value in cfg.method_kwargs.items() if key in names}
        missing = [
            name
            for name, parameter in names.items()
            if parameter.default is parameter.empty
            and name not in (*accepted, *momentum, "self")
            and parameter.kind is not parameter.VAR_KEYWORD
        ]
        if missing:
            raise InputError(f"method_kwargs.{missing[0]}: missing, {cfg.method!r} needs it")
        super().__init__(cfg=cfg, **accepted, **momentum)  # type: ignore[call-arg]


def _bridged(name: str | type, **defaults: Any) -> type[BaseMethod]:
    """1.0.2's class for a method, between the two halves of the bridge."""
    cls: Any = SOLO_METHODS[name] if isinstance(name, str) else name
    namespace = {
        "__doc__": cls.__doc__ or cls.__init__.__doc__,
        "__module__": __name__,
        "_METHOD_DEFAULTS": defaults,
        "_SOLO_CLASS": cls,
    }
    return type(cls.__name__, (_FromConfig, cls, BaseMethod), namespace)  # type: ignore[return-value]


VICReg = _bridged("vicreg", sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=1.0)
BarlowTwins = _bridged("barlow_twins", lamb=0.0051, scale_loss=0.024)
SimSiam = _bridged("simsiam")
SimCLR = _bridged("simclr")
NNCLR = _bridged("nnclr", queue_size=65536)
NNSiam = _bridged("nnsiam", queue_size=65536)
BYOL = _bridged("byol")
MoCoV2Plus = _bridged("mocov2plus", queue_size=65536)
NNBYOL = _bridged("nnbyol", queue_size=65536)
MomentumMethod: Any = _bridged(BaseMomentumMethod)


def _over_all_processes(loss: Any) -> Any:
    """The modern line computes these losses over the batches of all processes; 1.0.2 does not."""

    def gather(z: Tensor) -> Tensor:
        if not (dist.is_available() and dist.is_initialized()):
            return z
        return torch.cat(all_gather(z))  # unlike 1.0.2's own, with the gradient of every process

    return lambda z1, z2, **kwargs: loss(gather(z1), gather(z2), **kwargs)


solo_vicreg.vicreg_loss_func = _over_all_processes(solo_vicreg.vicreg_loss_func)
solo_simclr.simclr_loss_func = _over_all_processes(solo_simclr.simclr_loss_func)


class LinearModel(solo_linear.LinearModel):
    """1.0.2's linear evaluation with the modern constructor.

    Raises:
        InputError: for what only the modern line has: fine-tuning, mixup, other losses.
    """

    _OPTIMIZERS = _OPTIMIZERS
    validation_epoch_end = None

    def __init__(
        self, backbone: nn.Module, cfg: DictConfig, loss_func: Any = None, mixup_func: Any = None
    ):
        cfg = self.add_and_assert_specific_cfg(cfg)
        for key, value in {
            "finetune": cfg.finetune,
            "optimizer.layer_decay": cfg.optimizer.layer_decay,
            "loss_func": loss_func,
            "mixup_func": mixup_func,
        }.items():
            if value:
                raise InputError(
                    f"{key}: got {value!r}, solo-learn 1.0.2 has it not; 1.0.6 to 1.0.8 do"
                )
        optimizer, scheduler = cfg.optimizer, cfg.scheduler
        super().__init__(
            backbone,
            num_classes=cfg.data.num_classes,
            max_epochs=cfg.max_epochs,
            batch_size=optimizer.batch_size,
            optimizer=optimizer.name,
            lars=optimizer.name == "lars",
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            exclude_bias_n_norm=False,
            extra_optimizer_args=dict(optimizer.kwargs),
            scheduler=scheduler.name,
            lr_decay_steps=scheduler.lr_decay_steps,
        )
        self.cfg = cfg
        self.no_channel_last = cfg.performance.disable_channel_last
        self.validation_step_outputs: list[dict[str, Any]] = []

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fill in the modern line's defaults."""
        return _add_defaults(cfg, _MODERN_DEFAULTS)

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        """Features of the frozen backbone, and logits."""
        if not self.no_channel_last:
            X = X.to(memory_format=torch.channels_last)
        return super().forward(X)

    def configure_optimizers(self) -> Any:
        """The modern line's optimisers and schedules, for the classifier alone."""
        groups = [{"name": "classifier", "params": self.classifier.parameters()}]
        return configure_optimizers(self, self.cfg, groups, self._OPTIMIZERS)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Any]:
        """Accuracies of one batch, kept for the end of the epoch."""
        metrics = super().validation_step(batch, batch_idx)
        self.validation_step_outputs.append(metrics)
        return metrics

    def on_validation_epoch_end(self) -> None:
        """Log the mean over the epoch, weighted by batch sizes."""
        solo_linear.LinearModel.validation_epoch_end(self, self.validation_step_outputs)
        self.validation_step_outputs.clear()


METHODS: dict[str, type] = {
    "base": BaseMethod,
    "linear": LinearModel,
    "vicreg": VICReg,
    "barlow_twins": BarlowTwins,
    "simsiam": SimSiam,
    "simclr": SimCLR,
    "nnclr": NNCLR,
    "nnsiam": NNSiam,
    "byol": BYOL,
    "mocov2plus": MoCoV2Plus,
    "nnbyol": NNBYOL,
}

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
