"""What the benchmark runs on, and how engines are kept to an instruction set."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from ... import __version__
from ...checks import one_of
from ..engine.library import ISA_VARIABLE, chosen_engine

# What keeps engines to an instruction set; read when their libraries are loaded. OpenVINO's
# convolutions obey oneDNN's variable (its own code for pooling does not). ONNX Runtime has none.
ISA_VARIABLES = {
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
NOT_RESTRICTED = ("onnxruntime",)

_PACKAGES = ("torch", "onnxruntime", "openvino")


def cpu_name() -> str:
    """The CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str | None]:
    """Versions of the engines' packages, None for one that is not installed, and of ours and Python."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"solo-gating": __version__, "python": platform.python_version()}


def restart_restricted_to(isa: str) -> None:
    """Start this process again, once, with the variables that keep all engines to an ISA.

    Raises:
        InputError: for an instruction set that there is not.
    """
    one_of("isa", isa, ISA_VARIABLES)
    wanted = ISA_VARIABLES[isa] | {ISA_VARIABLE: isa}
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    chosen_engine(isa)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)
