"""Target budgets: one share of the FLOPs, or a range of them with new ones at each step."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from solo_gating_runtime.checks import checked_budget

from .checks import is_share

__all__ = [
    "RANGE",
    "BudgetSchedule",
    "Range",
    "WidthSchedule",
    "checked_budget",
    "is_range",
    "middle",
]

RANGE = "a range like [0.05, 0.9]"

Range = tuple[float, float]


def is_range(value: Any) -> bool:
    """Whether a config value is two numbers, 0 < low < high ≤ 1."""
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(is_share(end) for end in value)
        and value[0] < value[1]
    )


def middle(budget_range: Range) -> float:
    """The budget that is used where none is named: the mean of both ends."""
    return sum(budget_range) / 2


@dataclass(frozen=True)
class BudgetSchedule:
    """The target budget of each training step, a function of seed, step and epoch alone.

    So it is the same on every process, a continued run goes on with the same sequence, and no
    random stream of PyTorch's is touched.

    Attributes:
        low: the lower end; with low = high every step has this budget.
        high: the upper end.
        anneal_epochs: over so many epochs the lower end falls linearly to its value, from the
            upper end, or for a single budget from 1.
        hold_epochs: for so many epochs before it begins to fall, the lower end stays there.
    """

    low: float
    high: float
    anneal_epochs: int = 0
    hold_epochs: int = 0

    @property
    def constant(self) -> bool:
        """Whether all steps have the same budget."""
        return self.low == self.high and self.anneal_epochs == self.hold_epochs == 0

    def ends(self, epoch: int) -> Range:
        """The range that an epoch draws from.

        Args:
            epoch: since the gates were switched on, from 0.
        """
        start = self.high if self.low < self.high else 1.0
        falling = epoch - self.hold_epochs
        left = 1.0 if falling < 0 else 0.0
        if self.anneal_epochs:
            left = min(1.0, max(0.0, 1 - falling / self.anneal_epochs))
        low = self.low + left * (start - self.low)
        return low, max(low, self.high)

    def at(self, seed: int | None, step: int, epoch: int) -> float:
        """The budget of a training step.

        Args:
            seed: of the run.
            step: the optimiser's steps before this one; batches whose gradients are accumulated
                have the same.
            epoch: as in `ends`.
        """
        return self.each(seed, step, epoch, 1)[0]

    def each(self, seed: int | None, step: int, epoch: int, images: int) -> list[float]:
        """A budget for each image of a training step; the first one's is that of `at`.

        Args:
            seed: of the run.
            step: as in `at`.
            epoch: as in `ends`.
            images: of all processes.
        """
        low, high = self.ends(epoch)
        if low == high:
            return [low] * images
        return [low + u * (high - low) for u in self.draws(seed, step, images)]

    def draws(self, seed: int | None, step: int, images: int) -> list[float]:
        """The numbers between 0 and 1, uniform, by which a step's budgets are drawn."""
        # Seeded with a text: the same numbers on every machine and in every Python.
        stream = random.Random(f"target budget, seed {seed}, step {step}")
        return [stream.random() for _ in range(images)]


@dataclass(frozen=True)
class WidthSchedule:
    """The widths at which each batch trains a universally slimmable network.

    In the first quarter of the epochs the full width alone; then also the narrowest of the quarter and
    one between, where the narrowest falls in three equal steps to `low` (US3L's sampling "A",
    `workers/ssl.py` of megvii-research/US3L-CVPR2023, for any number of epochs). A function of seed,
    epoch and batch alone, as in `BudgetSchedule`.

    Attributes:
        low: the narrowest width of the last quarter, in (0, 1).
        epochs: of the whole run.
    """

    low: float
    epochs: int

    def narrowest(self, epoch: int) -> float:
        """The narrowest width of an epoch; 1 in the first quarter.

        Args:
            epoch: from 0.
        """
        quarter = min(3, 4 * epoch // self.epochs)
        return 1.0 if quarter == 0 else self.low + (3 - quarter) * (1 - self.low) / 3

    def at(self, seed: int | None, epoch: int, batch: int) -> tuple[float, ...]:
        """The widths of a batch, the widest first.

        Args:
            seed: of the run.
            epoch: from 0.
            batch: its number in the epoch.
        """
        low = self.narrowest(epoch)
        if low == 1:
            return (1.0,)
        stream = random.Random(f"widths, seed {seed}, epoch {epoch}, batch {batch}")
        return (1.0, stream.uniform(low, 1), low)
