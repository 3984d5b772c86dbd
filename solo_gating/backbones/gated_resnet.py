"""ResNets with two paths through one set of weights: dense and gated."""

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from ..budgets import RANGE, Range, checked_budget, is_range, middle
from ..checks import checked_threshold, require
from ..errors import InputError
from ..gates import BudgetEmbedding, ChannelGate
from .resnet import ResNet

PATHS = ("gated", "dense")

# With it sigmoid(4) = 98 % of the channels are sampled.
_OPEN = 4.0


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass did: its path, input size (height, width), features and decisions.

    Attributes:
        features: B × C.
        masks: a B × C_out tensor of zeros and ones for each block; empty on the dense path.
    """

    path: str
    resolution: tuple[int, int]
    features: Tensor
    masks: tuple[Tensor, ...] = ()


class _Scope(NamedTuple):
    """What `TwoPathResNet.path` chose: successive paths, where the passes go, and the budget."""

    paths: Iterator[str]
    passes: deque[ForwardPass]
    budget: Tensor | None


class GatedBasicBlock(BasicBlock):
    """torchvision's BasicBlock with a second, gated way through it.

    dense: relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut(x)), torchvision's own `forward`;
    gated: relu(bn2'(conv2(m · relu(bn1'(conv1 x)))) + shortcut(x)) with the mask m = gate(x) over
    conv1's output channels, and bn1', bn2' the gated path's own BatchNorms (`gated_bn1`,
    `gated_bn2`) or, if they are shared, bn1 and bn2 (unification paper, Figure 1).
    """

    def add_gate(
        self, reduction: int, temperature: float, separate_bn: bool, told: bool, open_start: bool
    ) -> None:
        """Add the gate, and the gated path's BatchNorms as copies of the dense path's.

        A gate that is told the budget, or starts open, has a bias.
        """
        conv1 = self.conv1
        channels = conv1.out_channels
        self.gate = ChannelGate(
            conv1.in_channels, channels, reduction, temperature, bias=told or open_start
        )
        if told:
            self.gate.embedding = BudgetEmbedding(channels)
        if open_start:
            nn.init.constant_(self.gate.get_parameter("expand.bias"), _OPEN)
        self.separate_bn = separate_bn
        if separate_bn:
            self.gated_bn1 = type(self.bn1)(conv1.out_channels)
            self.gated_bn2 = type(self.bn2)(conv1.out_channels)
            self.gated_bn1.load_state_dict(self.bn1.state_dict())
            self.gated_bn2.load_state_dict(self.bn2.state_dict())

    def forward_gated(self, x: Tensor, budget: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """B × C_in × H × W, and the gate's budget → (B × C_out × H' × W', the mask B × C_out)."""
        bn1, bn2 = (self.bn1, self.bn2)
        if self.separate_bn:
            bn1, bn2 = (self.gated_bn1, self.gated_bn2)
        mask = self.gate(x, budget)
        hidden = self.relu(bn1(self.conv1(x)))
        masked = apply_mask(hidden, mask)
        with _kept_as(hidden, mask, masked):
            out = bn2(self.conv2(masked))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out), mask


def apply_mask(hidden: Tensor, mask: Tensor) -> Tensor:
    """B × C × H × W and a mask B × C → their product, in the first one's dtype."""
    return hidden * mask.to(hidden.dtype)[:, :, None, None]


@contextmanager
def _kept_as(hidden: Tensor, mask: Tensor, masked: Tensor) -> Iterator[None]:
    """What autograd keeps of `masked` inside the block is what it is the product of.

    `hidden` is kept for the ReLU in any case, so that the gated path needs hardly more memory than
    the dense one; the product is computed again in the backward pass. A compiler decides such
    things by itself.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and masked.requires_grad):
        yield
        return
    kept = (hidden.detach(), mask.detach())
    where, shape = masked.data_ptr(), masked.shape

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == where and saved.shape == shape else saved

    def unpack(saved: Tensor | None) -> Tensor:
        return apply_mask(*kept) if saved is None else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class TwoPathResNet(ResNet):
    """A ResNet whose forward takes one of two paths, chosen for a scope.

        features = backbone(images)                  # the default path
        with backbone.path("gated") as passes:
            features = backbone(images)
            masks = passes[-1].masks                 # one tensor B × C_out for each block

    The dense path is torchvision's `forward`, and its parameters have torchvision's names.

    Args:
        layers: number of blocks of the four stages.
        path: the path taken outside of every scope.
        budget_range: the lowest and the highest budget that the gates can be told, shares of the
            dense FLOPs; None for gates that are told none, as in the papers.
        budget: the budget outside of every scope; None for the middle of the range.
        kwargs: those of `ResNet`.

    Raises:
        InputError: for a path that is neither "gated" nor "dense", a range that is none, or a
            budget outside of it.
    """

    def __init__(
        self,
        layers: list[int],
        *,
        path: str = "dense",
        budget_range: Sequence[float] | None = None,
        budget: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(layers, **kwargs)
        self.default_path = checked_path(path, "backbone.kwargs.path")
        self._scope: _Scope | None = None
        self._compiled: dict[str, Callable[..., Any]] = {}
        self.budget_range: Range | None = None
        # A buffer, so that it follows the weights and a compiled network takes it as an input.
        self.register_buffer("_budget", None, persistent=False)
        if budget_range is not None:
            require("backbone.kwargs.budget_range", budget_range, is_range, RANGE)
            self.budget_range = (float(budget_range[0]), float(budget_range[1]))
        self.budget = budget

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile both paths, each by itself; the choice between them stays Python.

        A scope of `path` is no part of what is compiled, so that entering one compiles nothing
        again. Names in the state dict stay; copies and pickles are not compiled.

        Args:
            args: those of `torch.compile`.
            kwargs: those of `torch.compile`.
        """
        self._compiled = {
            "dense": torch.compile(super().forward, *args, **kwargs),
            "gated": torch.compile(self.forward_gated, *args, **kwargs),
        }

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions hold on to the network that they were made of.
        return {**super().__getstate__(), "_compiled": {}}

    @property
    def gated_blocks(self) -> list[GatedBasicBlock]:
        """The blocks that have a gate, in the order in which masks are returned."""
        raise NotImplementedError

    def forward_gated(
        self, x: Tensor, budget: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """B × 3 × H × W, and the gates' budget → (features B × C, one mask B × C_out per block)."""
        raise NotImplementedError

    @property
    def threshold(self) -> float:
        """The gates' threshold in evaluation: a channel is computed if its logit is at least this.

        0 as in the papers; it may be set at any time, to a number for all gates. Higher means fewer
        channels (`evaluate.dial.calibrate` finds the one for a share of the FLOPs). It is a choice
        of whoever uses the network and in no checkpoint.
        """
        return self.gated_blocks[0].gate.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        threshold = checked_threshold(value)
        for block in self.gated_blocks:
            block.gate.threshold = threshold

    @property
    def budget(self) -> float | None:
        """The share of the dense FLOPs that the gates are told to aim at.

        Any in `budget_range`; it may be set at any time, None for the range's middle, and is in no
        checkpoint, like `threshold`. What is then used comes near it (`evaluate.dial.calibrate`
        makes it exact). None for a network that was trained for no range: it cannot be set there.
        """
        return self._budget_set

    @budget.setter
    def budget(self, value: float | None) -> None:
        if value is None and self.budget_range is not None:
            value = middle(self.budget_range)
        if value is not None:
            value = checked_budget(value, self.budget_range)
        self._budget_set = value
        self._budget = None if value is None else self._as_tensor(value)

    @property
    def budget_told(self) -> Tensor | None:
        """`budget` as the gates are told it outside of every scope."""
        return self._budget

    def _as_tensor(self, budget: float) -> Tensor:
        weight = self.bn1.weight
        return torch.full((), budget, dtype=weight.dtype, device=weight.device)

    @contextmanager
    def path(
        self, *paths: str, budget: float | Tensor | None = None
    ) -> Iterator[deque[ForwardPass]]:
        """Choose the path of every forward pass inside a `with` block, and the gates' budget.

        Several names are the paths of successive forward passes, over and over: with
        `path("gated", "dense")` the first view of a training step is gated, the second dense.

        Args:
            paths: "gated" or "dense"; none for the default path.
            budget: of the gates inside the block; or one for each image, B, which are taken as they
                are; None for `budget`.

        Yields:
            The latest forward passes, oldest first; as many as there are names.

        Raises:
            InputError: for a path that is neither "gated" nor "dense", or a budget outside of
                `budget_range`.
        """
        names = [checked_path(path, "path") for path in paths or (self.default_path,)]
        passes: deque[ForwardPass] = deque(maxlen=len(names))
        told = None
        if isinstance(budget, Tensor):
            told = budget.to(self.bn1.weight)
        elif budget is not None:
            told = self._as_tensor(checked_budget(budget, self.budget_range))
        outer, self._scope = self._scope, _Scope(itertools.cycle(names), passes, told)
        try:
            yield passes
        finally:
            self._scope = outer

    def forward(self, x: Tensor) -> Tensor:
        """B × 3 × H × W → features B × C (or logits, while the network has its `fc`)."""
        path, budget = self.default_path, self.budget_told
        if self._scope is not None:
            path = next(self._scope.paths)
            budget = budget if self._scope.budget is None else self._scope.budget
        masks: tuple[Tensor, ...] = ()
        if path == "dense":
            features = self._compiled.get("dense", super().forward)(x)  # type: ignore[misc]
        else:
            features, masks = self._compiled.get("gated", self.forward_gated)(x, budget)
        if self._scope is not None:
            height, width = x.shape[-2:]
            self._scope.passes.append(ForwardPass(path, (height, width), features, masks))
        return features


class GatedResNet(TwoPathResNet):
    """One encoder with two paths: the weights are shared, gates choose the channels.

    Args:
        layers: number of blocks of the four stages.
        separate_bn: whether the gated path has its own BatchNorm in the blocks; the stem's and
            the shortcuts' are shared, as in the authors' code.
        reduction: the gates' reduction rate r.
        temperature: the gates' sampling temperature τ.
        threshold: of the gates' logits in evaluation.
        open_start: whether the gates start open, with a bias of +4 that they learn.
        kwargs: those of `TwoPathResNet`.

    Raises:
        InputError: for a value that is not accepted.
    """

    def __init__(
        self,
        layers: list[int],
        *,
        separate_bn: bool = True,
        reduction: int = 4,
        temperature: float = 2 / 3,
        threshold: float = 0.0,
        open_start: bool = False,
        **kwargs: Any,
    ):
        super().__init__(layers, block=GatedBasicBlock, **kwargs)
        told = self.budget_range is not None
        for block in self.gated_blocks:
            block.add_gate(reduction, temperature, separate_bn, told, open_start)
        self.threshold = threshold

    @property
    def gated_blocks(self) -> list[GatedBasicBlock]:
        """Every block of the four stages."""
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def forward_gated(
        self, x: Tensor, budget: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """B × 3 × H × W, and the gates' budget → (features B × C, one mask B × C_out per block)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        masks = []
        for block in self.gated_blocks:
            x, mask = block.forward_gated(x, budget)
            masks.append(mask)
        return self.fc(torch.flatten(self.avgpool(x), 1)), tuple(masks)


class TwoEncoderResNet(TwoPathResNet):
    """Two encoders that share nothing: the dense path is one, the gated path the other.

    The unification paper's Table 5 (2 × ResNet-18). The dense encoder has torchvision's parameter
    names; the gated one lives under `gated_net` and has a single set of BatchNorms.

    Args:
        layers: number of blocks of the four stages.
        separate_bn: no effect: the paths have nothing in common. Accepted like `GatedResNet`'s.
        reduction: the gates' reduction rate r.
        temperature: the gates' sampling temperature τ.
        threshold: of the gates' logits in evaluation.
        open_start: whether the gates start open.
        path: the path taken outside of every scope.
        budget_range: as in `TwoPathResNet`.
        budget: as in `TwoPathResNet`.
        kwargs: those of `ResNet`, for both encoders.
    """

    def __init__(
        self,
        layers: list[int],
        *,
        separate_bn: bool = True,
        reduction: int = 4,
        temperature: float = 2 / 3,
        threshold: float = 0.0,
        open_start: bool = False,
        path: str = "dense",
        budget_range: Sequence[float] | None = None,
        budget: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(layers, path=path, budget_range=budget_range, budget=budget, **kwargs)
        self.gated_net = GatedResNet(
            layers,
            separate_bn=False,
            reduction=reduction,
            temperature=temperature,
            open_start=open_start,
            budget_range=budget_range,
            **kwargs,
        )
        self.gated_net.fc = nn.Identity()
        self.threshold = threshold

    @property
    def gated_blocks(self) -> list[GatedBasicBlock]:
        """Every block of the gated encoder."""
        return self.gated_net.gated_blocks

    def forward_gated(
        self, x: Tensor, budget: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """B × 3 × H × W, and the gates' budget → (features B × C, one mask B × C_out per block)."""
        features, masks = self.gated_net.forward_gated(x, budget)
        return self.fc(features), masks

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # A stem that solo-learn puts in is meant for both encoders; each has its own weights.
        if name in ("conv1", "maxpool") and "gated_net" in self._modules:
            setattr(self.gated_net, name, _reinitialised_copy(value))


def checked_path(path: str, key: str) -> str:
    """The path itself if it is one.

    Raises:
        InputError: naming `key`, for anything but "gated" or "dense".
    """
    if path not in PATHS:
        raise InputError(f"{key}: found {path!r}, accepted are {PATHS}")
    return path


def _reinitialised_copy(module: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(module)
    if isinstance(fresh, nn.Conv2d):
        fresh.reset_parameters()
    return fresh
