"""Runs an encoder on NumPy arrays."""

import ctypes
import os
import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .checks import checked_budget, checked_threshold, is_int, require
from .errors import InputError
from .file import from_bytes, read_file, to_bytes, write_file
from .forks import is_forked
from .library import TOO_LARGE, chosen_engine, computes, load_first
from .network import Floats, Network

# OpenMP ends the process when it cannot start so many threads as it is told.
MOST_THREADS = max(256, os.cpu_count() or 1)

_MESSAGE_SIZE = 1000


@dataclass(frozen=True)
class Decisions:
    """What gates go by at a setting of the dial, for all channels, one gate after another.

    Attributes:
        thresholds: of each channel's logit before it is shifted.
        counts: int64, for each gate how many channels it chooses; -1 for those that reach the
            threshold.
        budget: that the gates are told; None for gates that are told none.
    """

    thresholds: Floats
    counts: NDArray[np.int64]
    budget: float | None

    @cached_property
    def addresses(self) -> tuple[int, int]:
        """Where thresholds and counts begin, for C++."""
        return _address(self.thresholds), _address(self.counts)


@dataclass(frozen=True)
class Results:
    """What an engine computes.

    Attributes:
        features: B × F.
        masks: B × channels of all gates, bool.
        maps: the stages' outputs, B × C × H × W, if they were wanted.
    """

    features: Floats
    masks: NDArray[np.bool_]
    maps: tuple[Floats, ...] = ()

    @classmethod
    def empty(cls, net: Network, images: Floats, maps: bool) -> "Results":
        """Room for those of a batch."""
        number, _, height, width = images.shape
        shapes = net.map_shapes(height, width) if maps else []
        return cls(
            np.empty((number, net.features), np.float32),
            np.empty((number, sum(net.hidden)), np.bool_),
            tuple(np.empty((number, *shape), np.float32) for shape in shapes),
        )


class Engine(Protocol):
    """What runs a network."""

    def decide(self, threshold: float, budget: float | None) -> Decisions | None:
        """What the gates go by; None on the dense path."""

    def run(self, images: Floats, decisions: Decisions | None, threads: int, maps: bool) -> Results:
        """Results for images, B × C × H × W, with the stages' outputs or without."""


class Kernel:
    """The C++ kernel with one network's weights.

    Args:
        net: the network, of which only shapes are kept.
        content: the same as bytes of a file.
        engine: one of `library.supported_engines`.
        name: of the file, for messages.

    Attributes:
        nbytes: size of the weights.
        engine: the one that runs: another than was asked for where no compiler knows its instructions.

    Raises:
        BuildError: if the kernel cannot be had.
        InputError: if the content is damaged, or the kernel does not run such a network.
    """

    def __init__(self, net: Network, content: bytes, engine: str, name: str = "file"):
        self._library, self.engine = load_first(engine, net.dtype)
        self._net = net
        message = ctypes.create_string_buffer(_MESSAGE_SIZE)
        opened = self._library.gated_open(content, len(content), message, _MESSAGE_SIZE)
        if not opened:
            reason = message.value.decode()
            if "memory" in reason:
                raise MemoryError(reason)
            raise InputError(f"{name}: {reason}")
        self._own(opened)
        self.nbytes: int = self._library.gated_bytes(opened)

    def _own(self, opened: int) -> None:
        self._opened = opened
        self._process = os.getpid()
        weakref.finalize(self, self._library.gated_close, opened)

    def decide(self, threshold: float, budget: float | None) -> Decisions | None:
        """What the gates go by; None on the dense path.

        Args:
            threshold: of the logits, for gates that have one.
            budget: in the range; None without one.
        """
        if not self._net.gates:
            return None
        thresholds = np.empty(sum(self._net.hidden), np.float32)
        counts = np.empty(len(self._net.hidden), np.int64)
        told = float("nan") if budget is None else budget
        decide = self._library.gated_decide
        if decide(self._opened, threshold, told, _address(thresholds), _address(counts)):
            raise MemoryError("there is not enough memory for the gates' decisions")
        return Decisions(thresholds, counts, budget)

    def run(
        self, images: Floats, decisions: Decisions | None, threads: int, maps: bool = False
    ) -> Results:
        """As in `Engine`.

        Args:
            images: B × C × H × W, float32, contiguous.
            decisions: of `decide`.
            threads: to use at most.
            maps: whether the stages' outputs are wanted.

        Raises:
            MemoryError: if there is not enough.
            InputError: for images of more pixels than the kernel can number.
        """
        number, _, height, width = images.shape
        results = Results.empty(self._net, images, maps)
        if number == 0:
            return results
        if os.getpid() != self._process:
            # Another thread may have been using it when this process was forked.
            self._own(self._library.gated_share(self._opened))
        thresholds, counts = (None, None) if decisions is None else decisions.addresses
        places = None
        if maps:
            places = (ctypes.c_void_p * len(results.maps))(*map(_address, results.maps))
        failed = self._library.gated_run(
            self._opened,
            _address(images),
            *(number, height, width),
            *(thresholds, counts),
            *(_address(results.features), _address(results.masks), places),
            1 if is_forked() else threads,
        )
        if failed == TOO_LARGE:
            raise InputError(f"images: got {height} × {width} pixels, expected fewer")
        if failed:
            raise MemoryError(f"there is not enough memory for images of {height} × {width} pixels")
        return results


_DTYPES = (np.float32, np.int64, np.bool_)


def _address(numbers: NDArray[Any]) -> int:
    """Where an array begins, for C++ that relies on its dtype and its order."""
    if numbers.dtype not in _DTYPES or not numbers.flags.carray:
        raise ValueError(f"got {numbers.dtype}, {numbers.flags}, expected numbers in a row")
    return int(numbers.__array_interface__["data"][0])


class Encoder:
    """One path of an encoder, as `load` gives it.

        features = encoder(images)

    It may be called from several Python threads at once.

    Args:
        net: the network.
        engine: that runs it.
        name: of the engine.
        threads: None for as many as this process has CPUs.

    Attributes:
        path: "gated" or "dense".
        dtype: of the convolutions' weights: "float32", "bfloat16" or "int8".
        computes: what the convolutions compute in: dtype, or "float32" on an engine that only holds
            weights in bfloat16.
        engine: what it runs on, such as "avx512".
        backend: the object that does so.
        features: F, length of the features.
        channels: for each gate, or where it would be, how many it chooses from.
        threads: used at most; may be set. In a forked process it is one.
    """

    def __init__(self, net: Network, engine: Engine, name: str, threads: int | None = None):
        self.path, self.dtype, self.engine = net.path, net.dtype, name
        self.computes = computes(name, net.dtype)
        self.features, self.channels = net.features, net.hidden
        self.threads = _cpus() if threads is None else threads
        self._net, self.backend = net, engine
        self._image_channels = net.stem.weight.shape[1]
        self._budget = None if net.budget is None else self._checked_budget(net.budget)
        self.threshold = net.threshold

    @property
    def threshold(self) -> float:
        """Of the gates' logits; it may be set at no cost, for gates whose dial it is.

        A channel is computed if its logit reaches it: a higher one means fewer channels.
        """
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
        """That the gates are told; it may be set at no cost. None for gates that are told none."""
        return self._budget

    @budget.setter
    def budget(self, value: float) -> None:
        self._budget = self._checked_budget(value)
        self._turn()

    def _checked_budget(self, value: float) -> float:
        return checked_budget(value, self._net.budget_range)

    def _turn(self) -> None:
        # New ones: a call in another thread goes on with those that it has.
        self._decisions = self.backend.decide(self.threshold, self.budget)

    def __call__(self, images: Floats) -> Floats:
        """B × C × H × W float32, normalised as in training → features B × F.

        Raises:
            InputError: for images of another kind.
        """
        return self._run(images).features

    def features_and_masks(self, images: Floats) -> tuple[Floats, tuple[NDArray[np.bool_], ...]]:
        """Features, and which channels were computed.

        Args:
            images: B × C × H × W, float32.

        Returns:
            Features, B × F, and for each gate a mask, B × channels, bool; all of them true on the
            dense path.

        Raises:
            InputError: for images of another kind.
        """
        results = self._run(images)
        masks = np.split(results.masks, np.cumsum(self.channels)[:-1], axis=1)
        return results.features, tuple(masks)

    def feature_maps(self, images: Floats) -> tuple[Floats, ...]:
        """The outputs of the stages (C2 to C5 of a ResNet), for detection and segmentation.

        Args:
            images: B × C × H × W, float32.

        Returns:
            For each stage B × C × H × W, float32.

        Raises:
            InputError: for images of another kind.
        """
        return self._run(images, maps=True).maps

    def save(self, file: str | Path) -> None:
        """Write an .sgx file that `load` reads, with threshold and budget as they are now.

        Raises:
            InputError: if it cannot be written.
        """
        write_file(file, self.to_bytes())

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        return to_bytes(replace(self._net, threshold=self.threshold, budget=self.budget))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.description()})"

    def description(self) -> str:
        """Its settings in one line."""
        stored = "" if self.computes == self.dtype else f" (stored; computes in {self.computes})"
        return (
            f"path={self.path}, dtype={self.dtype}{stored}, engine={self.engine}, "
            f"threads={self.threads}, "
            f"threshold={self.threshold}" + (f", budget={self.budget}" if self.budget else "")
        )

    def __reduce__(self) -> Any:
        raise TypeError("an Encoder cannot be copied or pickled; load its file again instead")

    def check_images(self, shape: tuple[int, ...], dtype: str) -> None:
        """Refuse images of another shape or dtype.

        Raises:
            InputError: naming what was found and what is accepted.
        """
        smallest = self._net.smallest_image
        if len(shape) != 4 or shape[1] != self._image_channels or min(shape[2:]) < smallest:
            least = f" of at least {smallest} pixels" if smallest > 1 else ""
            raise InputError(
                f"images: got the shape {shape}, expected B × {self._image_channels} × H × W{least}"
            )
        if dtype != "float32":
            raise InputError(f"images: got {dtype}, expected float32, normalised as in training")

    def _run(self, images: Any, maps: bool = False) -> Results:
        require("threads", self.threads, _is_threads, f"an integer from 1 to {MOST_THREADS}")
        if not isinstance(images, np.ndarray):
            raise InputError(f"images: got {type(images).__name__}, expected NumPy arrays")
        # Naming a dtype takes as long as all other checks.
        dtype = "float32" if images.dtype == np.float32 else str(images.dtype)
        self.check_images(images.shape, dtype)
        batch = images
        if not (type(images) is np.ndarray and images.flags.carray):
            batch = np.require(images, requirements=["C", "ALIGNED", "WRITEABLE", "ENSUREARRAY"])
        return self.backend.run(batch, self._decisions, int(self.threads), maps)


def _is_threads(value: Any) -> bool:
    return is_int(value, 1) and value <= MOST_THREADS


def _cpus() -> int:
    """That this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MOST_THREADS)
    return os.cpu_count() or 1


def load(file: str | Path, engine: str | None = None) -> Encoder:
    """Read an encoder that was saved as an .sgx file.

    The kernel is built with the system's C++ compiler at first use (some ten seconds) and kept in
    $SOLO_GATING_CACHE, by default `~/.cache/solo-gating`.

    Args:
        file: that `save` wrote.
        engine: an instruction set (`library.ENGINES`); None for what the environment's
            SOLO_GATING_ISA says, or the best that this CPU has.

    Raises:
        InputError: if the file cannot be read, or is damaged, of another kind or of another version,
            or for an engine that this CPU does not have.
        BuildError: without a C++ compiler, or a cache folder.
    """
    content = read_file(file)
    net = from_bytes(content, str(file), sealed=False)  # the kernel compares the checksum
    name = chosen_engine(engine, net.dtype)
    kernel = Kernel(net, content, name, str(file))
    return Encoder(net, kernel, kernel.engine)
