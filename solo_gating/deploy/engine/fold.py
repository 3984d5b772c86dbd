"""A ResNet's weights with every BatchNorm folded into the convolution before it."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from solo_gating_runtime.checks import checked_budget, checked_threshold
from solo_gating_runtime.network import Block, Convolution, Embedding, Floats, Network
from solo_gating_runtime.network import Gate as FoldedGate

from ...backbones import ResNet, TwoPathResNet, checked_path, convolutions
from ...errors import InputError
from ...gates import Gate
from .known import check_network, fold_is_of_forward, named_blocks, only_pytorch_runs

_GATE_WEIGHTS = ("reduce", "bias", "expand", "shift")


@dataclass(frozen=True)
class Folded:
    """One path of a backbone, in float32.

    Attributes:
        network: for the kernel.
        modules: for each of its gates None, or the module to decide instead of it, for a gate that
            cannot be folded.
        whole: for gates that do more than mask and boost, a copy of the backbone; its network is then
            good for its shapes only.
    """

    network: Network
    modules: tuple[Gate | None, ...]
    whole: TwoPathResNet | None = None

    @property
    def is_compilable(self) -> bool:
        """Whether the kernel runs it."""
        known = all(block.is_known for block in self.network.blocks)
        return known and not any(self.modules) and self.whole is None


@torch.no_grad()
def fold(
    backbone: nn.Module, path: str, threshold: float | None = None, budget: float | None = None
) -> Folded:
    """Fold one path of a backbone, as it is in evaluation.

    Args:
        backbone: one of this package's ResNets, or torchvision's resnet18, 34, 50 or 101.
        path: "gated" or "dense".
        threshold: of the gates; None for the backbone's own.
        budget: that the gates are told, of a network trained for a range; None for the backbone's own.

    Raises:
        InputError: for a backbone without gates on the gated path, with a part that `known` does
            not know, or with weights that are not finite; for a setting that it does not have.
    """
    checked_path(path, "path")
    check_network(backbone, path)
    encoder: Any = backbone.encoder(path) if isinstance(backbone, ResNet) else backbone
    fc = backbone.get_submodule("fc")
    gated = path == "gated"
    budget_range = getattr(backbone, "budget_range", None) if gated else None
    if not gated and (threshold or budget is not None):
        key, value = ("budget", budget) if budget is not None else ("threshold", threshold)
        raise InputError(f"{key}: got {value!r} for the dense path, expected path='gated'")
    if threshold is None:
        threshold = _of_all_gates("threshold", backbone) if gated else 0.0
    checked_threshold(threshold)
    if budget is not None:
        budget = checked_budget(budget, budget_range)
    elif budget_range is not None:
        budget = _of_all_gates("budget", backbone)
    modules: list[Gate | None] = []
    as_it_is = gated and only_pytorch_runs(backbone)
    network = Network(
        path=path,
        stem=_folded(encoder.conv1, encoder.bn1, "conv1"),
        max_pool=not isinstance(encoder.maxpool, nn.Identity),
        blocks=tuple(
            _folded_block(block, path, name, as_it_is, modules)
            for name, block in named_blocks(encoder)
        ),
        linear=_linear(fc) if isinstance(fc, nn.Linear) else None,
        budget_range=budget_range,
        dial=cast(Any, backbone).gates[0].dial if gated else "threshold",
        stages=tuple(len(getattr(encoder, f"layer{stage}")) for stage in (1, 2, 3, 4)),
        threshold=threshold,
        budget=budget,
    )
    whole = None
    if as_it_is:
        # A copy, as of gates: later changes to the backbone have no effect.
        whole = cast(TwoPathResNet, copy.deepcopy(backbone)).to("cpu", torch.float32).eval()
    return Folded(network, tuple(modules), whole)


def _of_all_gates(attribute: str, backbone: Any) -> Any:
    value, *others = [getattr(gate, attribute) for gate in backbone.gates]
    if any(other != value for other in others):
        raise InputError(f"{attribute}: got gates with different ones, expected one for all gates")
    return value


def _folded_block(
    block: Any, path: str, name: str, as_it_is: bool, modules: list[Gate | None]
) -> Block:
    layers = convolutions(block)
    norms = [norm for _, _, norm in layers]
    gates: list[FoldedGate] = []
    if path == "gated":
        norms = getattr(block, "gated_norms", norms)
        for number, (_, conv, _) in enumerate(layers[:-1]):
            folded, module = _no_gate(conv.out_channels), None
            if not as_it_is:
                folded, module = _folded_gate(
                    block.gates[number], conv.out_channels, f"{name}'s gate"
                )
            gates.append(folded)
            modules.append(module)
    shortcut = None
    if block.downsample is not None:
        shortcut = _folded(block.downsample[0], block.downsample[1], f"{name}.downsample")
    return Block(
        tuple(
            _folded(conv, norm, f"{name}.{conv_name}")
            for (conv_name, conv, _), norm in zip(layers, norms, strict=True)
        ),
        shortcut,
        tuple(gates),
    )


def _folded_gate(gate: Gate, channels: int, name: str) -> tuple[FoldedGate, Gate | None]:
    # A copy: later changes to the backbone have no effect.
    gate = copy.deepcopy(gate).to("cpu").eval()
    with torch.device("cpu"):
        folded = gate.fold() if fold_is_of_forward(type(gate)) else None
        if folded is None:
            return _no_gate(channels), gate.float()
    embedding = None
    if folded.embedding is not None:
        parts = (folded.embedding.weight, folded.embedding.bias, folded.embedding.expand)
        embedding = Embedding(*(_float(part, name) for part in parts))
    if folded.beta is not None:
        parts = (folded.reduce, folded.bias, folded.beta)
        return FoldedGate.boosting(*(_float(part, name) for part in parts)), None
    weights = {key: _float(getattr(folded, key), name) for key in _GATE_WEIGHTS}
    return FoldedGate(**weights, embedding=embedding, count=folded.count), None


def _no_gate(channels: int) -> FoldedGate:
    """In the place of a gate that the kernel does not run."""
    nothing = np.zeros(0, np.float32)
    return FoldedGate(nothing, nothing, nothing, np.zeros(channels, np.float32))


def _folded(conv: Any, norm: Any, name: str) -> Convolution:
    # In float64, so that folding costs one rounding and no more.
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    return Convolution(
        _float(conv.weight.double() * scale[:, None, None, None], name),
        _float(shift, name),
        _number(conv.stride),
        _number(conv.padding),
    )


def _linear(fc: nn.Linear) -> tuple[Floats, Floats]:
    bias = torch.zeros(fc.out_features, device="cpu") if fc.bias is None else fc.bias
    return _float(fc.weight, "fc"), _float(bias, "fc")


def _float(value: Tensor, name: str) -> Floats:
    value = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not value.isfinite().all():
        raise InputError(
            f"backbone: got NaN or infinity, expected finite weights for {name} and its BatchNorm"
        )
    return value.numpy()


def _number(pair: Any) -> int:
    """The number that an argument for rows and columns consists of: `known` refused other pairs."""
    return pair[0] if isinstance(pair, tuple) else pair
