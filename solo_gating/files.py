"""Result files, written whole or not at all."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

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


def png_of(figure: Figure, dpi: int = 150) -> bytes:
    """A matplotlib figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def write_picture(path: Path, figure: Figure) -> None:
    """Write a matplotlib figure as PNG."""
    write_bytes(path, png_of(figure))


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
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{where}cannot read {str(path)!r} as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}{str(path)!r} holds no JSON object")
    return content
