"""`compile`: from a backbone or a checkpoint to a module that runs fast on a CPU."""

import ctypes
import os
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from solo_gating_runtime.forks import is_forked
from solo_gating_runtime.library import TOO_LARGE, BuildError, chosen_engine, load_library
from solo_gating_runtime.network import MOST_CONVOLUTIONS, Floats, Network

from ...budgets import checked_budget
from ...checks import checked_threshold, is_int, one_of, require
from ...errors import InputError
from .fallback import Decisions, TorchEngine, decide
from .fold import Folded, fold
from .forks import one_thread_if_forked
from .pack import PackedNetwork, Shapes

PYTORCH = "pytorch"  # instead of a kernel
DTYPES = ("float32", "bfloat16")

# OpenMP ends the process when it cannot start so many threads as it is told.
MOST_THREADS = max(256, os.cpu_count() or 1)

_UNKNOWN = (
    f"the kernel knows blocks of 2 to {MOST_CONVOLUTIONS} convolutions, 1×1 or 3×3, with gates that "
    "say how they fold"
)

Images = TypeVar("Images", Tensor, np.ndarray)


class KernelEngine:
    """The C++ kernel with one network's weights.

    Args:
        net: the network.
        engine: one of `library.supported_engines`.

    Attributes:
        nbytes: size of the weights.

    Raises:
        BuildError: if the kernel cannot be had.
    """

    def __init__(self, net: Network, engine: str):
        self._net = net
        self._library = load_library(engine, net.dtype)
        library = self._library
        shapes = Shapes(
            lanes=library.gated_lanes(),
            group=library.gated_group(),
            block=library.gated_block(),
            plane_group=library.gated_plane_group(),
        )
        self._weights = PackedNetwork(net, shapes)
        self._features, self._channels = net.features, sum(net.hidden)
        self._gates = len(net.hidden)
        self._open()
        self.nbytes = self._weights.nbytes

    def _open(self) -> None:
        self._engine = self._library.gated_open(ctypes.byref(self._weights.structure))
        if not self._engine:
            raise MemoryError("there is not enough memory for the network")
        weakref.finalize(self, self._library.gated_close, self._engine)
        self._process = os.getpid()

    def decide(self, threshold: float, budget: float | None) -> Decisions | None:
        """What the gates go by; None on the dense path."""
        return decide(self._net, threshold, budget)

    def run(
        self, images: Floats, decisions: Decisions | None, threads: int
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Features and masks of some images.

        Args:
            images: B × C × H × W, float32, contiguous.
            decisions: what the gates go by; None to compute all channels.
            threads: to use at most.

        Returns:
            Features, B × F float32, and masks, B × channels of all blocks, bool.

        Raises:
            MemoryError: if there is not enough.
            InputError: for images of more pixels than the kernel can number.
        """
        number, _, height, width = images.shape
        features = np.empty((number, self._features), np.float32)
        masks = np.empty((number, self._channels), np.bool_)
        if number == 0:
            return features, masks
        if os.getpid() != self._process:
            self._open()  # another thread may have been using it when this process was forked
        thresholds = counts = None
        if decisions is not None:
            thresholds = _address(decisions.thresholds, np.float32, self._channels)
            counts = _address(decisions.counts, np.int64, self._gates)
        failed = self._library.gated_run(
            self._engine,
            _address(images, np.float32, images.size),
            *(number, height, width),
            *(thresholds, counts),
            _address(features, np.float32, number * self._features),
            _address(masks, np.bool_, number * self._channels),
            1 if is_forked() else threads,
        )
        if failed == TOO_LARGE:
            raise InputError(f"images: got {height} × {width} pixels, expected fewer")
        if failed:
            raise MemoryError(f"there is not enough memory for images of {height} × {width} pixels")
        return features, masks


def _address(numbers: NDArray[Any], dtype: Any, size: int) -> int:
    """Where an array begins, for C++ that relies on its dtype and size."""
    if numbers.dtype != dtype or numbers.size != size or not numbers.flags.carray:
        raise ValueError(f"got {numbers!r}, expected {size} numbers, {dtype}, in memory")
    return numbers.ctypes.data


class CompiledEncoder(nn.Module):
    """One path of an encoder, as `compile` gives it.

        features = fast(images)

    Tensors give tensors, NumPy arrays give arrays. It may be called from several Python threads at
    once. It has no parameters, runs on the CPU in evaluation mode whatever `train()` and `to()` say,
    gives no gradient, and cannot be copied or pickled.

    Attributes:
        path: "gated" or "dense".
        dtype: "float32" or "bfloat16", of the convolutions' weights.
        engine: what it runs on: "avx512", "avx2", "portable" or "pytorch".
        features: F, length of the features.
        channels: for each gate, how many it chooses from.
        threads: used at most; may be set. In a forked process it is one.
    """

    def __init__(self, folded: Folded, engine: str):
        super().__init__()
        net = folded.network
        self.path, self.dtype = net.path, net.dtype
        self.engine, self._engine = _engine(folded, engine)
        self.features, self.channels = net.features, net.hidden
        self._in_channels = net.stem.weight.shape[1]
        self._smallest = net.smallest_image
        self.threads = min(torch.get_num_threads(), MOST_THREADS)
        self._net = net
        self._budget = None if net.budget is None else self._checked_budget(net.budget)
        self.threshold = net.threshold

    @property
    def threshold(self) -> float:
        """Of the gates' logits, as `TwoPathResNet.threshold`; it may be set at no cost."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        threshold = checked_threshold(value)
        if threshold and self._net.dial != "threshold":
            raise InputError(f"threshold: got {value}, these gates decide without one; expected 0")
        self._threshold = threshold
        self._turn()

    @property
    def budget(self) -> float | None:
        """That the gates are told, as `TwoPathResNet.budget`; it may be set at no cost."""
        return self._budget

    @budget.setter
    def budget(self, value: float) -> None:
        self._budget = self._checked_budget(value)
        self._turn()

    def _checked_budget(self, value: float) -> float:
        return checked_budget(value, self._net.budget_range)

    def _turn(self) -> None:
        with one_thread_if_forked():
            # New ones: a call in another thread goes on with those that it has.
            self._decisions = self._engine.decide(self.threshold, self.budget)

    def forward(self, images: Images) -> Images:
        """B × C × H × W float32 → features B × F.

        Raises:
            InputError: for images of another kind.
        """
        return self.features_and_masks(images)[0]

    def features_and_masks(self, images: Images) -> tuple[Images, tuple[Images, ...]]:
        """Features, and which channels were computed.

        Args:
            images: B × C × H × W, float32.

        Returns:
            Features, B × F, and for each gate a mask, B × channels, bool; all of them true on the
            dense path.

        Raises:
            InputError: for images of another kind.
        """
        require("threads", self.threads, _is_threads, f"an integer from 1 to {MOST_THREADS}")
        batch = self._checked(images)
        features, masks = self._engine.run(batch, self._decisions, int(self.threads))
        parts: Any = np.split(masks, np.cumsum(self.channels)[:-1], axis=1)
        if isinstance(images, np.ndarray):
            return features, tuple(parts)
        result: Any = torch.from_numpy(features), tuple(map(torch.from_numpy, parts))
        return result

    def __reduce__(self) -> Any:
        raise TypeError(
            "a CompiledEncoder cannot be copied or pickled; compile the backbone again instead"
        )

    def extra_repr(self) -> str:
        """What `print` says."""
        return (
            f"path={self.path}, dtype={self.dtype}, engine={self.engine}, threads={self.threads}, "
            f"threshold={self.threshold}" + (f", budget={self.budget}" if self.budget else "")
        )

    def _checked(self, images: Any) -> Floats:
        if not isinstance(images, (Tensor, np.ndarray)):
            raise InputError(
                f"images: got {type(images).__name__}, expected tensors and NumPy arrays"
            )
        if isinstance(images, Tensor) and (images.is_nested or images.layout is not torch.strided):
            raise InputError("images: got a sparse or nested tensor, expected dense ones")
        shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
        if len(shape) != 4 or shape[1] != self._in_channels or min(shape[2:]) < self._smallest:
            least = f" of at least {self._smallest} pixels" if self._smallest > 1 else ""
            raise InputError(
                f"images: got the shape {shape}, expected B × {self._in_channels} × H × W{least}"
            )
        if dtype != "float32":
            raise InputError(f"images: got {dtype}, expected float32, normalised as in training")
        if isinstance(images, Tensor):
            return _plain(images).numpy()
        return np.require(images, requirements=["C", "ALIGNED", "WRITEABLE"])


def _plain(images: Tensor) -> Tensor:
    """The tensor itself if it is contiguous, without what PyTorch knows about it."""
    if not images.is_cpu:
        raise InputError(f"images: got the device {images.device}, expected cpu")
    if images.requires_grad and torch.is_grad_enabled():
        warnings.warn(
            "images: they require a gradient, and a compiled encoder gives none",
            RuntimeWarning,
            stacklevel=4,
        )
    images = images.detach()
    try:
        plain = images if type(images) is Tensor else torch.from_numpy(images.numpy())
        plain = plain.resolve_neg().contiguous()
        plain.data_ptr()
    except (RuntimeError, TypeError) as error:  # traced, mapped, ...
        raise InputError(
            f"images: got a {type(images).__name__} without memory of its own "
            f"({str(error).splitlines()[0]}), expected plain tensors"
        ) from error
    return plain


def _is_threads(value: Any) -> bool:
    return is_int(value, 1) and value <= MOST_THREADS


def compile(
    source: nn.Module | str | Path,
    path: str = "gated",
    *,
    threshold: float | None = None,
    budget: float | None = None,
    dtype: str = "float32",
    engine: str | None = None,
) -> CompiledEncoder:
    """Make one path of an encoder fast on this CPU.

        fast = solo_gating.deploy.compile("trained_models/.../last.ckpt")
        features = fast(images)

    BatchNorms are folded into the convolutions, and each image's own channels are computed, and no
    others. In float32 features are those of the backbone in evaluation mode up to rounding (1e-5 of
    the largest), and masks are the same except where a gate's logit is within rounding of the
    threshold. Results depend neither on how images are batched nor on the number of threads.

    The kernel is built with the system's C++ compiler at first use (some ten seconds) and kept in
    $SOLO_GATING_CACHE, by default `~/.cache/solo-gating`. Where that fails there is one warning,
    and PyTorch computes the same, more slowly.

    Args:
        source: a backbone (one of this package's, a sliced one of `main_export`, or torchvision's
            resnet18, 34, 50 or 101), or a checkpoint with its `args.json` beside it. Its weights are copied:
            later changes to it have no effect.
        path: "gated" or "dense".
        threshold: of the gates; None for the backbone's own.
        budget: that the gates are told, of a network trained for a range; None for the backbone's own.
        dtype: "float32", or "bfloat16" to hold the convolutions' weights in half of the memory.
            Sums and activations stay float32, but results change (docs/results/inference_speed.md says how much).
        engine: "avx512", "avx2", "portable" or "pytorch"; None for what the environment's
            SOLO_GATING_ISA says, or the best that this CPU has.

    Raises:
        InputError: for a source without that path or of another kind, or values not accepted.
    """
    one_of("dtype", dtype, DTYPES)
    backbone = source if isinstance(source, nn.Module) else _backbone(source)
    engine = chosen_engine(engine, dtype, also=(PYTORCH,))
    with one_thread_if_forked():
        folded = fold(backbone, path, threshold, budget)
        network = replace(folded.network, bfloat16=dtype == "bfloat16")
        return CompiledEncoder(replace(folded, network=network), engine)


def _backbone(checkpoint: str | Path) -> nn.Module:
    # Only here: whoever compiles a module needs nothing of solo-learn.
    from ...checkpoints.encoder import encoder_of

    require("source", checkpoint, lambda v: isinstance(v, (str, Path)), "a module or a checkpoint")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # else the checkpoint's weights would be rounded
    try:
        with torch.device("cpu"), one_thread_if_forked():
            return encoder_of(checkpoint, key="source").backbone
    finally:
        torch.set_default_dtype(dtype)


def _engine(folded: Folded, name: str) -> tuple[str, KernelEngine | TorchEngine]:
    if name != PYTORCH:
        try:
            if not folded.is_compilable:
                raise BuildError(_UNKNOWN)
            return name, KernelEngine(folded.network, name)
        except BuildError as error:
            warnings.warn(
                f"solo-gating runs on PyTorch instead of its own kernel, more slowly: {error}",
                RuntimeWarning,
                stacklevel=4,
            )
    return PYTORCH, TorchEngine(folded)
