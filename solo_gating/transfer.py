"""Sending what the host knows to a device, without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on a device; the host goes on at once.

    A plain copy to a GPU waits until the GPU has done all that it was given before.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def numbers_like(values: Sequence[float], tensor: Tensor) -> Tensor:
    """Numbers as a vector of a tensor's dtype on its device, by `send`."""
    return send(torch.tensor(values, dtype=tensor.dtype), tensor.device)
