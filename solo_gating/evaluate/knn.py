"""Nearest-neighbour accuracy of frozen features, with solo-learn's classifier."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones import ResNet, TwoPathResNet
from ..flops import count_flops, selected_channels
from ..solo_learn import WeightedKNNClassifier


@torch.no_grad()
def extract_features(
    backbone: nn.Module, loader: Iterable, path: str | None = None
) -> tuple[Tensor, Tensor, float | None]:
    """Features of every image, in evaluation mode.

    Args:
        backbone: without a classifier; its mode is put back afterwards.
        loader: batches `[images, targets]`.
        path: "gated" or "dense" for a backbone with two paths; None for its default.

    Returns:
        features N × C and targets N, on the CPU, and the mean FLOPs per image, exact over the
        set (None for a backbone that is not one of this package's).
    """
    features, targets, channels = [], [], []
    resolution = (0, 0)
    for images, labels, batch_features, masks in _passes(backbone, loader, path):
        features.append(batch_features.float().cpu())
        targets.append(labels)
        resolution = (images.shape[-2], images.shape[-1])
        if masks:
            channels.append(selected_channels(masks).long().cpu())
    flops = None
    if isinstance(backbone, ResNet):
        cost = count_flops(backbone, resolution)
        flops = float(cost.dense)
        if channels:
            flops = cost.gated(torch.cat(channels)).double().mean().item()
    return torch.cat(features), torch.cat(targets), flops


@torch.no_grad()
def extract_channels(backbone: TwoPathResNet, loader: Iterable) -> Tensor:
    """Numbers of channels that the gates select, in evaluation mode.

    Args:
        backbone: its mode is put back afterwards.
        loader: batches `[images, targets]`.

    Returns:
        int64, N × L, on the CPU: for each image and block.
    """
    masks = (masks for *_, masks in _passes(backbone, loader, "gated"))
    return torch.cat([selected_channels(batch).long().cpu() for batch in masks])


def _passes(
    backbone: nn.Module, loader: Iterable, path: str | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]]:
    """Images, targets, features and masks of every batch, in evaluation mode."""
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    try:
        for images, labels in loader:
            if isinstance(backbone, TwoPathResNet):
                with backbone.path(*([path] if path else [])) as passes:
                    features = backbone(images.to(device))
                yield images, labels, features, passes[-1].masks
            else:
                yield images, labels, backbone(images.to(device)), ()
    finally:
        backbone.train(was_training)


def knn_top1(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    k: int = 1,
    distance: str = "euclidean",
) -> float:
    """Top-1 accuracy in percent; the papers' Tables 4 to 6 have k = 1, euclidean, not normalised.

    Args:
        train: features N × C and targets N; unlabelled images (-1) are left out.
        test: features M × C and targets M.
        k: number of neighbours.
        distance: "euclidean" or "cosine".
    """
    knn = WeightedKNNClassifier(k=k, distance_fx=distance)
    labelled = train[1] >= 0
    knn.update(train_features=train[0][labelled], train_targets=train[1][labelled])
    knn.update(test_features=test[0], test_targets=test[1])
    top1, _ = knn.compute()
    return float(top1)


def knn_top1_few_labels(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    labels_per_class: int,
    draws: int,
    seed: int = 0,
) -> float:
    """Mean 1-NN accuracy, in percent, over random choices of a few labelled images per class.

    Args:
        train: features and targets to choose from.
        test: features and targets.
        labels_per_class: images of each class that are labelled.
        draws: number of choices; the same for every encoder.
        seed: of the choices.
    """
    targets = train[1].numpy()
    generator = np.random.RandomState(seed)
    accuracies = []
    for _ in range(draws):
        chosen = np.concatenate(
            [
                generator.permutation(np.flatnonzero(targets == label))[:labels_per_class]
                for label in np.unique(targets[targets >= 0])
            ]
        )
        accuracies.append(knn_top1((train[0][chosen], train[1][chosen]), test))
    return float(np.mean(accuracies))
