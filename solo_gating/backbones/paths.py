"""Which path a forward pass takes: chosen for a scope, and known again when it is recomputed."""

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import InputError

PATHS = ("gated", "dense")


def checked_path(path: Any, key: str) -> str:
    """The path itself if it is one.

    Raises:
        InputError: naming `key`, for anything but "gated" or "dense".
    """
    if not isinstance(path, str) or path not in PATHS:
        raise InputError(f"{key}: got {path!r}, expected {PATHS}")
    return path


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass did: its path, input size (height, width), features and decisions.

    Attributes:
        features: B × C.
        masks: a B × C_out tensor of zeros and ones for each gate, or the shares of a
            `ConvolutionGate`; empty on the dense path.
        penalty: what the gates add to training's loss, a number; None for nothing.
    """

    path: str
    resolution: tuple[int, int]
    features: Tensor
    masks: tuple[Tensor, ...] = ()
    penalty: Tensor | None = None


class Choice:
    """What was chosen for a forward pass, handed from the backbone to its layers and blocks.

    They get it as an argument, so that a layer or block that is recomputed (activation
    checkpointing) does again what it did. (No dataclass: wrappers would copy one, and lose masks.)

    Attributes:
        path: "gated" or "dense".
        budget: what the gates are told: a number or one for each image, B; None for their own.
        view: the number of the step's view, from 0, for gates that tell views apart.
        masks: where gated blocks put their masks, in order.
        penalties: where gated blocks put what their gates add to training's loss.
    """

    def __init__(self, path: str, budget: Tensor | None = None, view: int = 0):
        self.path = path
        self.budget = budget
        self.view = view
        self.masks: list[Tensor] = []
        self.penalties: list[Tensor] = []

    @property
    def penalty(self) -> Tensor | None:
        """All penalties together; None without any."""
        return torch.stack(self.penalties).sum() if self.penalties else None


@dataclass(frozen=True)
class Scope:
    """An open scope of `TwoPathResNet.path`.

    Attributes:
        owner: the backbone that it was opened for.
        paths: those of successive passes, with the number of each one's view.
        passes: where they are noted.
        budget: what the gates are told; None for the backbone's budget.
    """

    owner: Any
    paths: Iterator[tuple[int, str]]
    passes: deque[ForwardPass]
    budget: Tensor | None


# Each thread, and each asynchronous task, has scopes of its own.
_SCOPES: ContextVar[tuple[Scope, ...]] = ContextVar("solo_gating_scopes", default=())


def scope_of(backbone: Any) -> Scope | None:
    """The innermost open scope of a backbone; None outside of every scope."""
    for scope in reversed(_SCOPES.get()):
        if scope.owner is backbone:
            return scope
    return None


@contextmanager
def open_scope(
    backbone: Any, paths: list[str], budget: Tensor | None, view: int = 0
) -> Iterator[deque[ForwardPass]]:
    """Open a scope of a backbone; yields the latest passes, as many as there are paths."""
    views = itertools.cycle(enumerate(paths, view))
    scope = Scope(backbone, views, deque(maxlen=len(paths)), budget)
    outer = _SCOPES.get()
    _SCOPES.set((*outer, scope))
    try:
        yield scope.passes
    finally:
        _SCOPES.set(outer)


def refuse_in_scope(block: Any) -> None:
    """Refuse a block that is called by itself while a scope of its backbone is open.

    Raises:
        RuntimeError: which path it should take then would be a guess.
    """
    for scope in _SCOPES.get():
        if any(block is one for one in scope.owner.modules()):
            raise RuntimeError(
                "a block was called by itself while a scope of its backbone's `path` is open; call "
                'the backbone, or set backbone.path = "gated" outside of the scope'
            )


def in_backward() -> bool:
    """Whether a backward pass is running in this thread: a forward pass is then a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def being_traced(x: Any) -> bool:
    """Whether a compiler or a tracer is looking on, in place of whom the step runs as ever."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)


class Remembered:
    """What was chosen for images that still exist, for backbones that are checkpointed as a whole.

    `torch.utils.checkpoint.checkpoint(backbone, images)` runs the backbone again in the backward
    pass, mostly outside of the scope, or with the scope at another view. The images are then the
    same memory.
    """

    def __init__(self) -> None:
        self._choices: dict[tuple[Any, ...], tuple[str, Tensor | None, int] | None] = {}

    def note(self, images: Tensor, path: str, budget: Tensor | None, view: int) -> None:
        """Remember a pass; two that differ for the same images leave no answer."""
        key = _place(images)
        kept = {k: v for k, v in self._choices.items() if not k[0].expired()}
        before = kept.get(key, (path, budget, view))
        same = before is not None and before[::2] == (path, view) and before[1] is budget
        kept[key] = (path, budget, view) if same else None
        self._choices = kept

    def recall(self, images: Tensor) -> tuple[str, Tensor | None, int]:
        """The path of a pass, its budget and its view.

        Raises:
            RuntimeError: if the images are not known, or went several ways.
        """
        chosen = self._choices.get(_place(images))
        if chosen is None:
            raise RuntimeError(
                "activation checkpointing of a whole backbone: it is not known which path these "
                "images took, because they took several or were copied since; checkpoint the "
                "backbone's stages or blocks instead, or give each pass images.clone()"
            )
        return chosen

    def __deepcopy__(self, memo: Any) -> "Remembered":
        return Remembered()

    def __reduce__(self) -> Any:
        return Remembered, ()


def _place(images: Tensor) -> tuple[Any, ...]:
    # A weak reference keeps the storage's address from being used for another one.
    storage = StorageWeakRef(images.untyped_storage())
    return storage, images.storage_offset(), tuple(images.shape)
