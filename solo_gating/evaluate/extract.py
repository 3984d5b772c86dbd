"""Features, decisions and FLOPs of an encoder over a whole data set."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ..backbones import ResNet, TwoPathResNet
from ..distributed import rank_and_processes
from ..errors import InputError
from ..flops import count_flops, selected_channels


class NonFiniteFeaturesError(InputError):
    """An encoder's weights, or its precision, give features that are infinite or NaN."""


@dataclass(frozen=True)
class Extraction:
    """What an encoder made of N images, in evaluation mode; everything on the CPU.

    Attributes:
        features: float32, N × C.
        targets: int64, N; -1 for an unlabelled image.
        resolution: height and width of the images.
        channels: float64, N × L, selected channels of each image for each gate, whole numbers unless a
            gate computes channels in part; None on the dense path.
        selected: for each gate int64, C_out: by how many images each channel was selected, be it in part.
        flops: mean multiply-accumulates per image, exact over the set; None for a backbone that
            is not one of this package's.
    """

    features: Tensor
    targets: Tensor
    resolution: tuple[int, int]
    channels: Tensor | None
    selected: tuple[Tensor, ...]
    flops: float | None


@torch.no_grad()
def extract(
    backbone: nn.Module,
    loader: Iterable,
    path: str | None = None,
    head: nn.Module | None = None,
) -> Extraction:
    """Run an encoder over images, in evaluation mode.

    Args:
        backbone: without a classifier; its mode is put back afterwards.
        loader: batches `[images, targets]`, not shuffled. Where several processes run, all must
            call this; each computes its share of the images, none twice, and gets the whole result.
        path: "gated" or "dense" for a backbone with two paths; None for its default.
        head: applied to the features.

    Everything is computed in the dtype of the backbone's weights, unless autocast says otherwise.

    Raises:
        NonFiniteFeaturesError: if a feature is infinite or NaN.
    """
    weight = next(backbone.parameters())
    features, targets, channels = [], [], []
    selected: list[Tensor] = []
    resolution = (0, 0)
    was_training = backbone.training
    backbone.eval()
    try:
        for images, labels in _share_of_process(loader):
            images = images.to(weight.device, weight.dtype, non_blocking=True)
            masks: tuple[Tensor, ...] = ()
            if isinstance(backbone, TwoPathResNet):
                with backbone.path(*([path] if path else [])) as passes:
                    out = backbone(images)
                masks = passes[-1].masks
            else:
                out = backbone(images)
            features.append((out if head is None else head(out)).float().cpu())
            targets.append(torch.as_tensor(labels))
            resolution = (images.shape[-2], images.shape[-1])
            if masks:
                channels.append(selected_channels(masks).double().cpu())
                counts = [(mask > 0).sum(dim=0).cpu() for mask in masks]
                selected = (
                    [a + b for a, b in zip(selected, counts, strict=True)] if selected else counts
                )
    finally:
        backbone.train(was_training)
    every = torch.cat(channels) if channels else None
    every = None if every is None else _of_all_processes(every)
    flops = None
    if isinstance(backbone, ResNet):
        cost = count_flops(backbone, resolution)
        flops = float(cost.dense)
        if every is not None:
            flops = cost.gated(every).mean().item()
    whole = _of_all_processes(torch.cat(features))
    if bad := len(whole) - int(whole.isfinite().all(dim=1).sum()):
        raise NonFiniteFeaturesError(
            f"the encoder's features of {bad} of {len(whole)} images are infinite or NaN"
            + (f" on the {path} path" if path else "")
        )
    return Extraction(
        whole,
        _of_all_processes(torch.cat(targets)),
        resolution,
        every,
        tuple(map(_sum_over_processes, selected)),
        flops,
    )


def _share_of_process(loader: Any) -> Iterable:
    """Process r of R takes the images r, r + R, r + 2·R, ... of a loader."""
    rank, world = rank_and_processes()
    if world == 1:
        return loader
    images = range(rank, len(loader.dataset), world)
    if len(loader.dataset) < world:  # on every process, or the others would wait
        raise InputError(
            f"devices: got {world} processes for {len(loader.dataset)} images, expected at "
            "most one for each image"
        )
    return DataLoader(
        Subset(loader.dataset, images),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        pin_memory=loader.pin_memory,
    )


def _gather(mine: Tensor) -> list[Tensor]:
    """Every process's tensor, in the order of the processes."""
    _, world = rank_and_processes()
    if world == 1:
        return [mine]
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, mine)
    return parts


def _of_all_processes(rows: Tensor) -> Tensor:
    """Every process's rows, put back into the images' order."""
    parts = _gather(rows)
    whole = torch.empty_like(torch.cat(parts))
    for index, part in enumerate(parts):
        whole[index :: len(parts)] = part
    return whole


def _sum_over_processes(counts: Tensor) -> Tensor:
    return torch.stack(_gather(counts)).sum(dim=0)
