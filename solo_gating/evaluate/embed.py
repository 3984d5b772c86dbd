"""UMAP of features, as a picture."""

from typing import Any

import numpy as np
from torch import Tensor

from ..errors import InputError


def load_umap() -> Any:
    """The class UMAP of umap-learn.

    Raises:
        InputError: if it is not installed.
    """
    try:
        from umap import UMAP
    except ImportError as error:
        raise InputError(
            "UMAP needs umap-learn: pip install 'solo-gating[umap]', or pip install umap-learn "
            f"({error})"
        ) from error
    return UMAP


def embed(features: Tensor, neighbors: int, min_dist: float, seed: int) -> np.ndarray:
    """N × C features → N × 2 (McInnes et al., arXiv:1802.03426).

    Args:
        features: of the images.
        neighbors: size of UMAP's neighbourhoods.
        min_dist: least distance of points in the plane.
        seed: of the optimisation.
    """
    umap = load_umap()(
        n_neighbors=min(neighbors, len(features) - 1),
        min_dist=min_dist,
        random_state=seed,
        n_jobs=1,
    )
    return umap.fit_transform(features.numpy())
