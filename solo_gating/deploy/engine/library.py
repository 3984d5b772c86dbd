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
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import solo_gating_runtime

from ...errors import InputError

SOURCES = Path(solo_gating_runtime.__file__).parent / "kernel"
CACHE_VARIABLE = "SOLO_GATING_CACHE"
ISA_VARIABLE = "SOLO_GATING_ISA"
PYTORCH = "pytorch"  # instead of a kernel
TOO_LARGE = 2  # what `gated_run` returns for an image of too many pixels

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
_LEFT_OVER_AFTER = 3600  # seconds; longer than all compilers together may take


class BuildError(RuntimeError):
    """The kernel cannot be had on this system; its message says why."""


class _FolderError(BuildError):
    """Nothing can be written to a folder, or run from it: another one may do."""


class _CompilerError(BuildError):
    """No compiler makes the kernel."""


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


def load_library(isa: str, dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel for an instruction set, from the cache or freshly built.

    A file in the cache is used only if it is whole: it ends with its own SHA-256.

    Args:
        isa: one of `supported_isas`.
        dtype: of the convolutions' weights, torch.float32 or torch.bfloat16.

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
        result = _load(isa, dtype, *folders)
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
def _load(isa: str, dtype: torch.dtype, *folders: Path) -> ctypes.CDLL | _CompilerError:
    # Compilers' failures are kept as well, so that they cost their time once.
    flags = [*_FLAGS, *_ISA_FLAGS[isa], *_DTYPE_FLAGS[dtype]]
    digest = hashlib.sha256(repr((flags, os.environ.get("CXX"))).encode())
    for source in sorted(SOURCES.rglob("*.*")):
        digest.update(source.name.encode() + source.read_bytes())
    name = f"kernel-{platform.machine()}-{isa}-{str(dtype)[6:]}-{digest.hexdigest()[:16]}.so"
    errors: list[BuildError] = []
    for folder in folders:
        try:
            return _declared(_cached(flags, folder, name))
        except _FolderError as error:
            errors.append(error)
        except _CompilerError as error:
            return error
    raise errors[0]


def _cached(flags: list[str], folder: Path, name: str) -> ctypes.CDLL:
    with _held(folder) as held:
        try:
            _remove_left_overs(held)
            library = _opened(held / name)
            if library is None:
                with _scratch(held, folder) as scratch:
                    _build(flags, Path(scratch), held / name)
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


def _build(flags: list[str], scratch: Path, target: Path) -> None:
    library = scratch / target.name
    _compile(flags, library)
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())
    library.chmod(0o755)  # whatever the umask says: for nobody else to write to
    # In one step: other processes may be building or loading it.
    os.replace(library, target)


def _compile(flags: list[str], target: Path) -> None:
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
    messages = [_attempt([*a, *flags, str(SOURCES / "kernel.cpp")], target) for a in attempts]
    if all(messages):
        raise _CompilerError(f"{candidates[0][0]} failed: {messages[0]}")


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
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in ("gated_lanes", "gated_group", "gated_block", "gated_plane_group"):
        getattr(library, name).restype = number
    library.gated_open.restype = pointer
    library.gated_open.argtypes = [pointer]
    library.gated_close.restype = None
    library.gated_close.argtypes = [pointer]
    library.gated_run.restype = ctypes.c_int
    library.gated_run.argtypes = [
        *(pointer, pointer, number, number, number),
        *(pointer, pointer, pointer, pointer, number),
    ]
    return library
