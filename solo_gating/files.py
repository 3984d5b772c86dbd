"""Result files, written whole or not at all."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from .errors import InputError


def make_folder(folder: Path) -> None:
    """Make a folder for results.

    Raises:
        InputError: if that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {str(folder)!r} ({error.strerror})") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, its folder included.

    Raises:
        InputError: if it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r} ({error.strerror})") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a CSV file; the first row's keys are the columns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def png_of(figure: Any, dpi: int = 150) -> bytes:
    """A matplotlib figure as PNG; it is closed."""
    import matplotlib.pyplot as plt

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    plt.close(figure)
    return content.getvalue()


def write_picture(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG, and close it."""
    write_bytes(path, png_of(figure))


# Far more than any file that this package or solo-learn writes.
_LARGEST, _DEEPEST = 2**24, 50


class UnreadableError(ValueError):
    """Why a file is not taken for JSON."""


def read_json(path: Path, key: str = "") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        key: the config key that names it, for messages.

    Raises:
        InputError: if it is missing, damaged, or no object.
    """
    where = f"{key}: " if key else ""
    try:
        content = json_content(path)
    except UnreadableError as error:
        raise InputError(f"{where}cannot read {str(path)!r} as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}{str(path)!r} holds no JSON object")
    return content


def json_content(path: Path) -> Any:
    """What a JSON file holds, whoever may have written it; NaN and Infinity may be in it.

    Args:
        path: the file, at most 16 MiB and 50 levels deep.

    Raises:
        UnreadableError: if it is not JSON, a key is in an object twice, or it is no regular file.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise UnreadableError("it is no regular file")
        if (size := path.stat().st_size) > _LARGEST:
            raise UnreadableError(f"it has {size:,} bytes, accepted are at most {_LARGEST:,}")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UnreadableError(error.strerror) from error
    except UnicodeDecodeError as error:
        raise UnreadableError("it is not UTF-8") from error
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, UnreadableError) as error:
        raise UnreadableError(str(error)) from error
    except ValueError as error:  # in Python's words, an advice to lift its limit
        raise UnreadableError("a number in it has too many digits") from error
    except RecursionError as error:
        raise UnreadableError("it is nested too deeply") from error
    if _depth(content) > _DEEPEST:
        raise UnreadableError("it is nested too deeply")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UnreadableError(f"the key {twice!r} is in an object twice")
    return content


def _depth(content: Any) -> int:
    """Levels of lists and objects, counted one after the other."""
    depth, level = 0, [content]
    while level := [part for part in level if isinstance(part, (dict, list))]:
        depth += 1
        level = [x for p in level for x in (p.values() if isinstance(p, dict) else p)]
    return depth
