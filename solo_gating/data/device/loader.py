"""Batches of views that are made where they are used."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, Subset

from ...randomness import batch_generator
from ...transfer import send
from .place import Place
from .views import DeviceView

# The share of the device's free memory that the images may take.
_SHARE = 0.5


class DeviceLoader:
    """solo-learn's batches `[indices, [view 1, view 2, ...], targets]`, made on the device.

    The images stay on the device as bytes, or on the host if they would take more than half of its
    free memory. Order and views follow from seed, epoch and rank alone; Lightning sets the epoch
    by `sampler`, as it does for a DataLoader. An incomplete last batch is dropped.

    Args:
        images: uint8, N × height × width × 3.
        targets: N integers.
        views: each with its number of crops.
        batch_size: images in a batch of each process.
        seed: of order and views.
        place: every process takes its own part of each epoch's order, all equally long.
    """

    def __init__(
        self,
        images: np.ndarray,
        targets: Any,
        views: Sequence[tuple[DeviceView, int]],
        batch_size: int,
        seed: int,
        place: Place,
    ):
        self.dataset = range(len(images))
        self.batch_size = batch_size
        self.sampler: DistributedSampler = DistributedSampler(
            self.dataset,  # type: ignore[arg-type]
            num_replicas=place.processes,
            rank=place.rank,
            shuffle=True,
            seed=seed,
            drop_last=True,
        )
        self._images = torch.from_numpy(np.ascontiguousarray(images))
        self._targets = torch.as_tensor(np.asarray(targets), dtype=torch.int64)
        self._views = views
        self._place = place
        self._placed = False

    @property
    def has_labels(self) -> bool:
        """Whether at least one image has a label."""
        return bool((self._targets >= 0).any())

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[list[Any]]:
        self._move()
        device = self._place.device
        generator = batch_generator(self.sampler.seed, self.sampler.epoch, self._place.rank)
        order = torch.tensor(list(self.sampler)[: len(self) * self.batch_size])
        for here, there in zip(
            order.split(self.batch_size), send(order, device).split(self.batch_size), strict=True
        ):
            images = self._take(here, there).permute(0, 3, 1, 2)
            views = [view(images, generator) for view, number in self._views for _ in range(number)]
            yield [there, views, self._targets.index_select(0, there)]

    def _take(self, here: Tensor, there: Tensor) -> Tensor:
        """Some images: by their indices on the host, or on the device if they are there."""
        if self._images.device == there.device:
            return self._images.index_select(0, there)
        return send(self._images.index_select(0, here), self._place.device)

    def _move(self) -> None:
        """Once the network has taken its room: the images to the device, if they fit."""
        if self._placed:
            return
        self._placed = True
        device = self._place.device
        self._targets = self._targets.to(device)
        if fits(self._images.nbytes, device):
            self._images = self._images.to(device)


def fits(number: int, device: torch.device) -> bool:
    """Whether so many bytes are at most half of what is free on a device."""
    if device.type != "cuda":
        return True
    return number <= _SHARE * torch.cuda.mem_get_info(device)[0]


def arrays_of(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 N × height × width × 3, and all targets, of a data set held in memory.

    Args:
        dataset: `ArrayDataset`, torchvision's CIFAR or STL-10, or a Subset of one.
    """
    if isinstance(dataset, Subset):
        images, targets = arrays_of(dataset.dataset)
        return images[dataset.indices], targets[dataset.indices]
    images = dataset.images if hasattr(dataset, "images") else dataset.data
    if images.shape[1] == 3 and images.shape[3] != 3:  # STL-10 has the channels first
        images = images.transpose(0, 2, 3, 1)
    targets = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return images, np.asarray(targets, dtype=np.int64)
