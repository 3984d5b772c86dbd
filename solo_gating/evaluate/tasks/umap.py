"""UMAP of a frozen encoder's features, dense and gated side by side, coloured by class.

    python -m solo_gating.main_umap checkpoint=PATH/last.ckpt [key=value ...]

    classes=10 images=5000      of the validation images: the first classes, at most so many images
    path=dense|gated|both       default: both, if both were trained
    budget=0.3                  that the gates are told, of a network trained for a range
    recalibrate=2048            BatchNorm statistics of the path at this budget, as for main_knn
    dataset=cifar10             other images than the checkpoint's, from data.train_path, data.val_path

Needs `pip install umap-learn` (the extra `umap`). Writes umap.png, umap.csv and metrics.json into a
folder beside the checkpoint (output=...).
"""

from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from ...checks import at_least, require
from ...config.schema import EVALUATIONS, own_copy
from ...files import write_csv
from ...plots.embeddings import MOST_CLASSES, draw_embeddings
from ...process_state import process_state_kept
from ..embed import embed, load_umap
from ..evaluation import flops_row, prepare_evaluation

_FEWEST_IMAGES = 10

_SETTINGS = ("classes", "images", "neighbors", "min_dist", "seed")


@process_state_kept()
def evaluate_umap(cfg: DictConfig) -> dict[str, Any]:
    """Embed the validation images' features and draw them.

    Args:
        cfg: a UMAP config; left as it is.

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: before any long work, for a config, checkpoint or data that cannot be used, or
            if umap-learn is missing.
    """
    cfg = own_copy(cfg, EVALUATIONS["umap"])
    require("classes", cfg.classes, lambda v: v in range(1, MOST_CLASSES + 1), "1 to 10")
    at_least("images", cfg.images, _FEWEST_IMAGES)
    at_least("neighbors", cfg.neighbors, 2)
    load_umap()
    evaluation = prepare_evaluation(cfg, "umap", _SETTINGS, ("val",))
    _check_number(len(evaluation.loaders["val"].dataset))  # type: ignore[arg-type]
    rows, embeddings, chosen = {}, {}, np.empty(0)
    for path in evaluation.paths:
        with evaluation.of_path(path):
            found = evaluation.extract("val", path)
        rows[path] = flops_row(found, evaluation.encoder)
        chosen, targets = choose(found.targets, cfg.classes, cfg.images)
        _check_number(len(chosen))
        heading = f"{path} path"
        if "flops_cut" in rows[path]:
            heading += f", {1 - rows[path]['flops_cut']:.0%} of the FLOPs"
        embeddings[heading] = embed(found.features[chosen], cfg.neighbors, cfg.min_dist, cfg.seed)
    if evaluation.fabric.is_global_zero:
        dataset: Any = evaluation.loaders["val"].dataset
        labels = sorted(set(targets.tolist()))
        known = getattr(dataset, "classes", None)
        names = [
            "unlabelled" if label < 0 else known[label] if known else f"class {label}"
            for label in labels
        ]
        draw_embeddings(
            embeddings,
            np.searchsorted(labels, targets),
            names,
            evaluation.folder / "umap.png",
            f"{evaluation.encoder.args.get('name')}: {len(chosen):,} images of {cfg.data.dataset}",
        )
        columns = {
            f"{path}_{axis}": points[:, index]
            for path, points in zip(rows, embeddings.values(), strict=True)
            for index, axis in enumerate("xy")
        }
        write_csv(
            evaluation.folder / "umap.csv",
            [
                {"image": int(image), "label": int(label)}
                | {key: float(values[row]) for key, values in columns.items()}
                for row, (image, label) in enumerate(zip(chosen, targets, strict=True))
            ],
        )
        evaluation.say(str(evaluation.folder / "umap.png"))
    return evaluation.write(rows, 0)


def _check_number(images: int) -> None:
    require(
        "data.val_path",
        images,
        lambda v: v >= _FEWEST_IMAGES,
        f"at least {_FEWEST_IMAGES} images of the first classes",
    )


def choose(targets: Tensor, classes: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Some images of the first classes, spread evenly over the set; unlabelled ones are a class.

    Args:
        targets: of all images.
        classes: how many classes.
        images: at most so many.

    Returns:
        Indices of the images, and their targets.
    """
    labels = targets.unique()[:classes]
    found = np.flatnonzero(np.isin(targets.numpy(), labels.numpy()))
    if len(found) > images:
        found = found[np.linspace(0, len(found) - 1, images).astype(int)]
    return found, targets.numpy()[found]
