"""`main_export format=cpp`: a folder that runs an encoder with a C++17 compiler and nothing else."""

from collections.abc import Sequence
from pathlib import Path

from solo_gating_runtime.library import ENGINES, SOURCES, compiler_flags

from .engine import CompiledEncoder

_FILES = Path(__file__).parent / "cpp_files"

# What CMake says in its own words.
_CMAKES = ("-shared", "-fPIC", "-pipe", "-std=c++17", "-O3")


def files_of(
    encoder: CompiledEncoder, mean: Sequence[float], std: Sequence[float]
) -> dict[str, bytes]:
    """The files' names and contents.

    Args:
        encoder: of any dtype.
        mean: that images are normalised with, of each colour.
        std: as `mean`.

    Raises:
        InputError: for an encoder that only PyTorch can run.
    """
    return {
        "encoder.sgx": encoder.to_bytes(),
        "CMakeLists.txt": _cmake(encoder.dtype),
        "example.cpp": _filled("example.cpp", MEAN=_floats(mean), STD=_floats(std)),
        **{
            str(Path("kernel") / source.relative_to(SOURCES)): source.read_bytes()
            for source in sorted(SOURCES.rglob("*.*"))
        },
    }


def _cmake(dtype: str) -> bytes:
    table = []
    for name, build in ENGINES[dtype].items():
        table.append(f"set(flags_{name} {' '.join(build.flags)})".replace(" )", ")"))
        table.append(f"set(needs_{name} {' '.join(build.needs)})".replace(" )", ")"))
    flags = [flag for flag in compiler_flags(dtype) if flag not in _CMAKES]
    return _filled(
        "CMakeLists.txt",
        DTYPE=dtype,
        ENGINES=" ".join(ENGINES[dtype]),
        TABLE="\n".join(table),
        FLAGS=" ".join(["-O3", *flags]),
    )


def _filled(name: str, **values: str) -> bytes:
    text = (_FILES / name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text.encode()


def _floats(values: Sequence[float]) -> str:
    return ", ".join(repr(float(value)) for value in values)
