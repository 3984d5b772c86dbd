"""Random numbers of a training, functions of the run's seed and of where they are drawn.

No generator's state lasts from one step to the next: a run that is continued, in an epoch's middle or
with another number of workers, draws what it would have drawn undisturbed. Seeds are made here only.
"""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Generator

# What is drawn: the same place has other numbers for each.
_IMAGE, _BATCHES, _STEP = range(3)


def image_seeds(seed: int, epoch: int, images: int) -> np.ndarray:
    """A seed for each image's views in an epoch, uint64; whichever process and worker makes them."""
    return _sequence(_IMAGE, seed, epoch).generate_state(images, np.uint64)


def batch_generator(seed: int, epoch: int, rank: int) -> Generator:
    """The host's generator for all views that a process makes in batches in an epoch."""
    return Generator().manual_seed(_seed(_BATCHES, seed, epoch, rank))


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generator of the host; some 10 µs.

    `torch.manual_seed` takes 20 times as long, and reaches for GPUs, which a worker must not touch.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class StepSeeds(Callback):
    """Seeds the generators of host and device before each step, for the gates' noise and the like.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed them; every process draws numbers of its own."""
        rank, epoch = trainer.global_rank, trainer.current_epoch
        seed = _seed(_STEP, self.seed, epoch, batch_idx, rank)
        seed_generators(seed)
        torch.manual_seed(seed)


def _seed(*place: int) -> int:
    return int(_sequence(*place).generate_state(1, np.uint64)[0])


def _sequence(*place: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(place)
