"""Makes an engine ready for a network, a batch and a number of threads."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ..timing import Call, quickest
from .cases import Network

OURS = "ours"


class UnavailableError(RuntimeError):
    """An engine cannot run here; the message says why."""


def torch_eager(network: Network, threads: int) -> Call:
    """PyTorch as it is, in inference mode, in whichever memory format is faster for this batch.

    Args:
        network: what to run.
        threads: not used here: calls must be made under `torch_threads`.
    """
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    calls = {}
    for name, layout in formats.items():
        module = copy.deepcopy(network.module).to(memory_format=layout)
        calls[name] = _inference(module, network.images.contiguous(memory_format=layout))
    return calls[quickest(calls)]


def torch_compiled(network: Network, threads: int) -> Call:
    """torch.compile with its default compiler, weights frozen, for this batch only.

    Args:
        network: what to run.
        threads: not used here: this and calls must be made under `torch_threads`.

    Raises:
        UnavailableError: if compiling fails, as without a C++ compiler.
    """
    torch._dynamo.reset()
    module = copy.deepcopy(network.module)
    compiled = torch.compile(module, dynamic=False, options={"freezing": True})
    call = _inference(compiled, network.images)
    try:
        call()
    except Exception as error:  # whatever a compiler says
        raise UnavailableError(f"torch.compile fails ({_first_line(error)})") from error
    return call


def _inference(module: Callable[[Tensor], Tensor], images: Tensor) -> Call:
    def call() -> Tensor:
        with torch.inference_mode():
            return module(images)

    return call


def onnx_runtime(network: Network, threads: int) -> Call:
    """ONNX Runtime on the CPU, the batch's size fixed.

    Its threads stop waiting actively when a call ends, since another engine's turn may follow.

    Raises:
        UnavailableError: if a package is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(f"onnxruntime cannot be imported ({error})") from error
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_free_dimension_override_by_name("batch", len(network.images))
    session: Any = onnxruntime.InferenceSession(
        _onnx(network), options, providers=["CPUExecutionProvider"]
    )
    inputs = {"images": np.ascontiguousarray(network.images.numpy())}
    return lambda: session.run(None, inputs)[0]


def openvino(network: Network, threads: int, precision: str = "f32") -> Call:
    """OpenVINO on the CPU, the batch's size fixed, tuned for the latency of a call.

    Args:
        network: what to run.
        threads: for the computation.
        precision: of the computation, "f32" or "bf16".

    Raises:
        UnavailableError: if a package is missing.
    """
    core: Any = _openvino_core()
    model = core.read_model(_onnx(network))
    model.reshape(list(network.images.shape))
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # it would pin the threads of all other engines, too
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()
    images = np.ascontiguousarray(network.images.numpy())

    def call() -> Any:
        return request.infer({0: images}, share_inputs=True, share_outputs=True)[0]

    return call


def openvino_bfloat16(network: Network, threads: int) -> Call:
    """OpenVINO in bfloat16.

    Raises:
        UnavailableError: if a package is missing, or the CPU has no instructions for it.
    """
    capabilities = _openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in capabilities:
        raise UnavailableError("this CPU has no instructions for bfloat16")
    return openvino(network, threads, "bf16")


def _openvino_core() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UnavailableError(f"openvino cannot be imported ({error})") from error
    return openvino.Core()


def _onnx(network: Network) -> bytes:
    try:
        return network.onnx
    except InputError as error:
        raise UnavailableError(str(error).removeprefix("format: ")) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


# The others' engines, which all run the dense encoder.
DENSE: dict[str, Callable[[Network, int], Call]] = {
    "torch": torch_eager,
    "compile": torch_compiled,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
}
# Those of them that static networks run on.
STATIC = ("onnxruntime", "openvino")
ENGINES = (*DENSE, OURS)
