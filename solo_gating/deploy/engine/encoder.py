"""`compile`: from a backbone or a checkpoint to a module that runs fast on a CPU."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from solo_gating_runtime.encoder import MOST_THREADS, Encoder, Engine, Kernel
from solo_gating_runtime.file import from_bytes, read_file, to_bytes, write_file
from solo_gating_runtime.library import BuildError, chosen_engine
from solo_gating_runtime.network import MOST_CONVOLUTIONS, Floats, Network

from ...checks import one_of, require, true_or_false
from ...errors import InputError
from ..calibration import calibration_images
from ..quantise import quantise
from ..report import Origin, Report, checked_labels, path_report
from .fallback import TorchEngine
from .fold import Folded, fold
from .forks import one_thread_if_forked
from .integer import IntegerEngine
from .known import paths_of
from .whole import WholeEngine

PYTORCH = "pytorch"  # instead of a kernel
DTYPES = ("float32", "bfloat16", "int8")

_UNKNOWN = (
    f"the kernel knows blocks of 2 to {MOST_CONVOLUTIONS} convolutions, 1×1 or 3×3, with gates that "
    "say how they fold"
)

Images = TypeVar("Images", Tensor, np.ndarray)


class CompiledEncoder(nn.Module):
    """One path of an encoder, as `compile` gives it.

        features = fast(images)

    Tensors give tensors, NumPy arrays give arrays. It may be called from several Python threads at
    once. It has no parameters, runs on the CPU in evaluation mode whatever `train()` and `to()` say,
    gives no gradient, and cannot be copied or pickled (`save` writes a file).

    Args:
        encoder: the same for NumPy arrays, which does the work.
        origin: what `report` compares it with; None for an encoder in float32, or from a file.

    Attributes:
        path: "gated" or "dense".
        dtype: "float32", "bfloat16" or "int8", of the convolutions' weights.
        computes: what the convolutions compute in: dtype, or "float32" on an engine that only holds
            weights in bfloat16.
        engine: what it runs on, such as "avx512" or "pytorch".
        features: F, length of the features.
        channels: for each gate, how many it chooses from.
    """

    def __init__(self, encoder: Encoder, origin: Origin | None = None):
        super().__init__()
        self._encoder, self._origin = encoder, origin
        self.path, self.dtype, self.engine = encoder.path, encoder.dtype, encoder.engine
        self.features, self.channels = encoder.features, encoder.channels
        self.computes = encoder.computes

    @property
    def threads(self) -> int:
        """Used at most; may be set. In a forked process it is one."""
        return self._encoder.threads

    @threads.setter
    def threads(self, value: int) -> None:
        self._encoder.threads = value

    @property
    def threshold(self) -> float:
        """Of the gates' logits, as `TwoPathResNet.threshold`; it may be set at no cost."""
        return self._encoder.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._encoder.threshold = value

    @property
    def budget(self) -> float | None:
        """That the gates are told, as `TwoPathResNet.budget`; it may be set at no cost."""
        return self._encoder.budget

    @budget.setter
    def budget(self, value: float) -> None:
        self._encoder.budget = value

    def forward(self, images: Images) -> Images:
        """B × C × H × W float32 → features B × F.

        Raises:
            InputError: for images of another kind.
        """
        return _like(images, self._encoder(self._checked(images)))[0]

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
        features, masks = self._encoder.features_and_masks(self._checked(images))
        return _like(images, features)[0], _like(images, *masks)

    def feature_maps(self, images: Images) -> tuple[Images, ...]:
        """The outputs of the four stages, C2 to C5, for detection and segmentation.

        Args:
            images: B × C × H × W, float32.

        Returns:
            For each stage B × C × H × W, float32.

        Raises:
            InputError: for images of another kind.
        """
        return _like(images, *self._encoder.feature_maps(self._checked(images)))

    def report(self, images: Images, labels: Sequence[int] | Tensor | None = None) -> Report:
        """What rounding to int8 or bfloat16 did, compared with the encoder in float32.

            print(fast.report(images, labels))

        Of both paths, if the backbone has two: the other one is rounded in the same way, and is at its
        own threshold and budget. Shares of decisions that changed, errors of features, and with labels
        1-NN accuracies (`solo_gating.deploy.report.PathReport`).

        Args:
            images: N × C × H × W, float32; others than those of the calibration.
            labels: N integers, negative where there is none. Each image then has the label of its
                nearest neighbour among all others.

        Raises:
            InputError: for images of another kind, some with NaN or infinity, or an encoder without an
                origin to be compared with.
        """
        if self._origin is None:
            why = (
                "is in float32" if self.dtype == "float32" else "comes from a file or has own gates"
            )
            raise InputError(
                f"report: the encoder {why}; expected one that was compiled with dtype=int8 or bfloat16"
            )
        batch = torch.from_numpy(np.ascontiguousarray(self._checked(images)))
        self._encoder.check_images(tuple(batch.shape), str(batch.dtype).removeprefix("torch."))
        known = checked_labels(labels, batch)
        paths = []
        for net in self._origin.networks:
            own: Any = self
            if net.path != self.path:
                rounded = self._origin.rounded(net)
                own = _compiled(Folded(rounded, (None,) * len(rounded.gates)), self.engine)
            paths.append(path_report(net, own, batch, known))
        return Report(self.dtype, len(batch), self._origin.calibration_images, tuple(paths))

    def save(self, file: str | Path) -> None:
        """Write an .sgx file for `deploy.load`, or for `solo_gating_runtime.load` without PyTorch.

        It holds weights, gates, threshold and budget as they are now; docs/guide/sgx.md describes it.

        Raises:
            InputError: if it cannot be written, or for an encoder that only PyTorch can run.
        """
        write_file(file, self.to_bytes())

    def to_bytes(self) -> bytes:
        """What `save` writes.

        Raises:
            InputError: for an encoder that only PyTorch can run.
        """
        engine = self._encoder.backend
        if isinstance(engine, (TorchEngine, WholeEngine)) and not engine.is_compilable:
            raise InputError(f"encoder: got one that only PyTorch can run, {_UNKNOWN}")
        return self._encoder.to_bytes()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a CompiledEncoder cannot be copied or pickled; compile the backbone again instead"
        )

    def extra_repr(self) -> str:
        """What `print` says."""
        number = None if self._origin is None else self._origin.calibration_images
        calibrated = "" if number is None else f", calibrated on {number} images"
        return self._encoder.description() + calibrated

    def _checked(self, images: Any) -> Floats:
        if not isinstance(images, (Tensor, np.ndarray)):
            raise InputError(
                f"images: got {type(images).__name__}, expected tensors and NumPy arrays"
            )
        if isinstance(images, np.ndarray):
            return images
        if images.is_nested or images.layout is not torch.strided:
            raise InputError("images: got a sparse or nested tensor, expected dense ones")
        self._encoder.check_images(tuple(images.shape), str(images.dtype).removeprefix("torch."))
        return _plain(images).numpy()


def _like(images: Any, *arrays: Any) -> Any:
    """Arrays as tensors if images are."""
    return arrays if isinstance(images, np.ndarray) else tuple(map(torch.from_numpy, arrays))


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


def compile(
    source: nn.Module | str | Path,
    path: str = "gated",
    *,
    threshold: float | None = None,
    budget: float | None = None,
    dtype: str = "float32",
    calibration: Any = None,
    float_stem: bool = False,
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
        dtype: "float32"; "bfloat16" to hold the convolutions' weights and maps in bfloat16 and to sum in
            float32, twice as fast on a CPU that has instructions for it (on others weights are held in
            half of the memory, and all else is float32: `CompiledEncoder.computes` says which); or "int8"
            to compute in 8-bit integers, much faster. Gates stay in float32. The last two change results
            (docs/results/inference_speed.md and docs/results/int8_accuracy.md say how much,
            `CompiledEncoder.report` for any encoder).
        calibration: for dtype="int8", some 256 images without labels, to find the range of each map (more
            are not used): a tensor or an array, N × C × H × W, float32, normalised as in training. Of a
            checkpoint also a folder of images, or a list of `key=value` as main_knn takes them,
            `["data.train_path=..."]`, whose training images are taken; `[]` for those of pre-training.
        float_stem: for dtype="int8", whether the first convolution stays in float32.
        engine: an instruction set (a key of `solo_gating_runtime.library.ENGINES[dtype]`, such as
            "avx512") or "pytorch"; None for what the environment's SOLO_GATING_ISA says, or the best that this CPU has.

    Raises:
        InputError: for a source without that path or of another kind, or values not accepted.
    """
    one_of("dtype", dtype, DTYPES)
    true_or_false("float_stem", float_stem)
    if dtype != "int8" and (calibration is not None or float_stem):
        key = "float_stem" if calibration is None else "calibration"
        raise InputError(f"{key}: got one for dtype={dtype}, expected with dtype=int8")
    if dtype == "int8" and calibration is None:
        raise InputError(
            "calibration: missing, dtype=int8 needs some 256 images to find the range of each map"
        )
    backbone = source if isinstance(source, nn.Module) else _backbone(source, path)
    engine = chosen_engine(engine, dtype, also=(PYTORCH,))
    with one_thread_if_forked():
        folded = fold(backbone, path, threshold, budget)
        if dtype == "float32":
            return _compiled(folded, engine)
        if folded.whole is not None:
            kind = folded.whole.gates[0].kind
            raise InputError(
                f"dtype: got {dtype} for gates of kind {kind!r}, which only PyTorch runs; expected "
                "float32"
            )
        rounded, number = _bfloat16, None
        if dtype == "int8":
            if any(folded.modules):
                raise InputError("dtype: got int8 for gates that do not say how they fold")
            checkpoint = None if isinstance(source, nn.Module) else Path(source)
            stem = folded.network.stem.weight
            images = calibration_images(
                calibration, checkpoint, stem.shape[1], folded.network.smallest_image
            )
            rounded, number = partial(quantise, images=images, float_stem=float_stem), len(images)
        made = _compiled(replace(folded, network=rounded(folded.network)), engine)
        if not any(folded.modules):
            both = [folded if one == path else fold(backbone, one) for one in paths_of(backbone)]
            # A gated path that only PyTorch runs has no network to compare with.
            networks = tuple(
                one.network for one in both if one.whole is None and not any(one.modules)
            )
            made._origin = Origin(networks, rounded, number)
        return made


def _bfloat16(net: Network) -> Network:
    return replace(net, bfloat16=True)


def load(file: str | Path, engine: str | None = None) -> CompiledEncoder:
    """Read an encoder that `CompiledEncoder.save` wrote.

    `solo_gating_runtime.load` does the same without PyTorch.

    Args:
        file: an .sgx file.
        engine: as in `compile`.

    Raises:
        InputError: if the file cannot be read, or is damaged, of another kind or of another version,
            or for an engine that this CPU does not have.
    """
    content = read_file(file)
    net = from_bytes(content, str(file))
    name = chosen_engine(engine, net.dtype, also=(PYTORCH,))
    with one_thread_if_forked():
        return _compiled(Folded(net, (None,) * len(net.gates)), name, content, str(file))


def _backbone(checkpoint: str | Path, path: str) -> nn.Module:
    # Only here: whoever compiles a module needs nothing of solo-learn.
    from ...checkpoints.encoder import encoder_of

    require("source", checkpoint, lambda v: isinstance(v, (str, Path)), "a module or a checkpoint")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # else the checkpoint's weights would be rounded
    try:
        with torch.device("cpu"), one_thread_if_forked():
            encoder = encoder_of(checkpoint, key="source")
            encoder.warn_of_statistics(path)
            return encoder.backbone
    finally:
        torch.set_default_dtype(dtype)


def _compiled(
    folded: Folded, name: str, content: bytes | None = None, file: str = "network"
) -> CompiledEncoder:
    """The module that runs a network on an engine, or on PyTorch where the kernel cannot be had.

    Args:
        folded: the network.
        name: of the engine.
        content: the network as a file's bytes, if they are there.
        file: where it comes from, for messages.
    """
    net = folded.network
    threads = min(torch.get_num_threads(), MOST_THREADS)
    if name != PYTORCH:
        try:
            if not folded.is_compilable:
                raise BuildError(_UNKNOWN)
            kernel = Kernel(net, content or to_bytes(net), name, file)
            return CompiledEncoder(Encoder(net, kernel, kernel.engine, threads))
        except BuildError as error:
            warnings.warn(
                f"solo-gating runs on PyTorch instead of its own kernel, more slowly: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
    if content is not None:  # PyTorch wants arrays that may be written to
        folded = replace(folded, network=from_bytes(bytearray(content), file))
    backend: Engine = TorchEngine(folded)
    if folded.whole is not None:
        backend = WholeEngine(net, folded.whole)
    elif net.dtype == "int8":
        backend = IntegerEngine(folded.network)
    return CompiledEncoder(Encoder(net, backend, PYTORCH, threads))
