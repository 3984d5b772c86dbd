"""Output that nobody can read is no reason to stop."""

import importlib
import io
import os
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

import solo_gating
from solo_gating.terminal import lasting_streams

PACKAGE = Path(solo_gating.__file__).parent
ENTRY_POINTS = ["__main__", *sorted(file.stem for file in PACKAGE.glob("main_*.py"))]


def printed(stream, *lines):
    """What reaches a stream of what is printed."""
    with redirect_stdout(stream), lasting_streams():
        for line in lines:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    return stream


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_character_that_the_terminal_lacks_becomes_a_question_mark(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    printed(stream, "83.1 ± 0.2 ≥ 3", "\udcff")  # the latter in a file's name
    text = stream.buffer.getvalue().decode(encoding)
    assert text == ("83.1 ? 0.2 ? 3\n?\n" if encoding == "ascii" else "83.1 ± 0.2 ? 3\n?\n")


def test_a_broken_pipe_is_no_reason_to_stop():
    """Neither at the prints nor at the flush with which Python ends."""
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    os.close(reader)
    printed(stream, "x" * 100_000, "more")
    stream.write("rest")
    stream.close()


def test_a_full_disk_under_the_output_is_no_reason_to_stop():
    with open("/dev/full", "w") as stream:
        printed(stream, "x" * 100_000)


def test_a_closed_output_is_no_reason_to_stop(monkeypatch):
    stream = io.StringIO()
    stream.close()
    printed(stream, "x")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with lasting_streams():
        sys.stdout.write("x")
        sys.stderr.write("x")
        assert not sys.stdout.isatty()
    assert sys.stdout is None


def test_the_streams_are_put_back():
    before = sys.stdout, sys.stderr
    with lasting_streams(), lasting_streams():
        assert sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_entry_point_can_speak_ascii(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    module = importlib.import_module(f"solo_gating.{name}")
    with redirect_stdout(stream), suppress(SystemExit):
        module.main()
    assert len(stream.buffer.getvalue()) > 500
