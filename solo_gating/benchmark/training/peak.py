"""How much of a device's speed at matrix products a training step uses."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..machine import median_seconds
from .step import TrainingStep

_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_SIZES = {"cuda": 8192}
_ROUNDS = 5


def step_flops(step: TrainingStep) -> int:
    """Floating-point operations of a step's convolutions and matrix products, both directions.

    By PyTorch's counter, two for a multiply-accumulate; it sees into no compiled network.

    Args:
        step: not compiled.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def matrix_flops_per_second(device: torch.device, precision: str) -> float:
    """Operations per second of a large square matrix product, the median of some.

    Args:
        device: with the number of threads that PyTorch has.
        precision: as Lightning names it; a mixed one's product is in half precision.
    """
    size = _SIZES.get(device.type, 1024)
    dtype = _DTYPES.get(precision, torch.float32)
    matrix = torch.randn(size, size, device=device).to(dtype)
    seconds = median_seconds(lambda: torch.mm(matrix, matrix), device, _ROUNDS, untimed=2)
    return 2 * size**3 / seconds
