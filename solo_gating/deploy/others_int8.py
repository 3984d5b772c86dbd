"""Int8 for runtimes that are not ours, by post-training quantisation with the quantisers made for them.

Weights get a scale for each output channel, activations one for each map, from what images make of
them. Gates stay in float32, so that rounding decides as little as possible.
"""

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..gates import Gate
from .onnx import contiguous, to_openvino

# That NNCF has been told to send no statistics of its use to its makers.
_SILENT = {"NNCF_CI": "1"}


def gates_of(net: nn.Module) -> frozenset[str]:
    """The names of a network's gates, which quantisation leaves alone."""
    return frozenset(name for name, module in net.named_modules() if isinstance(module, Gate))


def onnx_int8(model: bytes, images: Tensor, apart: frozenset[str] = frozenset()) -> bytes:
    """An ONNX model quantised by ONNX Runtime: QuantizeLinear and DequantizeLinear (QDQ).

    Args:
        model: from `onnx.to_onnx`.
        images: N × 3 × H × W, to calibrate on.
        apart: names of modules that stay in float32.

    Raises:
        InputError: if onnxruntime is missing.
    """
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization.quant_utils import add_pre_process_metadata
    except ImportError as error:
        raise InputError(
            f"format: onnx-int8 needs onnxruntime: pip install onnxruntime ({error})"
        ) from error
    import onnx

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc,no-any-unimported]
        def __init__(self) -> None:
            self._left = iter(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self._left, None)
            return None if image is None else {"images": contiguous(image)}

    network = onnx.load_from_string(model)
    # The exporter has folded the BatchNorms, and every shape is known.
    add_pre_process_metadata(network)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.onnx"
        quantization.quantize_static(
            network,
            target,
            Images(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_nodes(model, apart),
        )
        return target.read_bytes()


def openvino_int8(
    model: bytes, images: Tensor, apart: frozenset[str] = frozenset()
) -> tuple[dict[str, bytes], str]:
    """OpenVINO's `model.xml` and `model.bin` of an ONNX model, quantised by NNCF.

    Without NNCF ONNX Runtime quantises, and the result is converted: measured, that is as fast, with
    slightly larger differences to the float network.

    Args:
        model: from `onnx.to_onnx`.
        images: N × 3 × H × W, to calibrate on.
        apart: names of modules that stay in float32.

    Returns:
        The files' contents, and who quantised: "nncf" or "onnxruntime".

    Raises:
        InputError: if openvino is missing, or both of the quantisers.
    """
    try:
        import openvino
    except ImportError as error:
        raise InputError(
            f"format: openvino-int8 needs openvino: pip install openvino ({error})"
        ) from error
    with _silence():
        try:
            import nncf
        except ImportError:
            return to_openvino(onnx_int8(model, images, apart)), "onnxruntime"
        nncf.set_log_level(logging.ERROR)
        network = openvino.Core().read_model(model)
        present = {operation.get_friendly_name() for operation in network.get_ops()}
        # OpenVINO makes two operations of a convolution with a bias.
        kept = {name + end for name in _nodes(model, apart) for end in ("", "/WithoutBiases")}
        quantised = nncf.quantize(
            network,
            nncf.Dataset([contiguous(image) for image in images.split(1)]),
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=sorted(kept & present)),
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.xml"
        openvino.save_model(quantised, target, compress_to_fp16=False)
        files = (target, target.with_suffix(".bin"))
        return {file.name: file.read_bytes() for file in files}, "nncf"


def _nodes(model: bytes, apart: frozenset[str]) -> list[str]:
    """Names of the nodes that PyTorch's exporter made of the modules with these names."""
    import onnx

    found = []
    for node in onnx.load_from_string(model).graph.node:
        scopes = {prop.key: prop.value for prop in node.metadata_props}
        # As text: "['', 'layer1', 'layer1.0', 'layer1.0.gate', 'sum_1']".
        if any(f"'{name}'" in scopes.get("pkg.torch.onnx.name_scopes", "") for name in apart):
            found.append(node.name)
    return found


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """NNCF sends nothing, and prints no progress among a command's own lines."""
    before = {name: os.environ.get(name) for name in _SILENT}
    os.environ.update(_SILENT)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
