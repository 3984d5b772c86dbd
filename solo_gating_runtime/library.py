"""Builds the kernel with the system's compiler, once, and keeps it in a cache folder.

Loading a library runs its code. So one is loaded only from a folder and a file that belong to this
user or to root and that nobody else may write to.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checks import one_of
from .errors import InputError

SOURCES = Path(__file__).parent / "kernel"
CACHE_VARIABLE = "SOLO_GATING_CACHE"
ISA_VARIABLE = "SOLO_GATING_ISA"
TOO_LARGE = 2  # what `gated_run` returns for an image of too many pixels


@dataclass(frozen=True)
class Build:
    """How the kernel is built for an instruction set.

    Attributes:
        flags: of the compiler.
        needs: features that a CPU must have, by Linux's names (`cpu_features`).
    """

    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


_AVX2 = Build(("-mavx2", "-mfma"), ("avx2", "fma"))
_AVX512 = Build(
    (
        *("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"),
        "-mprefer-vector-width=512",
    ),
    ("avx512f", "avx512vl", "avx512dq", "avx512bw", "fma"),
)
# What every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
_PORTABLE = Build()


def _with(build: Build, flags: str, needs: str) -> Build:
    return Build((*build.flags, *flags.split()), (*build.needs, *needs.split()))


# As of int8, gates' sums are the same on every CPU.
_NATIVE_BFLOAT16 = "-DGATED_NATIVE_BFLOAT16 -ffp-contract=off"

# For each dtype of the convolutions, the engines that compute with it, best first.
ENGINES: dict[str, dict[str, Build]] = {
    "float32": {"avx512": _AVX512, "avx2": _AVX2, "portable": _PORTABLE},
    # Those that are not named after it hold weights in bfloat16 and compute in float32.
    "bfloat16": {
        "avx512_bf16": _with(_AVX512, f"-mavx512bf16 {_NATIVE_BFLOAT16}", "avx512_bf16"),
        "avx512": _AVX512,
        "avx2": _AVX2,
        "neon_bf16": _with(_PORTABLE, f"-march=armv8.2-a+bf16 {_NATIVE_BFLOAT16}", "bf16"),
        "portable": _PORTABLE,
    },
    "int8": {
        "avx512_vnni": _with(_AVX512, "-mavx512vnni", "avx512_vnni"),
        "avx512": _AVX512,
        "avx_vnni": _with(_AVX2, "-mavxvnni", "avx_vnni"),
        "avx2": _AVX2,
        "neon_dot": Build(("-march=armv8.2-a+dotprod",), ("asimddp",)),
        "portable": _PORTABLE,
    },
}

_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pipe"),
    *("-fno-math-errno", "-fvisibility=hidden"),
]
_DTYPE_FLAGS = {
    "float32": ["-ffp-contract=fast"],
    "bfloat16": ["-ffp-contract=fast", "-DGATED_BFLOAT16"],
    # Every CPU gives the same numbers: what is rounded is said by the source alone.
    "int8": ["-ffp-contract=off", "-DGATED_INT8"],
}


def compiler_flags(dtype: str) -> list[str]:
    """Of all engines with a dtype, one of `ENGINES`."""
    return [*_FLAGS, *_DTYPE_FLAGS[dtype]]


_COMPILERS = ("c++", "g++", "clang++")
_MOST_SECONDS = 300
_LEFT_OVER_AFTER = 3600  # seconds; longer than all compilers together may take


class BuildError(RuntimeError):
    """The kernel cannot be had on this system; its message says why."""


class _FolderError(BuildError):
    """Nothing can be written to a folder, or run from it: another one may do."""


class _CompilerError(BuildError):
    """No compiler makes the kernel."""


class _FlagsError(_CompilerError):
    """Compilers work, but know no flags for this engine's instructions: another one may do."""


@functools.cache
def cpu_features() -> frozenset[str]:
    """What this CPU can do and its system lets it, by the names of Linux's /proc/cpuinfo."""
    if sys.platform == "darwin":
        return _features_on_macos()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = [line.partition(":") for line in lines]
    found = [set(value.split()) for key, _, value in named if key.strip() in ("flags", "Features")]
    # Cores may differ, and a thread may move to any of them.
    return frozenset(set.intersection(*found)) if found else frozenset()


_MACOS_NAMES = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.fma": "fma",
    **{f"hw.optional.avx512{name}": f"avx512{name}" for name in ("f", "vl", "dq", "bw")},
    "hw.optional.avx512vnni": "avx512_vnni",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_BF16": "bf16",
}


def _features_on_macos() -> frozenset[str]:
    try:
        # Names that this Mac does not know are left out, with an error.
        done = subprocess.run(
            ["/usr/sbin/sysctl", *_MACOS_NAMES], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    named = [line.partition(": ") for line in done.stdout.splitlines()]
    return frozenset(_MACOS_NAMES[key] for key, _, value in named if value.strip() == "1")


def computes(engine: str, dtype: str) -> str:
    """What an engine's convolutions compute in: the dtype, or "float32" if it only holds weights in it.

    Args:
        engine: one of `ENGINES`, or another name for PyTorch.
        dtype: one of `ENGINES`.
    """
    return "float32" if dtype == "bfloat16" and not engine.endswith("_bf16") else dtype


def supported_engines(dtype: str = "float32") -> tuple[str, ...]:
    """The engines that this CPU can run, best first.

    Args:
        dtype: one of `ENGINES`.
    """
    one_of("dtype", dtype, ENGINES)
    features = cpu_features()
    return tuple(name for name, build in ENGINES[dtype].items() if features.issuperset(build.needs))


def chosen_engine(
    name: str | None = None, dtype: str = "float32", also: tuple[str, ...] = ()
) -> str:
    """The engine to use: the one asked for, or the best one here.

    Args:
        name: None for what the environment's SOLO_GATING_ISA says, or the best one.
        dtype: one of `ENGINES`.
        also: names that are accepted besides the kernel's engines.

    Raises:
        InputError: for another name, or an instruction set that this CPU does not have.
    """
    supported = supported_engines(dtype)
    wanted = name or os.environ.get(ISA_VARIABLE) or supported[0]
    accepted = (*supported, *also)
    if wanted not in accepted:
        key = "engine" if name else ISA_VARIABLE
        raise InputError(f"{key}: got {wanted!r}, expected here are {', '.join(accepted)}")
    return wanted


def cache_folder() -> Path:
    """Where built kernels are kept: $SOLO_GATING_CACHE, or solo-gating in the user's cache folder.

    Without a home, or if nothing can be written there, it is in the temporary folder. It is the only
    place that building writes to, and may be deleted at any time.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(folder)).absolute()
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # which its specification says to ignore
        folder = os.path.expanduser("~/.cache")
    return Path(folder) / "solo-gating" if os.path.isabs(folder) else _temporary_folder()


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()).absolute() / f"solo-gating-{os.geteuid()}"


def load_first(engine: str, dtype: str) -> tuple[ctypes.CDLL, str]:
    """The kernel for an engine, or for the best after it whose instructions a compiler knows.

    Args:
        engine: one of `supported_engines`.
        dtype: one of `ENGINES`.

    Returns:
        The library, and its engine's name. There is a warning if it is another one.

    Raises:
        BuildError: as `load_library`.
    """
    names = supported_engines(dtype)
    names = names[names.index(engine) :] if engine in names else (engine,)
    first: _FlagsError | None = None
    for name in names:
        try:
            library = load_library(name, dtype)
        except _FlagsError as error:
            first = first or error
            continue
        if first is not None:
            warnings.warn(
                f"solo-gating runs on {name} instead of {engine}, more slowly: {first}",
                RuntimeWarning,
                stacklevel=4,
            )
        return library, name
    assert first is not None
    raise first


def load_library(engine: str, dtype: str) -> ctypes.CDLL:
    """The kernel for an engine, from the cache or freshly built.

    A file in the cache is used only if it is whole: it ends with its own SHA-256.

    Args:
        engine: one of `supported_engines`.
        dtype: one of `ENGINES`.

    Raises:
        BuildError: without a working compiler, or a cache folder that is writable for this user
            and for nobody else.
    """
    if not hasattr(os, "geteuid"):
        raise BuildError("the kernel is for Linux and macOS")
    try:
        folders = [cache_folder()]
        if not os.environ.get(CACHE_VARIABLE):
            folders.append(_temporary_folder())
    except OSError as error:  # the current folder was deleted, or there is no temporary one
        raise BuildError(
            f"there is no cache folder ({error}); {CACHE_VARIABLE} names one"
        ) from error
    with _lock:
        result = _load(engine, dtype, *folders)
    if isinstance(result, BuildError):
        raise result
    return result


_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


# Another thread may hold it when this process is forked, and does not exist in the new one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@functools.cache
def _load(engine: str, dtype: str, *folders: Path) -> ctypes.CDLL | _CompilerError:
    # Compilers' failures are kept as well, so that they cost their time once.
    flags, more = compiler_flags(dtype), [*ENGINES[dtype][engine].flags]
    digest = hashlib.sha256(repr(([*flags, *more], os.environ.get("CXX"))).encode())
    for source in sorted(SOURCES.rglob("*.*")):
        digest.update(str(source.relative_to(SOURCES)).encode() + source.read_bytes())
    name = f"kernel-{platform.machine()}-{engine}-{dtype}-{digest.hexdigest()[:16]}.so"
    errors: list[BuildError] = []
    for folder in folders:
        try:
            return _declared(_cached(flags, more, folder, name))
        except _FolderError as error:
            errors.append(error)
        except _CompilerError as error:
            return error
    raise errors[0]


def _cached(flags: list[str], more: list[str], folder: Path, name: str) -> ctypes.CDLL:
    with _held(folder) as held:
        try:
            _remove_left_overs(held)
            library = _opened(held / name)
            if library is None:
                with _scratch(held, folder) as scratch:
                    _build(flags, more, Path(scratch), held / name)
                library = _opened(held / name)
        except OSError as error:
            reason = str(error).replace(str(held), str(folder))
            raise _FolderError(
                f"the kernel in {str(folder)!r} cannot be used ({reason})"
            ) from error
    if library is None:
        raise BuildError(f"the kernel in {str(folder)!r} changed while it was built")
    return library


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """A trusted folder by a path that stays its own, even if another one is put in its place."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _cannot_be_written(folder, error) from error
    try:
        for found in (os.lstat(folder), os.fstat(descriptor)):  # of a link, and of what it names
            _check_trusted(found, f"the cache folder {str(folder)!r}")
        held = Path(f"/proc/{os.getpid()}/fd/{descriptor}")  # as compilers see it, too
        yield held if held.is_dir() else folder
    finally:
        os.close(descriptor)


def _check_trusted(found: os.stat_result, what: str) -> None:
    reason = None
    if found.st_uid not in (0, os.geteuid()):
        reason = f"belongs to another user, {found.st_uid}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(found.st_mode):
        reason = f"may be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    if reason:
        raise BuildError(f"{what} {reason}; expected one that only you or root may write to")


def _remove_left_overs(folder: Path) -> None:
    """Remove what builds left that were killed."""
    for scratch in folder.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.lstat().st_mtime > _LEFT_OVER_AFTER:
                shutil.rmtree(scratch)


def _opened(file: Path) -> ctypes.CDLL | None:
    """The library in a file; None if there is none, or it is not whole.

    Loading a damaged library can end the process, so it must not be tried.
    """
    try:
        # A link is not followed, and a pipe not waited for.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as opened:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None
        _check_trusted(found, f"the kernel {file.name!r} in the cache folder")
        if not _is_whole(opened.read()):
            return None
        return ctypes.CDLL(str(file))


def _is_whole(content: bytes) -> bool:
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _scratch(held: Path, folder: Path) -> tempfile.TemporaryDirectory:
    try:
        return tempfile.TemporaryDirectory(prefix="build-", dir=held)
    except OSError as error:
        raise _cannot_be_written(folder, error) from error


def _cannot_be_written(folder: Path, error: OSError) -> _FolderError:
    return _FolderError(
        f"the cache folder {str(folder)!r} cannot be written ({error.strerror}); "
        f"{CACHE_VARIABLE} names another one"
    )


def _build(flags: list[str], more: list[str], scratch: Path, target: Path) -> None:
    library = scratch / target.name
    _compile(flags, more, library)
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())
    library.chmod(0o755)  # whatever the umask says: for nobody else to write to
    # In one step: other processes may be building or loading it.
    os.replace(library, target)


def _compile(flags: list[str], more: list[str], target: Path) -> None:
    """Build with flags, those of all engines and `more` of this one's."""
    if named := os.environ.get("CXX", "").strip():
        try:
            candidates = [shlex.split(named)]
        except ValueError as error:
            raise _CompilerError(f"CXX, {named!r}, is no command ({error})") from error
    else:
        candidates = [[name] for name in _COMPILERS if shutil.which(name)]
    if not candidates:
        raise _CompilerError(
            f"no C++ compiler was found ({', '.join(_COMPILERS)}; CXX names another)"
        )
    # Without OpenMP, which some compilers lack, the kernel runs on one thread.
    attempts = [[*c, *openmp] for openmp in (["-fopenmp"], []) for c in candidates]
    source = str(SOURCES / "kernel.cpp")
    messages = [_attempt([*a, *flags, *more, source], target) for a in attempts]
    if all(messages):
        known = not more or any(_knows(candidate, more, target.parent) for candidate in candidates)
        works = known or any(_knows(candidate, [], target.parent) for candidate in candidates)
        kind = _CompilerError if known or not works else _FlagsError
        raise kind(f"{candidates[0][0]} failed: {messages[0]}")


def _knows(compiler: list[str], flags: list[str], folder: Path) -> bool:
    """Whether a compiler makes an object of nothing."""
    source, target = folder / "nothing.cpp", folder / "nothing.o"
    source.touch()
    target.unlink(missing_ok=True)
    return _attempt([*compiler, *flags, "-c", str(source)], target) is None


def _attempt(command: list[str], target: Path) -> str | None:
    """Run a compiler unless the target is there already; returns what went wrong."""
    if target.exists():
        return None
    try:
        done = subprocess.run(
            [*command, "-o", str(target)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
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
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    functions: dict[str, tuple[Any, list[Any]]] = {
        "gated_open": (pointer, [ctypes.c_char_p, number, ctypes.c_char_p, number]),
        "gated_share": (pointer, [pointer]),
        "gated_close": (None, [pointer]),
        "gated_bytes": (number, [pointer]),
        "gated_decide": (ctypes.c_int, [pointer, real, real, pointer, pointer]),
        "gated_run": (
            ctypes.c_int,
            [pointer, pointer, number, number, number, *[pointer] * 5, number],
        ),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
