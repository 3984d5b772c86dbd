"""A masked map as the input of a convolution, without memory of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .paths import being_traced


def apply_mask(hidden: Tensor, mask: Tensor) -> Tensor:
    """B × C × H × W and a mask B × C → their product, in the first one's dtype."""
    return hidden * mask.to(hidden.dtype)[:, :, None, None]


def convolve_masked(conv: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
    """conv(mask · hidden), for hidden B × C × H × W and a mask B × C.

    The gated path needs hardly more memory than the dense one: autograd keeps `hidden` for the ReLU
    in any case, and the product is computed again in the backward pass. Compilers decide such things
    by themselves.
    """
    masked = apply_mask(hidden, mask)
    if being_traced(masked) or not (torch.is_grad_enabled() and masked.requires_grad):
        return conv(masked)
    with _kept_as_product(hidden, mask, masked):
        return conv(masked)


@contextmanager
def _kept_as_product(hidden: Tensor, mask: Tensor, masked: Tensor) -> Iterator[None]:
    kept = (hidden.detach(), mask.detach())
    where, shape = masked.data_ptr(), masked.shape

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == where and saved.shape == shape else saved

    def unpack(saved: Tensor | None) -> Tensor:
        return apply_mask(*kept) if saved is None else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
