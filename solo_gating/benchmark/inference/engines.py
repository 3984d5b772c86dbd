"""Makes the others' engines ready for a network and a batch, in each precision that they have."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...deploy.onnx import contiguous
from ...errors import InputError
from ..timing import Call, Clock, quickest
from .cases import Network
from .machine import computes_bfloat16

OURS, STATIC = "ours", "static"
DTYPES = ("float32", "bfloat16", "int8")


class UnavailableError(RuntimeError):
    """An engine cannot run here; the message says why."""


@dataclass(frozen=True)
class Conditions:
    """What engines are made ready for, besides a network.

    Attributes:
        threads: for the computation. PyTorch is told from outside, with `torch_threads`.
        clock: by which the faster one of several ways is found.
    """

    threads: int
    clock: Clock


def torch_eager(network: Network, conditions: Conditions) -> Call:
    """PyTorch as it is, in inference mode, in whichever memory format is faster for this batch."""
    calls = _in_both_formats(network.model.module, network.images)
    return calls[quickest(calls, conditions.clock)]


def torch_bfloat16(network: Network, conditions: Conditions) -> Call:
    """PyTorch in bfloat16, by autocast or with converted weights, whichever is faster.

    Raises:
        UnavailableError: if the CPU has no instructions for it, where PyTorch is many times slower.
    """
    _require_bfloat16()
    module = copy.deepcopy(network.model.module).to(torch.bfloat16)
    calls = {
        **_in_both_formats(network.model.module, network.images, autocast=True),
        **{
            f"converted, {name}": call
            for name, call in _in_both_formats(module, network.images.bfloat16()).items()
        },
    }
    return calls[quickest(calls, conditions.clock)]


def _in_both_formats(module: nn.Module, images: Tensor, autocast: bool = False) -> dict[str, Call]:
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    return {
        name: _inference(
            copy.deepcopy(module).to(memory_format=layout),
            images.contiguous(memory_format=layout),
            autocast,
        )
        for name, layout in formats.items()
    }


def torch_compiled(network: Network, conditions: Conditions) -> Call:
    """torch.compile with its default compiler, weights frozen, for this batch only.

    Raises:
        UnavailableError: if compiling fails, as without a C++ compiler.
    """
    torch._dynamo.reset()
    module = copy.deepcopy(network.model.module)
    compiled = torch.compile(module, dynamic=False, options={"freezing": True})
    call = _inference(compiled, network.images)
    try:
        call()
    except Exception as error:  # whatever a compiler says
        raise UnavailableError(f"torch.compile fails ({_first_line(error)})") from error
    return call


def _inference(module: Callable[[Tensor], Tensor], images: Tensor, autocast: bool = False) -> Call:
    def call() -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if autocast:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            return module(images)

    return call


def onnx_runtime(network: Network, conditions: Conditions) -> Call:
    """ONNX Runtime on the CPU, the batch's size fixed.

    Its threads stop waiting actively when a call ends, since another engine's turn may follow.

    Raises:
        UnavailableError: if a package is missing.
    """
    return _onnx_runtime(_made(network, "onnx"), network, conditions)


def onnx_runtime_int8(network: Network, conditions: Conditions) -> Call:
    """ONNX Runtime with its own quantisation.

    Raises:
        UnavailableError: if a package is missing.
    """
    return _onnx_runtime(_made(network, "onnx_int8"), network, conditions)


def _onnx_runtime(model: bytes, network: Network, conditions: Conditions) -> Call:
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(f"onnxruntime cannot be imported ({error})") from error
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = conditions.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_free_dimension_override_by_name("batch", len(network.images))
    session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {"images": contiguous(network.images)}
    return lambda: session.run(None, inputs)[0]


def openvino(network: Network, conditions: Conditions) -> Call:
    """OpenVINO on the CPU, the batch's size fixed, tuned for the latency of a call.

    Raises:
        UnavailableError: if a package is missing.
    """
    core = _openvino_core()
    return _openvino(core, core.read_model(_made(network, "onnx")), network, conditions)


def openvino_bfloat16(network: Network, conditions: Conditions) -> Call:
    """OpenVINO in bfloat16.

    Raises:
        UnavailableError: if a package is missing, or the CPU has no instructions for it.
    """
    core = _openvino_core()
    _require_bfloat16()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError("it knows no bfloat16 on this CPU")
    return _openvino(core, core.read_model(_made(network, "onnx")), network, conditions, "bf16")


def openvino_int8(network: Network, conditions: Conditions) -> Call:
    """OpenVINO in int8, as NNCF quantises (without it, ONNX Runtime).

    What is left in float is computed in float32: in bfloat16 it is not faster.

    Raises:
        UnavailableError: if a package is missing.
    """
    core = _openvino_core()
    files = _made(network, "openvino_int8")
    model = core.read_model(files["model.xml"], files["model.bin"])
    return _openvino(core, model, network, conditions)


def _openvino(
    core: Any, model: Any, network: Network, conditions: Conditions, precision: str = "f32"
) -> Call:
    model.reshape(list(network.images.shape))
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": conditions.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # it would pin the threads of all other engines, too
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()
    images = contiguous(network.images)

    def call() -> Any:
        return request.infer({0: images}, share_inputs=True, share_outputs=True)[0]

    return call


def _openvino_core() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UnavailableError(f"openvino cannot be imported ({error})") from error
    return openvino.Core()


def _made(network: Network, form: str) -> Any:
    """A form of the model, which may need packages that are missing."""
    try:
        return getattr(network.model, form)
    except InputError as error:
        raise UnavailableError(str(error).removeprefix("format: ")) from error


def _require_bfloat16() -> None:
    if not computes_bfloat16():
        raise UnavailableError("this CPU has no instructions for bfloat16")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


# The others' engines, which all run the dense encoder, and their precisions.
DENSE: dict[tuple[str, str], Callable[[Network, Conditions], Call]] = {
    ("torch", "float32"): torch_eager,
    ("torch", "bfloat16"): torch_bfloat16,
    ("compile", "float32"): torch_compiled,
    ("onnxruntime", "float32"): onnx_runtime,
    ("onnxruntime", "int8"): onnx_runtime_int8,
    ("openvino", "float32"): openvino,
    ("openvino", "bfloat16"): openvino_bfloat16,
    ("openvino", "int8"): openvino_int8,
}
# Those of them that static networks run on.
RUNTIMES = ("onnxruntime", "openvino")
ENGINES = (*dict.fromkeys(name for name, _ in DENSE), OURS, STATIC)
