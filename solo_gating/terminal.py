"""Standard output and error that do not stop a run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let nothing that is printed end this process, for a while.

    A character that the terminal's encoding does not have becomes a question mark. What nobody
    can read any more, since the pipe, the terminal or the log's disk is gone, goes nowhere.
    """
    with redirect_stdout(_lasting(sys.stdout)), redirect_stderr(_lasting(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()


def _lasting(stream: TextIO | None) -> Any:
    if stream is None:  # it was closed when the process began
        stream = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    return stream if isinstance(stream, _Lasting) else _Lasting(stream)


class _Lasting:
    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._going_on():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._going_on():
            self._stream.flush()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # Python flushes the stream once more at the end, and would exit with a code of its own.
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
        except ValueError:  # it is closed
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(text: str) -> None:
    """Print what a command has to say, at once, also into a pipe."""
    print(text, flush=True)


def note(text: str) -> None:
    """Print what a user should know beside a command's output, on standard error."""
    print(text, file=sys.stderr, flush=True)
