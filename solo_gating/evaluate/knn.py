"""Nearest-neighbour accuracy of frozen features, with solo-learn's classifier."""

from collections.abc import Iterable
from contextlib import nullcontext

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
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    features, targets, channels = [], [], []
    resolution: tuple[int, int] | None = None
    two_paths = isinstance(backbone, TwoPathResNet)
    scope = backbone.path(*([path] if path else [])) if two_paths else nullcontext()
    with scope as passes:
        for images, labels in loader:
            features.append(backbone(images.to(device)).float().cpu())
            targets.append(labels)
            resolution = tuple(images.shape[-2:])
            if two_paths and passes[-1].masks:
                channels.append(selected_channels(passes[-1].masks).long().cpu())
    backbone.train(was_training)
    flops = None
    if isinstance(backbone, ResNet) and resolution is not None:
        cost = count_flops(backbone, resolution)
        flops = float(cost.dense)
        if channels:
            flops = cost.gated(torch.cat(channels)).double().mean().item()
    return torch.cat(features), torch.cat(targets), flops


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
