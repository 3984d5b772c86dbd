"""ONNX files of encoders, checked against PyTorch."""

import io
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import write_bytes

Runner = Callable[[Tensor], Tensor]


def to_onnx(net: nn.Module, images: Tensor) -> bytes:
    """An ONNX model with the input `images`, B × 3 × H × W, and the output `features`, B × C.

    The batch is free, height and width are those of the example; the opset is the current one of
    PyTorch's exporter.

    Args:
        net: in evaluation mode, on the CPU.
        images: an example, at least 2 images.

    Raises:
        InputError: if the packages of the extra `export` are missing.
    """
    try:
        import onnx  # noqa: F401
        from onnxscript import opset18
    except ImportError as error:
        raise InputError(
            "format: onnx needs onnx and onnxscript: pip install 'solo-gating[export]', or pip "
            f"install onnx onnxscript onnxruntime ({error})"
        ) from error

    op: Any = opset18

    def sort_stable(
        x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
    ) -> Any:
        # Of equal values TopK has those first that come first.
        size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            net,
            (images,),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            custom_translation_table={torch.ops.aten.sort.stable: sort_stable},
            verbose=False,
        )
    content = io.BytesIO()
    program.save(content)  # type: ignore[union-attr,arg-type]
    return content.getvalue()


def onnx_runner(model: bytes) -> Runner:
    """An ONNX model under ONNX Runtime: images B × 3 × H × W → features B × C.

    Args:
        model: from `to_onnx`.

    Raises:
        ImportError: if onnxruntime is missing.
    """
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": contiguous(images)})[0])

    return run


def contiguous(images: Tensor) -> np.ndarray:
    """As other runtimes take them."""
    return np.ascontiguousarray(images.numpy())


def to_openvino(model: bytes) -> dict[str, bytes]:
    """OpenVINO's `model.xml` and `model.bin` of an ONNX model.

    Args:
        model: from `to_onnx`.

    Raises:
        InputError: if openvino is missing.
    """
    try:
        import openvino
    except ImportError as error:
        raise InputError(
            f"format: openvino-via-onnx needs openvino: pip install openvino ({error})"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "model.onnx", Path(folder) / "model.xml"
        write_bytes(source, model)
        openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=False)
        return {file.name: file.read_bytes() for file in (target, target.with_suffix(".bin"))}


def openvino_runner(files: Mapping[str, bytes]) -> Runner:
    """OpenVINO's files on the CPU: images B × 3 × H × W → features B × C.

    Args:
        files: `model.xml` and `model.bin`, from `to_openvino`.
    """
    import openvino

    core: Any = openvino.Core()
    network = core.read_model(files["model.xml"], files["model.bin"])
    hint = {"INFERENCE_PRECISION_HINT": "f32"}  # for what is not int8
    compiled = core.compile_model(network, "CPU", hint)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(contiguous(images))[0].copy())

    return run
