"""ResNets with two paths through one set of weights: dense and gated."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..budgets import RANGE, Range, checked_budget, is_range, middle
from ..checks import checked_threshold, is_share, require
from ..errors import InputError
from ..gates import BaseGate, gate_class, make_gate
from .blocks import BLOCKS, GatedBlock, Stage, convolutions, gated_block
from .masking import apply_mask
from .paths import (
    Choice,
    ForwardPass,
    Remembered,
    Scope,
    being_traced,
    checked_path,
    in_backward,
    open_scope,
    scope_of,
)
from .resnet import ResNet

# What the bias of `open_start`, a key of earlier versions, was.
_OPEN = 4.0


def _is_closed_range(value: Any) -> bool:
    """A range, or one budget twice."""
    return is_range(value) or (
        isinstance(value, Sequence)
        and len(value) == 2
        and is_share(value[0])
        and value[0] == value[1]
    )


class TwoPathResNet(ResNet):
    """A ResNet whose forward takes one of two paths, chosen for a scope.

        features = backbone(images)                  # the default path
        with backbone.path("gated") as passes:
            features = backbone(images)
            masks = passes[-1].masks                 # one tensor B × C_out for each gate

    The dense path is torchvision's `forward`, and its parameters have torchvision's names. Stages
    and blocks are called as modules on both paths, so that hooks see them; called by themselves
    they take the default path.

    Args:
        layers: number of blocks of the four stages.
        block: the class of the residual blocks, or its name in `BLOCKS`.
        path: the path taken outside of every scope; `backbone.path = "gated"` changes it.
        budget_range: the lowest and the highest budget that the gates can be told, which may be
            the same; None for gates that are told none, as in the papers.
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
        block: str | type[nn.Module] = "basic",
        path: str = "dense",
        budget_range: Sequence[float] | None = None,
        budget: float | None = None,
        **kwargs: Any,
    ):
        plain = BLOCKS[block] if isinstance(block, str) else block
        super().__init__(layers, block=gated_block(plain), **kwargs)
        self.default_path = checked_path(path, "backbone.kwargs.path")
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._remembered = Remembered()
        self.budget_range: Range | None = None
        if budget_range is not None:
            require("backbone.kwargs.budget_range", budget_range, _is_closed_range, RANGE)
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
    def gated_blocks(self) -> list[GatedBlock]:
        """The blocks that have gates, in the order in which masks are returned."""
        return self.encoder("gated").blocks  # type: ignore[return-value]

    @property
    def gates(self) -> list[BaseGate]:
        """All gates, in the order in which masks are returned: between blocks, then in them."""
        return [*self.stream_gates, *(gate for block in self.gated_blocks for gate in block.gates)]

    @property
    def stream_gates(self) -> list[BaseGate]:
        """The gates of the stem's and of each stage's output, for kinds that have them; or none."""
        return list(getattr(self.encoder("gated"), "between", ()))

    @property
    def gated_only(self) -> list[nn.Module]:
        """The modules that the gated path alone uses."""
        inside = [module for block in self.gated_blocks for module in block.gated_only]
        return [*self.stream_gates, *inside]

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
            "gated": torch.compile(self._run_gated, *args, **kwargs),
        }

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` has been called."""
        return bool(self._compiled)

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
        channels (`evaluate.calibrate.calibrate` finds the one for a share of the FLOPs). It is a choice
        of whoever uses the network and in no checkpoint. Gates that decide without a threshold have
        0.
        """
        return self.gates[0].threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        threshold = checked_threshold(value)
        gates = self.gates
        if threshold and gates[0].dial != "threshold":
            raise InputError(
                f"threshold: got {value}, gates of kind {gates[0].kind!r} decide without one; "
                "expected 0"
            )
        for gate in gates:
            gate.threshold = threshold

    @property
    def budget(self) -> float | None:
        """The share of the dense FLOPs, or of the channels, that the gates are told to aim at.

        Any in `budget_range`; it may be set at any time, None for the range's middle, and is in no
        checkpoint, like `threshold`. What is then used comes near it (`evaluate.calibrate.calibrate`
        makes it exact). None for a network that was trained for no range: it cannot be set there.
        """
        return self.gates[0].budget

    @budget.setter
    def budget(self, value: float | None) -> None:
        if value is None and self.budget_range is not None:
            value = middle(self.budget_range)
        if value is not None:
            value = checked_budget(value, self.budget_range)
        for gate in self.gates:
            gate.budget = value

    @property
    def budget_told(self) -> Tensor | None:
        """`budget` as the gates are told it outside of every scope."""
        return None if self.budget is None else self._as_tensor(self.budget)

    def _as_tensor(self, budget: float) -> Tensor:
        # In at least float32: half precision knows 0.3 as 0.2998.
        weight = self.bn1.weight
        return weight.new_full((), budget, dtype=torch.promote_types(weight.dtype, torch.float32))

    def path(
        self, *paths: str, budget: float | Tensor | None = None, view: int = 0
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
            view: the number of the first name's view; of the second one it is the next, and so on.
                Some kinds of gates tell the views of a training step apart.

        Returns:
            A context that gives the latest forward passes, oldest first; as many as there are names.

        Raises:
            InputError: for a path that is neither "gated" nor "dense", or a budget outside of
                `budget_range`.
        """
        names = [checked_path(path, "path") for path in paths or (self.default_path,)]
        if isinstance(budget, Tensor):
            budget = budget.to(self._as_tensor(0.0))
        elif budget is not None:
            budget = self._as_tensor(checked_budget(budget, self.budget_range))
        return open_scope(self, names, budget, view)

    def forward(self, x: Tensor) -> Tensor:
        """B × 3 × H × W → features B × C (or logits, while the network has its `fc`)."""
        (path, budget, view), scope = self._choose(x)
        masks: tuple[Tensor, ...] = ()
        penalty = None
        if path == "dense":
            features = self._compiled.get("dense", self.forward_dense)(x)
        else:
            run = self._compiled.get("gated", self._run_gated)
            features, masks, penalty = run(x, budget, view)
            self._check_gradients(features, masks, penalty)
        if scope is not None:
            height, width = x.shape[-2:]
            scope.passes.append(ForwardPass(path, (height, width), features, masks, penalty))
        return features

    def forward_features(self, x: Tensor) -> Tensor:
        """B × 3 × H × W → the last stage's maps, B × C × H' × W', before they are pooled.

        The path is chosen as for `forward`; a pass in a scope holds the maps as its features.
        """
        chosen, scope = self._choose(x)
        choice = Choice(*chosen)
        maps = self._maps(x, choice)
        if scope is not None:
            size, masks = (x.shape[-2], x.shape[-1]), tuple(choice.masks)
            scope.passes.append(ForwardPass(choice.path, size, maps, masks, choice.penalty))
        return maps

    def forward_dense(self, x: Tensor) -> Tensor:
        """B × 3 × H × W → features B × C, on the dense path."""
        return self._pooled(self._maps(x, Choice("dense")))

    def forward_gated(
        self, x: Tensor, budget: Tensor | None = None, view: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """B × 3 × H × W, and the gates' budget → (features B × C, one mask B × C_out per gate)."""
        features, masks, _ = self._run_gated(x, budget, view)
        return features, masks

    def _run_gated(
        self, x: Tensor, budget: Tensor | None, view: int
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Features, masks, and what the gates add to the loss."""
        choice = Choice("gated", budget, view)
        features = self._pooled(self._maps(x, choice))
        return features, tuple(choice.masks), choice.penalty

    def _choose(self, x: Tensor) -> tuple[tuple[str, Tensor | None, int], Scope | None]:
        """A pass's path, what its gates are told, its view, and the scope that notes it."""
        if in_backward():
            return self._remembered.recall(x), None
        scope = scope_of(self)
        path, budget, view = self.default_path, None, 0
        if scope is not None:
            view, path = next(scope.paths)
            budget = scope.budget
            # No more views than the gates tell apart: what is compiled is compiled for each.
            view %= self.gates[0].views if path == "gated" else 1
        if budget is not None and budget.ndim and len(budget) != len(x):
            raise InputError(
                f"budget: got {len(budget)} budgets for {len(x)} images, expected one for each"
            )
        if (self.training or torch.is_grad_enabled()) and not being_traced(x):
            self._remembered.note(x, path, budget, view)
        # A tensor, so that what was compiled is not compiled again for another budget.
        return (path, self.budget_told if budget is None else budget, view), scope

    def _check_gradients(
        self, features: Tensor, masks: tuple[Tensor, ...], penalty: Tensor | None
    ) -> None:
        gate = self.gates[-1]
        learns = gate.training and any(p.requires_grad for p in gate.parameters())
        if being_traced(features) or not learns:
            return
        in_loss = [*(masks[-1:] if gate.losses else ()), *(() if penalty is None else (penalty,))]
        if features.requires_grad and not all(one.requires_grad for one in in_loss):
            raise RuntimeError(
                "activation checkpointing: masks made with use_reentrant=True have no gradient, so "
                "that the budget would teach the gates nothing; use use_reentrant=False"
            )

    def _maps(self, x: Tensor, choice: Choice, stages: list[Tensor] | None = None) -> Tensor:
        """The last stage's maps; those of every stage are added to a list that is given."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        between: list[tuple[Tensor, ...]] = [()] * len(self.stages)
        if choice.path == "gated" and (gates := self.stream_gates):
            stem, *streams = masks = [gate(x, choice.budget) for gate in gates]
            choice.masks.extend(masks)
            x, between = apply_mask(x, stem), [(mask,) for mask in streams]
        for stage, stream in zip(self.stages, between, strict=True):
            x = stage(x, choice, *stream)
            if stages is not None:
                stages.append(x)
        return x

    def _pooled(self, maps: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(maps), 1))


class GatedResNet(TwoPathResNet):
    """One encoder with two paths: the weights are shared, gates choose the channels.

    Args:
        layers: number of blocks of the four stages.
        gate: the kind of gates, one of `gates.GATES`.
        gate_kwargs: arguments of the kind's own.
        separate_bn: whether the gated path has its own BatchNorm in the blocks; the stem's and
            the shortcuts' are shared, as in the authors' code.
        reduction: the gates' reduction rate r, for kinds that have one.
        temperature: the gates' sampling temperature τ, for kinds that have one.
        threshold: of the gates' logits in evaluation.
        open_start: as earlier versions named a bias of 4 of `channel` gates (`gate_kwargs`).
        budget: as in `TwoPathResNet`.
        kwargs: those of `TwoPathResNet`.

    Raises:
        InputError: for a value that is not accepted.
    """

    def __init__(
        self,
        layers: list[int],
        *,
        gate: str = "channel",
        gate_kwargs: Mapping[str, Any] | None = None,
        separate_bn: bool = True,
        reduction: int = 4,
        temperature: float = 2 / 3,
        threshold: float = 0.0,
        open_start: bool = False,
        budget: float | None = None,
        **kwargs: Any,
    ):
        kind = gate_class(gate, "backbone.kwargs.gate")
        super().__init__(layers, **kwargs)
        if kind.needs_budget and self.budget_range is None:
            self.budget_range = (0.01, 1.0)
            budget = 1.0 if budget is None else budget
        common = {
            "reduction": reduction,
            "temperature": temperature,
            "told": self.budget_range is not None,
            **({"bias": _OPEN} if open_start else {}),
        }

        def make(in_channels: int, out_channels: int) -> BaseGate:
            return make_gate(gate, in_channels, out_channels, gate_kwargs or {}, common)

        if kind.streams:
            outputs = [convolutions(stage[-1])[-1][1].out_channels for stage in self.stages]
            self.between = nn.ModuleList(
                make(channels, channels) for channels in (self.bn1.num_features, *outputs)
            )
        for block in self.gated_blocks:
            block.add_gates(kind, make, separate_bn)
        self.threshold = threshold
        self.budget = budget
