"""Views from PIL images, made by worker processes: the same ones however many these are."""

import os
from collections.abc import Iterator, Sequence
from multiprocessing import parent_process
from threading import Thread
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ..distributed import rank_and_processes
from ..randomness import image_seeds, seed_generators


class SeededImages(Dataset):
    """A data set whose items begin with their index, as solo-learn's methods expect.

    It is indexed by pairs of `SeededSampler`, (index, seed of the views); by an index alone it always
    gives the same views. The generators are left as they were.

    Args:
        dataset: of views and target.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int | tuple[int, int]) -> tuple[Any, ...]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int | tuple[int, int]]) -> list[tuple[Any, ...]]:
        """A batch's items, for which PyTorch's DataLoader asks at once."""
        items = []
        with isolate_rng(include_cuda=False):
            for place in places:
                index, seed = place if isinstance(place, tuple) else (place, place)
                seed_generators(seed)
                items.append((index, *self.dataset[index]))
        return items


class SeededSampler(DistributedSampler):
    """Every process's part of an epoch: pairs of an image's index and the seed of its views.

    Both follow from the run's seed and the epoch, which Lightning sets. The order is that of
    `torch.utils.data.DistributedSampler`. Being one, it is not replaced by Lightning; rank and
    number of processes are asked for when they are needed, as processes may be started after it.

    Args:
        images: their number.
        seed: of the run.
    """

    def __init__(self, images: int, seed: int):
        super().__init__(range(images), num_replicas=1, rank=0, seed=seed)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._part())

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        seeds = image_seeds(self.seed, self.epoch, len(self.dataset))  # type: ignore[arg-type]
        return ((index, int(seeds[index])) for index in self._part())

    def _part(self) -> DistributedSampler:
        rank, processes = rank_and_processes()
        part: DistributedSampler = DistributedSampler(self.dataset, processes, rank, seed=self.seed)
        part.set_epoch(self.epoch)
        return part


class LazyLoader(DataLoader):
    """A DataLoader whose workers begin when the first batch is asked for.

    Lightning makes a continued run's first iterator before it sets the epoch; workers would have begun
    with epoch 0 by then. (pytorch-lightning, issue 21938.)
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def end_with_parent(worker: int) -> None:
    """Let this worker process end as soon as the process that started it has, however that ended.

    A `worker_init_fn`. PyTorch's workers look for their parent every five seconds, and then wait for
    somebody to take their last batches.
    """
    parent = parent_process()
    if parent is not None:
        Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(process: Any) -> None:
    process.join()
    os._exit(1)
