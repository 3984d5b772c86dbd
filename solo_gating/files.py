"""Result files, written whole or not at all, and on the disk when the writer returns."""

import csv
import errno
import fcntl
import io
import json
import math
import os
import platform
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.figure import Figure

from .errors import InputError

# How the names of files begin that are still being written, and the machine that writes them.
_PART = ".solo-gating-"
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"


def make_folder(folder: Path, needed: int = 0) -> None:
    """Make a folder for results, free of what a killed process left in it, and try to write there.

    Args:
        folder: with its parents.
        needed: bytes that must be free.

    Raises:
        InputError: if it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with _part_in(folder) as (_, file):
            file.write(bytes(4096))
            _sync(file.fileno())
        disk = shutil.disk_usage(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if disk.total > 0 and disk.free < needed:  # some file systems do not say how large they are
        raise InputError(
            f"cannot write {str(folder)!r} ({disk.free:,} bytes are free, a checkpoint has "
            f"{needed:,})"
        )


def remove_leftovers(folder: Path) -> None:
    """Delete what a kill has left half written in a folder or in one of its folders.

    What another process is still writing is locked. Not every network file system passes locks on
    to other machines: theirs must be an hour old, too.
    """
    parts = [*folder.glob(f"{_PART}*"), *folder.glob(f"*/{_PART}*")]
    for part in parts:
        with suppress(OSError), open(part, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = part.name.startswith(_PART + _MACHINE)
            if ours or time.time() - part.stat().st_mtime > 3600:
                part.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes `path`'s place at the end.

    It lies beside `path`, in a folder that is made, and is renamed when it is complete and on the
    disk. Until then what was at `path` stays, whatever happens: an exception, a kill, a full disk.
    Several processes may replace one file at once; the last one's stays.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _part_in(path.parent) as (part, file):
            yield file
            file.flush()
            _sync(file.fileno())
            os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    except RuntimeError as error:  # torch.save's own, on top of the file's
        if not isinstance(error.__context__, OSError):
            raise
        raise _cannot_write(path, error.__context__) from error


def add_name(file: Path, path: Path) -> None:
    """Give a file a second name, which takes the place of whatever had it.

    Args:
        file: is only ever replaced, never changed.
        path: in the same folder. Where there are no hard links it becomes a copy.

    Raises:
        InputError: if that is not possible.
    """
    part = path.with_name(f"{_PART}{_MACHINE}-{secrets.token_hex(8)}")
    try:
        os.link(file, part)
    except OSError:
        with open(file, "rb") as content, replacing(path) as copy:
            shutil.copyfileobj(content, copy)
        return
    try:
        os.replace(part, path)
        part.unlink(missing_ok=True)  # it stays if both were names of one file already
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextmanager
def _part_in(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new, locked file, which is deleted at the end unless it has another name by then."""
    while True:
        part = folder / f"{_PART}{_MACHINE}-{secrets.token_hex(8)}"
        with open(part, "xb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not part.exists():  # taken for a leftover before it was locked
                continue
            try:
                yield part, file
            finally:
                part.unlink(missing_ok=True)
            return


def _sync(descriptor: int) -> None:
    """Have a file or folder written to the disk, where the file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {str(path)!r} ({error.strerror or error})")


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other processes that are in such a block of the same folder.

    For reading a result file, adding to it and writing it: of two that do so at once one would
    write what the other has not seen. The lock leaves no file behind; a file system without locks
    is no hindrance.

    Args:
        folder: that exists.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, its folder included.

    Raises:
        InputError: if it cannot be written.
    """
    with replacing(path) as file:
        file.write(content)


def append(path: Path, content: bytes) -> None:
    """Write at a file's end: all of it or nothing.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            if file.write(content) < len(content):  # the disk is full
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; a figure that is no finite number becomes null."""
    text = json.dumps(_with_nulls(content), indent=2, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def _with_nulls(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: _with_nulls(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_with_nulls(value) for value in content]
    return content


def write_csv(path: Path, rows: list[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write a CSV file.

    Args:
        path: the file.
        rows: at least one.
        columns: default: the first row's keys.
    """
    columns = columns or list(rows[0])
    write_bytes(path, csv_lines([dict(zip(columns, columns, strict=True)), *rows], columns))


def csv_lines(rows: list[dict[str, Any]], columns: Sequence[str]) -> bytes:
    """Rows as lines of a CSV file; what a row lacks is empty."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, fieldnames=columns, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def png_of(figure: Figure, dpi: int = 150) -> bytes:
    """A matplotlib figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def write_picture(path: Path, figure: Figure) -> None:
    """Write a matplotlib figure as PNG."""
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
            raise UnreadableError(f"it has {size:,} bytes, expected at most {_LARGEST:,}")
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
