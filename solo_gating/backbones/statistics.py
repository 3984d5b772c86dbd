"""BatchNorm's running statistics: left alone for a while, or estimated anew for what is evaluated."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..gates import BaseGate
from .two_path import TwoPathResNet


def batch_norms(*modules: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms in modules, but for those that gates decide with."""
    deciding = {
        part
        for module in modules
        for gate in module.modules()
        if isinstance(gate, BaseGate)
        for part in gate.modules()
    }
    return [
        part
        for module in modules
        for part in module.modules()
        if isinstance(part, _BatchNorm) and part not in deciding
    ]


@contextmanager
def untracked(*modules: nn.Module) -> Iterator[None]:
    """Passes in training mode inside a `with` block leave the running statistics alone."""
    tracking = [norm for norm in batch_norms(*modules) if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


@contextmanager
def recalibrated(backbone: nn.Module, loader: Iterable, path: str | None = None) -> Iterator[None]:
    """BatchNorm statistics of one path, as its dial stands, inside a `with` block.

    They are the mean of the batches' statistics, of their means and unbiased variances. Layers that
    the path does not take keep theirs; so do the gates' own, which belong to their decisions.
    Afterwards all is as it was, bit for bit.

    What networks of many widths need, whose widths share no statistics (Yu and Huang,
    arXiv:1903.05134, section 3.3); their authors keep a moving average over passes through the
    training images instead.

    Args:
        backbone: its dial must not be turned inside the block.
        loader: batches `[images, targets]` of about the same size, whose targets are not read and
            whose images, B × 3 × H × W, are prepared as those that are evaluated; B ≥ 2.
        path: "gated" or "dense" for a backbone with two paths; None for its default.
    """
    modes = {module: module.training for module in backbone.modules()}
    norms = [norm for norm in batch_norms(backbone) if norm.running_mean is not None]
    before = [
        ({key: value.clone() for key, value in norm.named_buffers()}, norm.momentum)
        for norm in norms
    ]

    def put_back(only_unused: bool) -> None:
        for norm, (buffers, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if only_unused and norm.num_batches_tracked:
                continue
            for key, value in norm.named_buffers():
                value.copy_(buffers[key])

    try:
        try:
            backbone.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
            _run(backbone, loader, path)
        finally:
            for module, mode in modes.items():
                module.training = mode
        put_back(only_unused=True)
        yield
    finally:
        put_back(only_unused=False)


@torch.no_grad()
def _run(backbone: nn.Module, loader: Iterable, path: str | None) -> None:
    weight = next(backbone.parameters())
    for images, _ in loader:
        images = images.to(weight.device, weight.dtype)
        if isinstance(backbone, TwoPathResNet):
            with backbone.path(*([path] if path else [])):
                backbone(images)
        else:
            backbone(images)
