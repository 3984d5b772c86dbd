"""ResNets with two paths through one set of weights: dense and gated."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from ..budgets import RANGE, Range, checked_budget, is_range, middle
from ..checks import checked_threshold, require
from ..errors import InputError
from ..gates import BudgetEmbedding, ChannelGate
from .paths import (
    Choice,
    ForwardPass,
    Remembered,
    Scope,
    being_traced,
    checked_path,
    in_backward,
    open_scope,
    refuse_in_scope,
    scope_of,
)
from .resnet import ResNet

# With it sigmoid(4) = 98 % of the channels are sampled.
_OPEN = 4.0


class GatedBasicBlock(BasicBlock):
    """torchvision's BasicBlock with a second, gated way through it.

    dense: relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut(x)), torchvision's own `forward`;
    gated: relu(bn2'(conv2(m · relu(bn1'(conv1 x)))) + shortcut(x)) with the mask m = gate(x) over
    conv1's output channels, and bn1', bn2' the gated path's own BatchNorms (`gated_bn1`,
    `gated_bn2`) or, if they are shared, bn1 and bn2 (unification paper, Figure 1).

    Attributes:
        path: the way that it goes when it is called by itself, outside of its backbone.
    """

    gate: ChannelGate
    path = "dense"

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

    def forward(self, x: Tensor, choice: Choice | None = None) -> Tensor:
        """B × C_in × H × W → B × C_out × H' × W', on the chosen path or its own.

        Raises:
            RuntimeError: for the gated path of a block without a gate; or without a choice, while
                a scope of its backbone is open.
        """
        if choice is None:
            refuse_in_scope(self)
            choice = Choice(self.path)
        if choice.path == "dense":
            return super().forward(x)
        out, mask = self.forward_gated(x, choice.budget)
        choice.masks.append(mask)
        return out

    def forward_gated(self, x: Tensor, budget: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """B × C_in × H × W, and the gate's budget → (B × C_out × H' × W', the mask B × C_out)."""
        if getattr(self, "gate", None) is None:
            raise RuntimeError(
                "this block is the dense encoder's and has no gate; those of the gated one are in "
                "backbone.gated_net"
            )
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
    the dense one; the product is computed again in the backward pass. Compilers decide such
    things by themselves.
    """
    if being_traced(masked) or not (torch.is_grad_enabled() and masked.requires_grad):
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


class Stage(nn.Sequential):
    """A stage's blocks, which are handed what was chosen for the pass."""

    def forward(self, x: Tensor, choice: Choice | None = None) -> Tensor:
        """B × C_in × H × W → B × C_out × H' × W'; without a choice each block goes its own way."""
        for block in self:
            x = block(x, choice)
        return x


class TwoPathResNet(ResNet):
    """A ResNet whose forward takes one of two paths, chosen for a scope.

        features = backbone(images)                  # the default path
        with backbone.path("gated") as passes:
            features = backbone(images)
            masks = passes[-1].masks                 # one tensor B × C_out for each block

    The dense path is torchvision's `forward`, and its parameters have torchvision's names. Stages
    and blocks are called as modules on both paths, so that hooks see them; called by themselves
    they take the default path.

    Args:
        layers: number of blocks of the four stages.
        path: the path taken outside of every scope; `backbone.path = "gated"` changes it.
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
        super().__init__(layers, block=GatedBasicBlock, **kwargs)
        self.default_path = checked_path(path, "backbone.kwargs.path")
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._remembered = Remembered()
        self.budget_range: Range | None = None
        if budget_range is not None:
            require("backbone.kwargs.budget_range", budget_range, is_range, RANGE)
            self.budget_range = (float(budget_range[0]), float(budget_range[1]))

    def _make_layer(self, *args: Any, **kwargs: Any) -> Stage:
        return Stage(*super()._make_layer(*args, **kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "path":  # what one would expect of the argument's name
            name = "default_path"
        super().__setattr__(name, value)

    @property
    def default_path(self) -> str:
        """The path taken outside of every scope, by stages and blocks called by themselves, too."""
        return self.layer1[0].path  # type: ignore[return-value]

    @default_path.setter
    def default_path(self, path: str) -> None:
        for block in self.blocks:
            block.path = checked_path(path, "path")

    @property
    def blocks(self) -> list[GatedBasicBlock]:
        """Every block of the four stages."""
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]

    @property
    def gated_blocks(self) -> list[GatedBasicBlock]:
        """The blocks that have a gate, in the order in which masks are returned."""
        raise NotImplementedError

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile both paths, each by itself; the choice between them stays Python.

        A scope of `path` is no part of what is compiled, so that entering one compiles nothing
        again. Names in the state dict stay; copies and pickles are not compiled.

        Args:
            args: those of `torch.compile`.
            kwargs: those of `torch.compile`.
        """
        self._compiled = {
            "dense": torch.compile(self.forward_dense, *args, **kwargs),
            "gated": torch.compile(self.forward_gated, *args, **kwargs),
        }

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions hold on to the network that they were made of.
        return {**super().__getstate__(), "_compiled": {}}

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "torch.jit.script: a network that chooses its path cannot be scripted; torch.jit.trace "
            "and torch.export take it on its default path"
        )

    def _replicate_for_data_parallel(self) -> Any:
        if scope_of(self) is not None:
            raise RuntimeError(
                "nn.DataParallel: its replicas run in threads of their own and know of no scope; "
                'set backbone.path = "gated", or use DistributedDataParallel'
            )
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

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
        return self.gated_blocks[0].gate.budget

    @budget.setter
    def budget(self, value: float | None) -> None:
        if value is None and self.budget_range is not None:
            value = middle(self.budget_range)
        if value is not None:
            value = checked_budget(value, self.budget_range)
        for block in self.gated_blocks:
            block.gate.budget = value

    @property
    def budget_told(self) -> Tensor | None:
        """`budget` as the gates are told it outside of every scope."""
        return None if self.budget is None else self._as_tensor(self.budget)

    def _as_tensor(self, budget: float) -> Tensor:
        return self.bn1.weight.new_full((), budget)

    def path(
        self, *paths: str, budget: float | Tensor | None = None
    ) -> AbstractContextManager[deque[ForwardPass]]:
        """Choose the path of every forward pass inside a `with` block, and the gates' budget.

        Several names are the paths of successive forward passes, over and over: with
        `path("gated", "dense")` the first view of a training step is gated, the second dense.
        A scope holds in the thread that opened it. A pass that is recomputed in the backward pass
        (activation checkpointing) takes the path it had, wherever that is.

        Args:
            paths: "gated" or "dense"; none for the default path.
            budget: of the gates inside the block; or one for each image, B, which are taken as they
                are; None for `budget`.

        Returns:
            A context that gives the latest forward passes, oldest first; as many as there are names.

        Raises:
            InputError: for a path that is neither "gated" nor "dense", or a budget outside of
                `budget_range`.
        """
        names = [checked_path(path, "path") for path in paths or (self.default_path,)]
        if isinstance(budget, Tensor):
            budget = budget.to(self.bn1.weight)
        elif budget is not None:
            budget = self._as_tensor(checked_budget(budget, self.budget_range))
        return open_scope(self, names, budget)

    def forward(self, x: Tensor) -> Tensor:
        """B × 3 × H × W → features B × C (or logits, while the network has its `fc`)."""
        path, budget, scope = self._choose(x)
        masks: tuple[Tensor, ...] = ()
        if path == "dense":
            features = self._compiled.get("dense", self.forward_dense)(x)
        else:
            features, masks = self._compiled.get("gated", self.forward_gated)(x, budget)
            self._check_gradients(features, masks)
        if scope is not None:
            height, width = x.shape[-2:]
            scope.passes.append(ForwardPass(path, (height, width), features, masks))
        return features

    def forward_features(self, x: Tensor) -> Tensor:
        """B × 3 × H × W → the last stage's maps, B × C × H' × W', before they are pooled.

        The path is chosen as for `forward`; a pass in a scope holds the maps as its features.
        """
        path, budget, scope = self._choose(x)
        choice = Choice(path, budget)
        maps = self._maps(x, choice)
        if scope is not None:
            height, width = x.shape[-2:]
            scope.passes.append(ForwardPass(path, (height, width), maps, tuple(choice.masks)))
        return maps

    def forward_dense(self, x: Tensor) -> Tensor:
        """B × 3 × H × W → features B × C, on the dense path."""
        return self._pooled(self._maps(x, Choice("dense")))

    def forward_gated(
        self, x: Tensor, budget: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """B × 3 × H × W, and the gates' budget → (features B × C, one mask B × C_out per block)."""
        choice = Choice("gated", budget)
        features = self._pooled(self._maps(x, choice))
        return features, tuple(choice.masks)

    def _choose(self, x: Tensor) -> tuple[str, Tensor | None, Scope | None]:
        """A pass's path, what its gates are told, and the scope that notes it."""
        if in_backward():
            return (*self._remembered.recall(x), None)
        scope = scope_of(self)
        path, budget = self.default_path, None
        if scope is not None:
            path, budget = next(scope.paths), scope.budget
        if budget is not None and budget.ndim and len(budget) != len(x):
            raise InputError(
                f"budget: found {len(budget)} budgets for {len(x)} images, accepted is one for each"
            )
        if (self.training or torch.is_grad_enabled()) and not being_traced(x):
            self._remembered.note(x, path, budget)
        # A tensor, so that what was compiled is not compiled again for another budget.
        return path, self.budget_told if budget is None else budget, scope

    def _check_gradients(self, features: Tensor, masks: tuple[Tensor, ...]) -> None:
        gate = self.gated_blocks[-1].gate
        if being_traced(features) or not (gate.training and gate.expand.weight.requires_grad):
            return
        if features.requires_grad and not masks[-1].requires_grad:
            raise RuntimeError(
                "activation checkpointing: masks made with use_reentrant=True have no gradient, so "
                "that the budget would teach the gates nothing; use use_reentrant=False"
            )

    def _maps(self, x: Tensor, choice: Choice) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x, choice)
        return x

    def _pooled(self, maps: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(maps), 1))


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
        budget: as in `TwoPathResNet`.
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
        budget: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(layers, **kwargs)
        told = self.budget_range is not None
        for block in self.gated_blocks:
            block.add_gate(reduction, temperature, separate_bn, told, open_start)
        self.threshold = threshold
        self.budget = budget

    @property
    def gated_blocks(self) -> list[GatedBasicBlock]:
        """Every block of the four stages."""
        return self.blocks


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
        super().__init__(layers, path=path, budget_range=budget_range, **kwargs)
        self.gated_net = GatedResNet(
            layers,
            separate_bn=False,
            reduction=reduction,
            temperature=temperature,
            open_start=open_start,
            budget_range=budget_range,
            path="gated",
            **kwargs,
        )
        self.gated_net.fc = nn.Identity()
        self.threshold = threshold
        self.budget = budget

    @property
    def gated_blocks(self) -> list[GatedBasicBlock]:
        """Every block of the gated encoder."""
        return self.gated_net.gated_blocks

    def _maps(self, x: Tensor, choice: Choice) -> Tensor:
        return (
            self.gated_net._maps(x, choice) if choice.path == "gated" else super()._maps(x, choice)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # A stem that solo-learn puts in is meant for both encoders; each has its own weights.
        if name in ("conv1", "maxpool") and "gated_net" in self._modules:
            setattr(self.gated_net, name, _reinitialised_copy(value))


def _reinitialised_copy(module: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(module)
    if isinstance(fresh, nn.Conv2d):
        fresh.reset_parameters()
    return fresh
