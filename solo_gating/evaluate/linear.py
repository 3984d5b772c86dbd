"""Linear evaluation: solo-learn's classifier on the features of a frozen encoder."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..backbones import TwoPathResNet
from ..solo_learn import LinearModel
from ..training.callbacks import RunProgress
from ..training.logs import CSVLog
from .evaluation import Evaluation
from .extract import Extraction


class FeatureBackbone(nn.Identity):
    """Stands in for the backbone where the inputs are features already.

    Args:
        features: their number, under the name that solo-learn's LinearModel reads.
    """

    def __init__(self, features: int):
        super().__init__()
        self.inplanes = features


class _FeatureBatches(IterableDataset):
    """Shuffled batches of features that are in memory, one item a batch."""

    def __init__(self, features: Tensor, targets: Tensor, batch_size: int):
        self.features, self.targets, self.batch_size = features, targets, batch_size

    def __len__(self) -> int:
        return -(-len(self.features) // self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for rows in torch.randperm(len(self.features)).split(self.batch_size):
            yield [self.features[rows], self.targets[rows]]


class ValidationAccuracy(Callback):
    """Logs the classifier's accuracy on validation features after every epoch, as `val_acc1`.

    The encoder is frozen, so the features are computed once; unlike with a distributed sampler no
    image counts twice.

    Args:
        val: the validation images' features and targets.
    """

    def __init__(self, val: Extraction):
        self.val = val

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log it."""
        top1, _ = classifier_accuracy(pl_module.classifier, self.val)  # type: ignore[arg-type]
        pl_module.log("val_acc1", top1, prog_bar=True)


@torch.no_grad()
def classifier_accuracy(classifier: nn.Module, val: Extraction) -> tuple[float, float]:
    """Top-1 and top-5 accuracy, in percent, over all labelled images.

    Args:
        classifier: from features to logits.
        val: features and targets.
    """
    labelled = val.targets >= 0
    targets = val.targets[labelled, None]
    weight = next(classifier.parameters())
    hits = [
        classifier(rows.to(weight.device, weight.dtype)).topk(5).indices.cpu()
        for rows in val.features[labelled].split(4096)
    ]
    correct = torch.cat(hits) == targets
    top1, top5 = correct[:, 0], correct.any(dim=1)
    return 100 * top1.double().mean().item(), 100 * top5.double().mean().item()


def train_on_features(
    cfg: DictConfig, train: Extraction, val: Extraction, seed: int, device: torch.device
) -> dict[str, float]:
    """Train a classifier on features that were computed once.

    The same classifier, loss, optimiser and schedule as `train_on_images`; what is missing is the
    augmentation of the images. Every process does the same.

    Args:
        cfg: a complete linear-evaluation config.
        train: the training images' features; unlabelled images are left out.
        val: the validation images' features.
        seed: of the classifier's weights and the order of the images.
        device: where to train.

    Returns:
        Accuracies in percent: `top1`, `top5`.
    """
    seed_everything(seed, verbose=False)
    labelled = train.targets >= 0
    features = train.features[labelled]
    model = _classifier(cfg, FeatureBackbone(features.shape[1]), processes=1)
    model.no_channel_last = True  # which is for images
    batches = _FeatureBatches(features, train.targets[labelled], cfg.optimizer.batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers, validation and logging
        trainer = pl.Trainer(
            max_epochs=cfg.max_epochs, barebones=True, strategy=SingleDeviceStrategy(device)
        )
        trainer.fit(model, DataLoader(batches, batch_size=None, shuffle=False))
    top1, top5 = classifier_accuracy(model.classifier, val)
    return {"top1": top1, "top5": top5}


def train_on_images(
    evaluation: Evaluation, path: str, train: DataLoader, val: Extraction, seed: int
) -> dict[str, float]:
    """Train a classifier on augmented images, as solo-learn's main_linear.py.

    Args:
        evaluation: with a linear-evaluation config.
        path: of the encoder.
        train: `data.classification_loader`.
        val: the validation images' features.
        seed: of the classifier's weights, the augmentation and the order of the images.

    Returns:
        Accuracies in percent: `top1`, `top5`.
    """
    seed_everything(seed, verbose=False)
    cfg, backbone = evaluation.cfg, evaluation.encoder.backbone
    model = _classifier(cfg, backbone, evaluation.fabric.world_size)
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    callbacks: list[Callback] = [ValidationAccuracy(val)]
    if cfg.enable_progress_bar:
        callbacks.append(RunProgress())
    trainer = pl.Trainer(
        max_epochs=cfg.max_epochs,
        accelerator=cfg.accelerator,
        devices=cfg.devices,
        num_nodes=cfg.num_nodes,
        strategy=cfg.strategy,
        precision=cfg.precision,
        callbacks=callbacks,
        logger=CSVLog(evaluation.folder / f"logs-{path}" / f"seed{seed}"),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=cfg.enable_progress_bar,
    )
    with _on_path(backbone, path), warnings.catch_warnings():
        # Validation is ValidationAccuracy's, and the backbone is in evaluation mode on purpose.
        advice = "validation_step|in eval mode|LeafSpec|logging interval|many workers"
        warnings.filterwarnings("ignore", message=f".*({advice}).*")
        trainer.fit(model, train)
    model.to(evaluation.fabric.device)
    top1, top5 = classifier_accuracy(model.classifier, val)
    return {"top1": top1, "top5": top5}


def _classifier(cfg: DictConfig, backbone: nn.Module, processes: int) -> Any:
    cfg = cfg.copy()
    if cfg.optimizer.get("scale_lr"):  # `solo/args/linear.py` of the modern line
        cfg.optimizer.lr *= cfg.optimizer.batch_size * processes / 256
    if cfg.scheduler.lr_decay_steps is None:
        cfg.scheduler.lr_decay_steps = [round(share * cfg.max_epochs) for share in (0.6, 0.8)]
    # solo-learn logs a top-5 accuracy, for which there must be 5 classes; spare ones stay empty.
    cfg.data.num_classes = max(5, cfg.data.num_classes)
    return LinearModel(backbone, cfg=cfg)


def _on_path(backbone: nn.Module, path: str) -> AbstractContextManager:
    return backbone.path(path) if isinstance(backbone, TwoPathResNet) else nullcontext()
