"""Builds the kernel with the system's compiler, once, and keeps it in a cache folder."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from ...errors import InputError

SOURCES = Path(__file__).parent / "kernel"
CACHE_VARIABLE = "SOLO_GATING_CACHE"
ISA_VARIABLE = "SOLO_GATING_ISA"
PYTORCH = "pytorch"  # instead of a kernel

_ISA_FLAGS = {
    "avx512": [
        *("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"),
        "-mprefer-vector-width=512",
    ],
    "avx2": ["-mavx2", "-mfma"],
    # What every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
    "portable": [],
}
ISAS = tuple(_ISA_FLAGS)

_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pipe"),
    *("-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden"),
]
_DTYPE_FLAGS = {torch.float32: [], torch.bfloat16: ["-DGATED_BFLOAT16"]}
_COMPILERS = ("c++", "g++", "clang++")
_MOST_SECONDS = 300


class BuildError(RuntimeError):
    """The kernel cannot be had on this system; its message says why."""


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this CPU has, best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    first = {"AVX512": 0, "AVX2": 1}.get(capability, 2)
    return ISAS[first:]


def chosen_engine(name: str | None = None) -> str:
    """The engine to use: the one asked for, or the best one here.

    Args:
        name: an instruction set or "pytorch"; None for what the environment's SOLO_GATING_ISA says,
            or the best instruction set.

    Raises:
        InputError: for another name, or an instruction set that this CPU does not have.
    """
    wanted = name or os.environ.get(ISA_VARIABLE) or supported_isas()[0]
    accepted = (*supported_isas(), PYTORCH)
    if wanted not in accepted:
        key = "engine" if name else ISA_VARIABLE
        raise InputError(f"{key}: found {wanted!r}, accepted here are {', '.join(accepted)}")
    return wanted


def cache_folder() -> Path:
    """Where built kernels are kept: $SOLO_GATING_CACHE, or solo-gating in the user's cache folder.

    The only place that building writes to; it may be deleted at any time.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "solo-gating"


def load_library(isa: str, dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel for an instruction set, from the cache or freshly built.

    A file in the cache is used only if it is whole: it ends with its own SHA-256.

    Args:
        isa: one of `supported_isas`.
        dtype: of the convolutions' weights, torch.float32 or torch.bfloat16.

    Raises:
        BuildError: without a working compiler or a writable cache folder.
    """
    with _lock:
        result = _load(isa, dtype, cache_folder())
    if isinstance(result, BuildError):
        raise result
    return result


_lock = threading.Lock()


@functools.cache
def _load(isa: str, dtype: torch.dtype, folder: Path) -> ctypes.CDLL | BuildError:
    # A failure is kept as well, so that it costs its time once.
    flags = [*_FLAGS, *_ISA_FLAGS[isa], *_DTYPE_FLAGS[dtype]]
    digest = hashlib.sha256(repr((flags, os.environ.get("CXX"))).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    name = f"kernel-{platform.machine()}-{isa}-{str(dtype)[6:]}-{digest.hexdigest()[:16]}.so"
    try:
        if not _is_whole(folder / name):
            _build(flags, folder, name)
        return _declared(ctypes.CDLL(str(folder / name)))
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"the kernel in {str(folder)!r} cannot be used ({error})")


def _is_whole(file: Path) -> bool:
    # Loading a damaged library can end the process, so it must not be tried.
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _build(flags: list[str], folder: Path, name: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix="build-", dir=folder)
    except OSError as error:
        raise BuildError(
            f"the cache folder {str(folder)!r} cannot be written ({error.strerror}); "
            f"{CACHE_VARIABLE} names another one"
        ) from error
    with scratch as inside:
        library = Path(inside) / name
        _compile(flags, library)
        content = library.read_bytes()
        library.write_bytes(content + hashlib.sha256(content).digest())
        # In one step: other processes may be building or loading it.
        os.replace(library, folder / name)


def _compile(flags: list[str], target: Path) -> None:
    if named := os.environ.get("CXX"):
        candidates = [shlex.split(named)]
    else:
        candidates = [[name] for name in _COMPILERS if shutil.which(name)]
    if not candidates:
        raise BuildError(f"no C++ compiler was found ({', '.join(_COMPILERS)}; CXX names another)")
    # Without OpenMP, which some compilers lack, the kernel runs on one thread.
    attempts = [[*c, *openmp] for openmp in (["-fopenmp"], []) for c in candidates]
    messages = [_attempt([*a, *flags, str(SOURCES / "kernel.cpp")], target) for a in attempts]
    if all(messages):
        raise BuildError(f"{candidates[0][0]} failed: {messages[0]}")


def _attempt(command: list[str], target: Path) -> str | None:
    """Run a compiler unless the target is there already; returns what went wrong."""
    if target.exists():
        return None
    try:
        done = subprocess.run(
            [*command, "-o", str(target)],
            capture_output=True,
            text=True,
            timeout=_MOST_SECONDS,
            # The compiler's own temporary files.
            env={**os.environ, "TMPDIR": str(target.parent)},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0 and target.exists():
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
    return f"{lines[0].strip()} (exit status {done.returncode})"


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in ("gated_lanes", "gated_group", "gated_block"):
        getattr(library, name).restype = number
    library.gated_open.restype = pointer
    library.gated_open.argtypes = [pointer]
    library.gated_close.restype = None
    library.gated_close.argtypes = [pointer]
    library.gated_run.restype = ctypes.c_int
    library.gated_run.argtypes = [
        *(pointer, pointer, number, number, number),
        *(pointer, pointer, pointer, number),
    ]
    return library
