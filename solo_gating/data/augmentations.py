"""Views for pre-training and images for evaluation, from solo-learn's `augmentations` config."""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torchvision import transforms

from ..errors import InputError
from ..solo_learn import FullTransformPipeline, NCropAugmentation, build_transform_pipeline

_ABSENT = {
    "rrc": {"enabled": False},
    "color_jitter": {"prob": 0.0},
    "grayscale": {"prob": 0.0},
    "gaussian_blur": {"prob": 0.0},
    "solarization": {"prob": 0.0},
    "equalization": {"prob": 0.0},
    "horizontal_flip": {"prob": 0.0},
}
_OWN_KEYS = ("affine", "erasing", "crop_size", "num_crops", "mean", "std")


def check_augmentations(views: ListConfig | None) -> None:
    """Refuse what cannot be views, and fill in place the operations that an entry leaves out.

    Raises:
        InputError: naming the key.
    """
    if not views:
        raise InputError("augmentations: got none, expected a list of at least one entry")
    for number, view in enumerate(views):
        for key in view:
            if key not in _ABSENT and key not in _OWN_KEYS:
                accepted = ", ".join([*_ABSENT, *_OWN_KEYS])
                raise InputError(f"augmentations[{number}].{key}: no such key, expected {accepted}")
        for key in ("crop_size", "num_crops"):
            if not isinstance(view.get(key), int) or view[key] < 1:
                raise InputError(
                    f"augmentations[{number}].{key}: got {view.get(key)!r}, expected an integer ≥ 1"
                )
        for key, value in _ABSENT.items():
            if key not in view:
                view[key] = value


def view_transform(dataset: str, view: DictConfig) -> transforms.Compose:
    """One entry's transforms: solo-learn's, and two operations for images that are not photographs.

    `affine: {degrees, translate, scale, shear}` (torchvision's RandomAffine, before everything
    else) and `erasing: {prob, scale}` (RandomErasing, last).

    Args:
        dataset: the data set's name; solo-learn knows mean and std of some.
        view: an entry of `augmentations`.
    """
    steps = list(build_transform_pipeline(dataset, view).transforms)
    # Of the config's own lists Normalize would be ten times slower than of tuples.
    steps[-1] = transforms.Normalize(tuple(steps[-1].mean), tuple(steps[-1].std))
    if view.get("affine"):
        affine: Any = OmegaConf.to_container(view.affine, resolve=True)
        move = transforms.RandomAffine(
            affine.get("degrees", 0),
            translate=affine.get("translate"),
            scale=affine.get("scale"),
            shear=affine.get("shear"),
            interpolation=transforms.InterpolationMode.BILINEAR,
        )
        steps.insert(0, move)
    if view.get("erasing"):
        scale = tuple(view.erasing.get("scale", (0.02, 0.33)))
        steps.append(transforms.RandomErasing(p=view.erasing.prob, scale=scale))
    return transforms.Compose(steps)


def check_view(dataset: str, view: DictConfig) -> None:
    """Refuse an entry of which torchvision makes no view.

    Args:
        dataset: as in `view_transform`.
        view: an entry that `check_augmentations` has completed, its values of the right types.

    Raises:
        InputError: naming the operation.
    """
    rrc = view.rrc
    if rrc.get("enabled") and rrc.get("crop_min_scale", 0) > rrc.get("crop_max_scale", 1):
        raise InputError(
            f"rrc.crop_min_scale: got {rrc.crop_min_scale}, expected at most "
            f"rrc.crop_max_scale={rrc.crop_max_scale}"
        )
    try:
        view_transform(dataset, view)
    except Exception as error:  # whatever solo-learn, OmegaConf and torchvision say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{', '.join(view)}: no view can be made of them ({reason})") from error


def training_transform(dataset: str, views: ListConfig) -> Callable[[Any], list[Any]]:
    """From one PIL image to the list of all its views."""
    return FullTransformPipeline(
        [NCropAugmentation(view_transform(dataset, view), view.num_crops) for view in views]
    )


def evaluation_transform(dataset: str, views: ListConfig) -> transforms.Compose:
    """From one PIL image to the image that an encoder trained on `views` expects.

    Resized to the first view's crop size (images of 224 pixels and more: the shorter side to
    256/224 of it, then the centre, as solo-learn does) and normalised with its mean and std.
    solo-learn's own evaluation normalises CIFAR-100 with CIFAR-10's statistics; this does not.
    """
    size = views[0].crop_size
    resize = round(size * 256 / 224) if size >= 224 else size
    return transforms.Compose(
        [
            transforms.Resize(resize),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            _normalisation(dataset, views),
        ]
    )


def classification_transform(dataset: str, views: ListConfig) -> transforms.Compose:
    """The augmentation of linear evaluation: a random crop of 8 to 100 % of the area, and a flip.

    As solo-learn's (`prepare_transforms` of `solo/data/classification_dataloader.py`), at the size
    and with the normalisation of `evaluation_transform`.
    """
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(views[0].crop_size, scale=(0.08, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            _normalisation(dataset, views),
        ]
    )


def normalisation(dataset: str, views: ListConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that images are normalised with, of each colour."""
    step = _normalisation(dataset, views)
    return tuple(step.mean), tuple(step.std)


def _normalisation(dataset: str, views: ListConfig) -> transforms.Normalize:
    steps = view_transform(dataset, views[0]).transforms
    return next(step for step in steps if isinstance(step, transforms.Normalize))
