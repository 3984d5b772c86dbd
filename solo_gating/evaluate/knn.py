"""Nearest-neighbour accuracy of frozen features, with solo-learn's classifier."""

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..solo_learn import WeightedKNNClassifier

DISTANCES = ("euclidean", "cosine")


def knn_top1(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    k: int = 1,
    distance: str = "euclidean",
    temperature: float = 0.07,
    normalize: bool = False,
) -> float:
    """Top-1 accuracy in percent; the papers' Tables 4 to 6 have k = 1, euclidean, not normalised.

    Neighbours vote with 1 / distance, or exp(cosine / temperature). Distances are computed in
    pieces of some 5 million, so that memory hardly grows beyond the features themselves.

    Args:
        train: features N × C and targets N; unlabelled images (-1) are left out.
        test: features M × C and targets M; likewise.
        k: number of neighbours.
        distance: "euclidean" or "cosine".
        temperature: of the cosine's weights; no effect on euclidean ones.
        normalize: scale every feature vector to length 1 (the cosine always does).

    Returns:
        NaN if there is nothing to compare: no labelled image in one of the sets.
    """
    knn = WeightedKNNClassifier(k=k, T=temperature, distance_fx=distance)
    (bank, labels), (queries, truth) = map(_labelled, (train, test))
    if not len(labels) or not len(truth):
        return math.nan
    if normalize:
        bank, queries = F.normalize(bank), F.normalize(queries)
    knn.update(train_features=bank, train_targets=labels)
    knn.update(test_features=queries, test_targets=truth)
    top1, _ = knn.compute()
    return float(top1)


def _labelled(images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    features, targets = images
    return features[targets >= 0], targets[targets >= 0]


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

    Returns:
        NaN if no image is labelled in one of the sets.
    """
    targets = train[1].numpy()
    if not (targets >= 0).any():
        return math.nan
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
