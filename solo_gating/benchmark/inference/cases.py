"""Encoders whose gates choose a wanted share of the channels, and images to run them on."""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm

from ...backbones import BACKBONES, TwoPathResNet
from ...deploy.onnx import to_onnx
from ...deploy.others_int8 import gates_of, onnx_int8, openvino_int8
from ...deploy.static import Kept, kept_channels, slice_encoder, static_flops
from ...evaluate.calibrate import threshold_for
from ...evaluate.extract import extract
from ...evaluate.policy import policy_of
from ...flops import BackboneFlops, count_flops, selected_channels
from ...gates import Decision, ScoringGate

# With narrower blocks a random gate has too few hidden units to tell images apart.
LEAST_WIDTH = 8


@dataclass(frozen=True)
class Model:
    """A network without gates of its own choosing, in the forms that engines take.

    Attributes:
        module: in evaluation mode.
        calibration: N × 3 × H × W, N ≥ 2, to quantise on.
    """

    module: nn.Module
    calibration: Tensor

    @cached_property
    def onnx(self) -> bytes:
        """The ONNX model, for any batch size."""
        return to_onnx(self.module, self.calibration[:2])

    @cached_property
    def onnx_int8(self) -> bytes:
        """The same, quantised by ONNX Runtime."""
        return onnx_int8(self.onnx, self.calibration, gates_of(self.module))

    @cached_property
    def openvino_int8(self) -> dict[str, bytes]:
        """OpenVINO's files, quantised by NNCF if that is installed."""
        return openvino_int8(self.onnx, self.calibration, gates_of(self.module))[0]


@dataclass(frozen=True)
class Network:
    """A model and the batch that it is timed on.

    Attributes:
        model: in evaluation mode.
        images: B × 3 × H × W.
    """

    model: Model
    images: Tensor

    @cached_property
    @torch.no_grad()
    def features(self) -> Tensor:
        """What PyTorch computes, B × C."""
        return self.model.module(self.images)


@dataclass(frozen=True)
class GatedCase:
    """A gated encoder on a batch.

    Attributes:
        asked: the share of the channels that was wanted; None for the encoder's own threshold.
        backbone: with gates and threshold set, in evaluation mode.
        images: B × 3 × H × W.
        features: what PyTorch computes on the gated path, B × C.
        masks: for each gate B × channels, zeros and ones.
        flops: of the backbone.
        calibration: N × 3 × H × W, to quantise on.
        others: N × 3 × H × W, N ≥ 2, to choose the static networks' channels on.
    """

    asked: float | None
    backbone: TwoPathResNet
    images: Tensor
    features: Tensor
    masks: tuple[Tensor, ...]
    flops: BackboneFlops
    calibration: Tensor
    others: Tensor

    @cached_property
    def static(self) -> Network:
        """The smaller network of the channels that any of `others` selects, with gates: the same features."""
        return self._sliced(gates=True)

    @cached_property
    def static_without_gates(self) -> Network:
        """The same, which computes all of them for every image."""
        return self._sliced(gates=False)

    @cached_property
    def _kept(self) -> Kept:
        labels = torch.zeros(len(self.others), dtype=torch.long)
        batches = list(zip(self.others.split(64), labels.split(64), strict=True))
        policy = policy_of(self.backbone, extract(self.backbone, batches, "gated"), "", {}, None)
        return kept_channels(policy, self.flops, "dynamic")

    def _sliced(self, gates: bool) -> Network:
        module = slice_encoder(self.backbone, self._kept, gates)
        return Network(Model(module, self.calibration), self.images)

    @property
    def dial(self) -> str | None:
        """What turns the gates, as `Gate.dial`."""
        return self.backbone.gates[0].dial

    @torch.no_grad()
    def features_with(self, masks: tuple[Tensor, ...]) -> Tensor:
        """What PyTorch computes if the gates have decided so, B × C.

        Args:
            masks: for each gate B × channels.
        """
        hooks = [
            gate.register_forward_hook(lambda m, x, decided, own=own: _with_mask(decided, own))
            for gate, own in zip(self.backbone.gates, masks, strict=True)
        ]
        try:
            with self.backbone.path("gated"):
                return self.backbone(self.images)
        finally:
            for hook in hooks:
                hook.remove()

    def share(self, masks: tuple[Tensor, ...]) -> float:
        """F^R / F^O with these masks, mean over the batch, gates included."""
        return float(self.flops.share(selected_channels(masks).double()).mean())

    @property
    def number_of_decisions(self) -> int:
        """One for each channel that gates choose from, and image."""
        return sum(mask.numel() for mask in self.masks)

    def static_density(self, network: Network) -> float:
        """Share of the channels that a static network keeps."""
        hidden = network.model.module.architecture["hidden"]  # type: ignore[union-attr,index]
        return sum(hidden) / int(self.flops.all_channels.sum())  # type: ignore[arg-type]

    def static_share(self, network: Network) -> float:
        """A static network's FLOPs, gates included, divided by the dense encoder's."""
        size = (self.images.shape[-2], self.images.shape[-1])
        return static_flops(network.model.module, size) / self.flops.dense  # type: ignore[arg-type]


def gated_case(
    backbone: TwoPathResNet,
    images: Tensor,
    batch: int,
    asked: float | None,
    calibration: Tensor | None = None,
) -> GatedCase:
    """Measure what a gated encoder does on a batch.

    Args:
        backbone: with its gates and threshold as they are to be.
        images: N × 3 × H × W, N ≥ 2, to choose the static networks' channels on; the first of them are
            the batch.
        batch: B ≤ N.
        asked: as in `GatedCase`.
        calibration: to quantise on; None for `images`.
    """
    size = (images.shape[-2], images.shape[-1])
    first = images[:batch]
    calibration = images if calibration is None else calibration
    with torch.no_grad(), backbone.path("gated") as passes:
        features = backbone(first)
        masks = passes[-1].masks
    flops = count_flops(backbone, size)
    return GatedCase(asked, backbone, first, features, masks, flops, calibration, images)


def _with_mask(decided: Tensor | Decision, mask: Tensor) -> Tensor | Decision:
    if isinstance(decided, Decision):
        return decided._replace(mask=mask.to(decided.mask.dtype))
    return mask.to(decided.dtype)


def random_images(number: int, size: int, seed: int) -> Tensor:
    """Random colour fields under normal noise, N × 3 × size × size.

    Images of independent pixels all have the same averages, by which no gate could tell them apart.
    """
    generator = torch.Generator().manual_seed(seed)
    fields = torch.randn(number, 3, 4, 4, generator=generator)
    noise = torch.randn(number, 3, size, size, generator=generator)
    return interpolate(fields, size=(size, size), mode="bicubic") + 0.5 * noise


@torch.no_grad()
def random_encoder(name: str, width: int, stem: str, images: Tensor, seed: int) -> TwoPathResNet:
    """An untrained encoder whose BatchNorms differ and have the images' statistics.

    Args:
        name: of a backbone with gates.
        width: of the first stage, at least `LEAST_WIDTH`.
        stem: "cifar" or "imagenet".
        images: N × 3 × H × W.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: Any = BACKBONES[name](width=width, stem=stem)
        for norm in _norms(backbone):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    backbone.fc = nn.Identity()
    backbone.eval().requires_grad_(False)
    for net in {backbone, backbone.encoder("gated")}:
        with _measuring(_norms(net)), net.path("dense"):
            net(images)
    return backbone


@torch.no_grad()
def with_random_gates(
    backbone: TwoPathResNet, images: Tensor, batch: int, density: float, seed: int
) -> TwoPathResNet:
    """A copy whose gates decide by image and compute a wanted share of the channels.

    For each gate a third of the share is computed for every image, and of twice as many channels as
    are still wanted each image selects half, on average; the others are never computed. So trained
    gates of the papers behave. The gates are ordinary ones: their masks follow from their logits.

    Args:
        backbone: from `random_encoder`; BatchNorms of the gated path get new statistics.
        images: N × 3 × H × W, over which channels are balanced.
        batch: the first ones, over which the share is met as nearly as whole channels allow.
        density: the share, in (0, 1].
        seed: of the gates' weights.
    """
    backbone = copy.deepcopy(backbone)
    backbone.threshold = 0.0
    encoder: Any = backbone.encoder("gated")
    generator = torch.Generator().manual_seed(seed)
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
    missing = 0.0
    for block in encoder.blocks:
        for gate in block.gates:
            wanted = missing + density * batch * gate.expand.out_channels
            _set_gate(gate, x, batch, density, wanted, generator)
            missing = wanted - float(gate(x[:batch]).sum())
        with _measuring(block.gated_norms):
            block.forward_gated(x)
        x, _ = block.forward_gated(x)
    return backbone


def _set_gate(
    gate: ScoringGate,
    x: Tensor,
    batch: int,
    density: float,
    wanted: float,
    generator: torch.Generator,
) -> None:
    """Weights with which the first images of x compute `wanted` channels all together."""
    channels, hidden = gate.expand.out_channels, gate.expand.in_channels
    gate.norm.weight.fill_(1)
    gate.norm.bias.fill_(2)  # so that the ReLU cuts few images off
    # Hidden unit 0 is always 1, so that its weights are a bias for each channel.
    gate.norm.weight[0], gate.norm.bias[0] = 0, 1
    weight = torch.randn(channels, hidden, generator=generator) / math.sqrt(max(1, hidden - 1))
    weight[:, 0] = 0
    gate.expand.weight.copy_(weight[:, :, None, None])
    with _measuring([gate.norm]):
        gate.logits(x)
    logits = gate.logits(x)
    number_on = round(channels * max(density / 3, 2 * density - 1))
    number_either = max(1, round(channels * min(4 * density / 3, 2 - 2 * density)))
    order = torch.randperm(channels, generator=generator)
    on, either, _ = order.tensor_split([number_on, min(channels, number_on + number_either)])
    bias = -1 - logits.amax(0)
    bias[on] = 1 - logits.amin(0)[on]
    bias[either] = -logits.mean(0)[either]
    if len(either):
        free = (logits + bias)[:batch, either]
        bias[either] -= _cut(free, round(wanted) - batch * len(on))
    gate.expand.weight[:, 0, 0, 0] = bias


def _cut(values: Tensor, number: int) -> float:
    """What about a number of values lie above, in the widest gap nearby.

    Engines round differently; a value in a wide gap gives the same masks in all of them.
    """
    ordered = values.flatten().sort(descending=True).values
    padded = torch.cat([ordered[:1] + 1, ordered, ordered[-1:] - 1])
    slack = 1 + number // 500
    first, last = (min(max(0, number + d), len(ordered)) for d in (-slack, slack))
    gaps = padded[first : last + 1] - padded[first + 1 : last + 2]
    best = first + int(gaps.argmax())
    return float((padded[best] + padded[best + 1]) / 2)


@torch.no_grad()
def with_threshold(backbone: TwoPathResNet, images: Tensor, density: float | None) -> TwoPathResNet:
    """A copy at the threshold, or the budget, that gives a share of the channels on a batch.

    A threshold is put half way between the nearest logits, where rounding changes no mask.

    Args:
        backbone: a trained gated encoder.
        images: the batch.
        density: the share, in (0, 1]; None to stay at the threshold that the backbone has.
    """
    backbone = copy.deepcopy(backbone)
    if backbone.gates[0].dial != "threshold":
        if density is not None:
            low, high = backbone.budget_range  # type: ignore[misc]
            backbone.budget = min(max(density, low), high)
        return backbone

    def share() -> float:
        with backbone.path("gated") as passes:
            backbone(images)
        return density_of(passes[-1].masks)

    if density is not None:
        backbone.threshold = threshold_for(backbone, share, density, tolerance=1e-3).threshold
    seen: list[Tensor] = []
    hooks = [
        gate.register_forward_hook(lambda m, x, mask: seen.append(m.logits(*x).flatten()))
        for gate in backbone.gates
    ]
    share()
    for hook in hooks:
        hook.remove()
    logits = torch.cat(seen)
    above = logits[logits >= backbone.threshold]
    below = logits[logits < backbone.threshold]
    if len(above) and len(below):
        backbone.threshold = float((above.min().double() + below.max().double()) / 2)
    return backbone


def density_of(masks: tuple[Tensor, ...]) -> float:
    """The share of the channels, of those that gates choose from, that masks compute."""
    return float(torch.cat(masks, dim=1).double().mean())


def _norms(module: nn.Module) -> list[Any]:
    return [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]


@contextmanager
def _measuring(norms: Iterable[Any]) -> Iterator[None]:
    """BatchNorms take over the statistics of what passes through them."""
    norms = list(norms)
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.eval().momentum = momentum
