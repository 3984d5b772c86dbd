"""The networks that the engine knows: whatever `fold` takes for granted is checked here.

A part is known by its exact class, because a subclass may compute something else, and by each
attribute that changes what it computes.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from ...backbones import (
    GatedBasicBlock,
    GatedBlock,
    GatedBottleneck,
    GatedResNet,
    ResNet,
    SlicedResNet,
    Stage,
    TwoEncoderResNet,
    TwoPathResNet,
    convolutions,
)
from ...backbones.blocks import plain_block
from ...backbones.resnet import PickingConv2d
from ...backbones.sliced import sliced_block
from ...errors import InputError
from ...gates import (
    GATES,
    BaseGate,
    BoostingGate,
    BudgetEmbedding,
    ChannelGate,
    Gate,
    ScoringGate,
)

# The networks, and their blocks.
_BLOCKS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    TorchvisionResNet: (BasicBlock, Bottleneck),
    ResNet: (BasicBlock, Bottleneck),
    GatedResNet: (GatedBasicBlock, GatedBottleneck),
    TwoEncoderResNet: (GatedBasicBlock, GatedBottleneck),
    SlicedResNet: (sliced_block(BasicBlock), sliced_block(Bottleneck)),
}

# Kernel sizes of the blocks' convolutions; the stride is that of the first 3×3.
_KERNELS: dict[type[nn.Module], tuple[int, ...]] = {BasicBlock: (3, 3), Bottleneck: (1, 3, 1)}

# What a block from outside leaves as it is.
_GATED_PATH = ("forward_gated", "gated_norms", "gates")

_STAGES = (nn.Sequential, Stage)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_network(backbone: nn.Module, path: str) -> None:
    """Refuse a network unless one path of it is known in every part.

    Args:
        backbone: any module.
        path: "gated" or "dense".

    Raises:
        InputError: naming the part, what was found and what is accepted.
    """
    if type(backbone) not in _BLOCKS:
        cls = type(backbone)
        raise InputError(
            f"backbone: got {cls.__name__} of {cls.__module__}, expected this package's "
            "ResNets and torchvision's resnet18, 34, 50 and 101, and no subclasses"
        )
    accepted = paths_of(backbone)
    if path not in accepted:
        raise InputError(
            f"path: got {path}, this {type(backbone).__name__} has {' and '.join(accepted)} only"
        )
    if path == "gated" and only_pytorch_runs(backbone):
        return
    _Inspection(backbone).network(path)


def only_pytorch_runs(backbone: nn.Module) -> bool:
    """Whether gates do more than mask, and do not say how that folds: then the backbone runs as it is."""
    gates = [module for module in backbone.modules() if isinstance(module, BaseGate)]
    return not all(gate.only_masks or _boosts(gate) for gate in gates)


def fold_is_of_forward(kind: type[BaseGate]) -> bool:
    """Whether no subclass decides otherwise than the class whose `fold` it inherits."""

    def owner(name: str) -> type:
        return next(cls for cls in kind.__mro__ if name in vars(cls))

    decides = [name for name in ("forward", "logits") if hasattr(kind, name)]
    return all(issubclass(owner("fold"), owner(name)) for name in decides)


def _boosts(gate: BaseGate) -> bool:
    if gate.streams or not fold_is_of_forward(type(gate)):
        return False
    folded = gate.fold()
    return folded is not None and folded.beta is not None


def named_blocks(encoder: Any) -> Iterator[tuple[str, Any]]:
    """The blocks of the four stages with their names, one after another."""
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in enumerate(getattr(encoder, stage)):
            yield f"{stage}.{index}", block


def paths_of(backbone: nn.Module) -> tuple[str, ...]:
    """The paths that a known network has, the gated one first."""
    if isinstance(backbone, TwoPathResNet):
        return ("gated", "dense")
    if isinstance(backbone, SlicedResNet) and backbone.gates:
        return ("gated",)
    return ("dense",)


def _kernels(block: nn.Module, layers: list[Any]) -> tuple[int, ...]:
    """Kernel sizes that are accepted of a block's convolutions: torchvision's, or 1×1 and 3×3."""
    plain = plain_block(type(block))
    if plain in _KERNELS:
        return _KERNELS[plain]
    return tuple(1 if conv.kernel_size == (1, 1) else 3 for _, conv, _ in layers)


class _Inspection:
    """Looks at a network's parts by their names."""

    def __init__(self, backbone: nn.Module):
        self._backbone = backbone

    def network(self, path: str) -> None:
        backbone: Any = self._backbone
        self._as_defined(backbone, "the network")
        encoder, prefix = backbone, ""
        if isinstance(backbone, ResNet):
            encoder = backbone.encoder(path)
        if encoder is not backbone:
            prefix = "gated_net."
            self._part("gated_net", GatedResNet)
            self._part("gated_net.fc", nn.Identity)
        channels = self._stem(prefix)
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            self._part(prefix + stage, *_STAGES)
        names = [prefix + name for name, _ in named_blocks(encoder)]
        if not names:
            raise InputError("backbone: got no blocks, expected at least one")
        for name in names:
            self._part(name, *_BLOCKS[type(encoder)], *self._chain(name, path))
            channels = self._block(name, channels, path)
        self._part(f"{prefix}avgpool", nn.AdaptiveAvgPool2d, output_size=1)
        if isinstance(self._part("fc", nn.Identity, nn.Linear), nn.Linear):
            self._linear("fc", channels)
        if path == "gated":
            self._budgets(names)

    def _chain(self, name: str, path: str) -> tuple[type[nn.Module], ...]:
        """The class of a block from outside, if its gated path is the one that `GatedBlock` makes."""
        cls = type(self._backbone.get_submodule(name))
        known = issubclass(cls, GatedBlock) and all(
            getattr(cls, key) is getattr(GatedBlock, key) for key in _GATED_PATH
        )
        return (cls,) if path == "gated" and known else ()

    def _stem(self, prefix: str) -> int:
        name = f"{prefix}conv1"
        out = self._convolution(name, f"{prefix}bn1", channels=None, kernel=None)
        conv: Any = self._backbone.get_submodule(name)
        kernel = conv.weight.shape[-1]
        for argument, least in (("stride", 1), ("padding", 0)):
            if getattr(conv, argument) not in [(n, n) for n in range(least, kernel + 1)]:
                accepted = f"{least} to {kernel}, the same for rows and columns,"
                self._refuse(f"{argument}={getattr(conv, argument)!r}", accepted, name)
        self._part(f"{prefix}relu", nn.ReLU)
        pool = self._part(f"{prefix}maxpool", nn.Identity, nn.MaxPool2d)
        if isinstance(pool, nn.MaxPool2d):
            arguments = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}
            self._attributes(
                f"{prefix}maxpool", pool, **arguments, ceil_mode=False, return_indices=False
            )
        return out

    def _block(self, name: str, channels: int, path: str) -> int:
        block: Any = self._backbone.get_submodule(name)
        self._part(f"{name}.relu", nn.ReLU)
        layers = convolutions(block)
        norms = self._norms(name, path, len(layers))
        widths, stride = [channels], 1
        for number, ((conv, _, _), kernel) in enumerate(
            zip(layers, _kernels(block, layers), strict=True), 1
        ):
            step = 1
            if kernel == 3 and stride == 1:
                step = 2 if self._part(f"{name}.{conv}", nn.Conv2d).stride == (2, 2) else 1
                stride = step
            width = self._convolution(
                f"{name}.{conv}",
                norms[number - 1],
                widths[-1],
                kernel,
                stride=step,
                padding=kernel // 2,
            )
            widths.append(width)
        out = widths[-1]
        if block.downsample is None:
            if (stride, out) != (1, channels):
                self._refuse("no shortcut", "one that changes the map's shape", name)
        else:
            shortcut = self._part(f"{name}.downsample", nn.Sequential)
            if len(shortcut) != 2:
                self._refuse(f"{len(shortcut)} parts", "two", f"{name}.downsample")
            conv = f"{name}.downsample.0"
            width = self._convolution(
                conv, f"{name}.downsample.1", channels, 1, stride=stride, padding=0
            )
            if width != out:
                self._refuse(f"{width} output channels", str(out), conv)
        if path == "gated":
            gates = self._gates(name)
            if len(gates) != len(layers) - 1:
                self._refuse(f"{len(gates)} gates", str(len(layers) - 1), name)
            for gate, hidden in zip(gates, widths[1:], strict=False):
                self._gate(gate, channels, hidden)
        return out

    def _norms(self, name: str, path: str, number: int) -> list[str]:
        """The names of a block's BatchNorms on a path."""
        block: Any = self._backbone.get_submodule(name)
        own = "gated_" if path == "gated" and getattr(block, "separate_bn", False) else ""
        norms = [f"{name}.{own}bn{n}" for n in range(1, number + 1)]
        for n, gate in enumerate(self._gates(name) if path == "gated" else []):
            if cast(Any, self._backbone.get_submodule(gate)).has_output_norm and n < number:
                norms[n] = f"{gate}.output_norm"
        return norms

    def _gates(self, name: str) -> list[str]:
        """The names of a block's gates."""
        children = self._backbone.get_submodule(name).named_children()
        return [f"{name}.{child}" for child, module in children if isinstance(module, Gate)]

    def _gate(self, name: str, channels: int, hidden: int) -> None:
        gate: Any = self._backbone.get_submodule(name)
        self._part(name, *GATES.values())
        if isinstance(gate, BoostingGate):
            if self._linear(f"{name}.predict", channels) != hidden:
                self._refuse("another number of channels", str(hidden), f"{name}.predict")
            self._numbers(f"{name}.shift", gate.shift, (hidden,))
        if not isinstance(gate, ScoringGate):
            return
        self._part(f"{name}.relu", nn.ReLU)
        reduced = self._convolution(
            f"{name}.reduce", f"{name}.norm", channels, 1, stride=1, padding=0
        )
        out = self._convolution(f"{name}.expand", None, reduced, 1, stride=1, padding=0)
        if out != hidden:
            self._refuse(f"{out} output channels", str(hidden), f"{name}.expand")
        if gate.embedding is not None:
            self._part(f"{name}.embedding", BudgetEmbedding)
            between = self._linear(f"{name}.embedding.reduce", 1)
            if self._linear(f"{name}.embedding.expand", between) != hidden:
                self._refuse("another number of channels", str(hidden), f"{name}.embedding")

    def _budgets(self, blocks: list[str]) -> None:
        expected = getattr(self._backbone, "budget_range", None) is not None
        for gate in [gate for block in blocks for gate in self._gates(block)]:
            module = self._backbone.get_submodule(gate)
            if type(module) is not ChannelGate:
                continue
            is_told = module.embedding is not None
            if is_told != expected:
                found = "a budget embedding" if is_told else "no budget embedding"
                accepted = "one in each gate, with a budget_range, or none"
                self._refuse(found, accepted, gate)

    def _convolution(
        self,
        name: str,
        norm: str | None,
        channels: int | None,
        kernel: int | None,
        **arguments: Any,
    ) -> int:
        """Checks a convolution and its BatchNorm; returns the number of output channels."""
        conv = self._part(name, nn.Conv2d, *([PickingConv2d] if kernel == 1 else []))
        self._attributes(name, conv, **arguments, dilation=1, groups=1, padding_mode="zeros")
        self._numbers(f"{name}.weight", conv.weight, (None, channels, kernel, kernel))
        out, _, height, width = conv.weight.shape
        if height != width:
            self._refuse(f"a kernel of {height} × {width}", "a square one", name)
        if conv.bias is not None:
            if isinstance(conv, PickingConv2d):
                self._refuse("a bias", "none", name)
            self._numbers(f"{name}.bias", conv.bias, (out,))
        if norm is not None:
            self._norm(norm, out)
        return out

    def _norm(self, name: str, channels: int) -> None:
        norm = self._part(name, nn.BatchNorm2d, nn.SyncBatchNorm, track_running_stats=True)
        for statistic in ("running_mean", "running_var"):
            self._numbers(f"{name}.{statistic}", getattr(norm, statistic), (channels,))
        for parameter in ("weight", "bias"):
            if getattr(norm, parameter) is not None:
                self._numbers(f"{name}.{parameter}", getattr(norm, parameter), (channels,))

    def _linear(self, name: str, channels: int) -> int:
        linear = self._part(name, nn.Linear)
        self._numbers(f"{name}.weight", linear.weight, (None, channels))
        out = linear.weight.shape[0]
        if linear.bias is not None:
            self._numbers(f"{name}.bias", linear.bias, (out,))
        return out

    def _part(self, name: str, *classes: type[nn.Module], **attributes: Any) -> Any:
        try:
            part: nn.Module | None = self._backbone.get_submodule(name)
        except AttributeError:
            part = None
        if type(part) not in classes:
            accepted = " or ".join(cls.__name__ for cls in classes)
            self._refuse("none" if part is None else type(part).__name__, accepted, name)
        self._as_defined(part, name)
        self._attributes(name, part, **attributes)
        return part

    def _as_defined(self, part: Any, name: str) -> None:
        """Refuse what makes a module compute something else than its class says."""
        hooks = part._forward_hooks or part._forward_pre_hooks
        if hooks or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            self._refuse("forward hooks", "none", name)
        replaced = [key for key in vars(part) if callable(getattr(type(part), key, None))]
        if replaced:
            self._refuse(f"another {replaced[0]}", f"{type(part).__name__}'s own", name)

    def _attributes(self, name: str, part: Any, **accepted: Any) -> None:
        for key, wanted in accepted.items():
            found = getattr(part, key)
            if found not in (wanted, (wanted, wanted)):  # for rows and columns
                self._refuse(f"{key}={found!r}", repr(wanted), name)

    def _numbers(self, name: str, tensor: Any, shape: tuple[int | None, ...]) -> None:
        if type(tensor) not in (Tensor, nn.Parameter):
            self._refuse(type(tensor).__name__, "a tensor", name)
        found = tuple(tensor.shape)
        if len(found) != len(shape) or not all(
            size == wanted or (wanted is None and size > 0)
            for size, wanted in zip(found, shape, strict=True)
        ):
            accepted = " × ".join("any" if wanted is None else str(wanted) for wanted in shape)
            self._refuse(f"the shape {found}", accepted, name)
        if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
            self._refuse(f"{tensor.dtype}, {tensor.layout}", "dense floating point", name)
        if tensor.is_meta:
            self._refuse("a tensor without values (meta)", "one with values", name)

    def _refuse(self, found: str, accepted: str, name: str) -> None:
        raise InputError(f"backbone: got {found}, expected {accepted} for {name}")
