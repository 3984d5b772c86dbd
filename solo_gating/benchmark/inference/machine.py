"""What the CPU can, and how engines are kept to an instruction set."""

import os
import re
import sys
from pathlib import Path

from solo_gating_runtime.library import ISA_VARIABLE, chosen_engine

from ...checks import one_of

# What keeps engines to an instruction set; read when their libraries are loaded. OpenVINO's
# convolutions obey oneDNN's variable (its own code for pooling does not). ONNX Runtime has none.
ISA_VARIABLES = {
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
NOT_RESTRICTED = ("onnxruntime",)


# As Linux lists them.
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}


def computes_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, and engines are not kept from them."""
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(
        _BFLOAT16 & set(flags.split())
        for flags in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    )


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
