"""The modern line's augmentation config over 1.0.2's and torchvision's transforms."""

from typing import Any

from omegaconf import DictConfig
from PIL import ImageOps
from solo.utils.pretrain_dataloader import GaussianBlur, Solarization
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

# 1.0.2 has a typo in ImageNet's std, and CIFAR-10's statistics for CIFAR-100.
_MEAN_AND_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "imagenet100": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


def build_transform_pipeline(dataset: str, cfg: DictConfig) -> transforms.Compose:
    """One view's transforms, as the modern line's function of the same name.

    Args:
        dataset: name of the data set; it decides mean and std where it is known.
        cfg: an entry of `augmentations`: crop_size, rrc, color_jitter, grayscale, gaussian_blur,
            solarization, equalization, horizontal_flip; mean and std for a custom data set.
    """
    own = (cfg.get("mean", IMAGENET_DEFAULT_MEAN), cfg.get("std", IMAGENET_DEFAULT_STD))
    mean, std = _MEAN_AND_STD.get(dataset, own)
    bicubic = transforms.InterpolationMode.BICUBIC
    steps: list[Any] = []
    if cfg.rrc.enabled:
        scale = (cfg.rrc.crop_min_scale, cfg.rrc.crop_max_scale)
        steps.append(transforms.RandomResizedCrop(cfg.crop_size, scale, interpolation=bicubic))
    else:
        steps.append(transforms.Resize(cfg.crop_size, interpolation=bicubic))
    if cfg.color_jitter.prob:
        jitter = cfg.color_jitter
        change = transforms.ColorJitter(
            jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        )
        steps.append(transforms.RandomApply([change], p=jitter.prob))
    if cfg.grayscale.prob:
        steps.append(transforms.RandomGrayscale(p=cfg.grayscale.prob))
    for key, change in (
        ("gaussian_blur", GaussianBlur()),
        ("solarization", Solarization()),
        ("equalization", ImageOps.equalize),
    ):
        if cfg[key].prob:
            steps.append(transforms.RandomApply([change], p=cfg[key].prob))
    if cfg.horizontal_flip.prob:
        steps.append(transforms.RandomHorizontalFlip(p=cfg.horizontal_flip.prob))
    steps += [transforms.ToTensor(), transforms.Normalize(mean=mean, std=std)]
    return transforms.Compose(steps)
