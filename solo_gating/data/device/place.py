"""Where batches are needed."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Place:
    """Which process trains, and on what."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    processes: int = 1
