"""Result files: what a kill, a full disk or another process does to them."""

import json
import os
import resource
import shutil
import signal
import stat
import threading
from contextlib import contextmanager

import pytest
import torch

from solo_gating import InputError
from solo_gating import files as module
from solo_gating.files import (
    add_name,
    append,
    make_folder,
    read_json,
    remove_leftovers,
    replacing,
    write_bytes,
    write_csv,
    write_json,
)
from solo_gating.training.logs import CSVLog, next_version, read_logs


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@contextmanager
def small_disk(size):
    """No file of this process can grow beyond so many bytes: the kernel refuses the rest."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def killed_while(action):
    """Run something in a process that is killed when it says so."""
    child = os.fork()
    if not child:
        try:
            action(lambda: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the process was to be killed"


class Killed:
    """Pickles until half of a checkpoint is written, and then kills its process."""

    def __init__(self, kill):
        self.kill = kill

    def __getstate__(self):
        self.kill()


WRITERS = {
    "bytes": lambda path: write_bytes(path, b"x" * 9000),
    "json": lambda path: write_json(path, list(range(5000))),
    "csv": lambda path: write_csv(path, [{"a": number} for number in range(5000)]),
    "checkpoint": lambda path: save(path, {"a": torch.zeros(3000), "b": torch.zeros(3000)}),
}


def save(path, content):
    with replacing(path) as file:
        torch.save(content, file)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("before", [b"before", None])
def test_a_full_disk_leaves_what_was_there(kind, before, tmp_path):
    path = tmp_path / "file"
    if before:
        path.write_bytes(before)
    with (
        small_disk(5000),
        pytest.raises(InputError, match=r"cannot write .*file' \(File too large"),
    ):
        WRITERS[kind](path)
    assert names(tmp_path) == ["file"] * bool(before)
    assert not before or path.read_bytes() == before
    WRITERS[kind](path)
    assert path.stat().st_size > 5000


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_whatever_interrupts_a_writer_leaves_what_was_there(stop, tmp_path):
    (tmp_path / "file").write_bytes(b"before")

    def half():
        with replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise stop

    with pytest.raises(stop):
        half()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_a_kill_leaves_what_was_there_and_the_next_start_clears_the_rest(tmp_path):
    path = tmp_path / "run" / "last.ckpt"
    save(path, {"weight": torch.ones(3)})
    (path.parent / "notes.part").touch()  # somebody else's

    def half(kill):
        save(path, {"weight": torch.zeros(3000), "more": Killed(kill)})

    def half_of_bytes(kill):
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            kill()

    for action in (half, half_of_bytes):
        killed_while(action)
        assert len(names(path.parent)) == 3
        assert torch.load(path, weights_only=True)["weight"].tolist() == [1, 1, 1]
        remove_leftovers(tmp_path)
        assert names(path.parent) == ["last.ckpt", "notes.part"]
    killed_while(half)
    make_folder(path.parent)
    assert names(path.parent) == ["last.ckpt", "notes.part"]


def test_what_is_still_being_written_is_no_leftover(tmp_path):
    with replacing(tmp_path / "file") as file:
        remove_leftovers(tmp_path)
        make_folder(tmp_path)
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_another_machine_s_file_is_left_alone_for_an_hour(tmp_path, monkeypatch):
    """Its lock may not be seen from here."""
    monkeypatch.setattr(module, "_MACHINE", "another")

    def half(kill):
        with replacing(tmp_path / "file"):
            kill()

    killed_while(half)
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path, monkeypatch
):
    seen = []
    fsync, replace = os.fsync, os.replace

    def record(descriptor):
        mode = os.fstat(descriptor).st_mode
        seen.append("folder" if stat.S_ISDIR(mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("rename"), replace(a, b)))
    monkeypatch.setattr(shutil, "move", None)  # copies where it cannot rename
    write_bytes(tmp_path / "file", b"content")
    assert seen == ["file", "rename", "folder"]


def test_a_file_has_the_mode_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_several_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path, failed = tmp_path / "file", []

    def write(letter):
        for _ in range(15):
            try:
                write_bytes(path, letter * 100_000)
                remove_leftovers(tmp_path)
            except InputError as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert names(tmp_path) == ["file"]
    content = path.read_bytes()
    assert content in (letter * 100_000 for letter in (b"a", b"b", b"c"))


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_takes_the_place_of_the_one_before(links, tmp_path, monkeypatch):
    if not links:

        def refuse(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
    for content in (b"first", b"first", b"second"):
        write_bytes(tmp_path / "run-ep=0.ckpt", content)
        for _ in range(2):
            add_name(tmp_path / "run-ep=0.ckpt", tmp_path / "last.ckpt")
        assert (tmp_path / "last.ckpt").read_bytes() == content
        assert names(tmp_path) == ["last.ckpt", "run-ep=0.ckpt"]


@pytest.mark.parametrize("place", ["file/below", "/proc/below"])
def test_a_folder_that_cannot_be_written_is_refused(place, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write '[^']*below' \("):
        make_folder(tmp_path / place)
    with pytest.raises(InputError, match=r"cannot write '[^']*below/x' \("):
        write_bytes(tmp_path / place / "x", b"")


def test_a_folder_without_the_space_that_is_needed_is_refused(tmp_path):
    make_folder(tmp_path / "a", 1000)
    with pytest.raises(InputError, match=r"bytes are free, a checkpoint has 1,152,921,504,6"):
        make_folder(tmp_path / "a", 2**60)
    with small_disk(0), pytest.raises(InputError, match="cannot write"):
        make_folder(tmp_path / "b")
    assert names(tmp_path / "b") == []


def test_json_has_null_for_what_is_no_finite_number(tmp_path):
    nan, inf = float("nan"), float("inf")
    write_json(tmp_path / "x.json", {"a": [nan, (inf, 1.5)], "b": {"c": -inf, "d": "nan"}, "e": 2})

    def refuse(name):
        raise AssertionError(name)

    content = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert content == {"a": [None, [None, 1.5]], "b": {"c": None, "d": "nan"}, "e": 2}


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.json")
    with pytest.raises(InputError, match="it is no regular file"):
        read_json(tmp_path / "metrics.json")
    (tmp_path / "logs/version_0").mkdir(parents=True)
    os.mkfifo(tmp_path / "logs/version_0/metrics.csv")
    assert read_logs(tmp_path) == {}
    write_json(tmp_path / "metrics.json", {})
    assert read_json(tmp_path / "metrics.json") == {}


def test_a_log_keeps_every_line_when_a_figure_comes_later(tmp_path):
    log = CSVLog(next_version(tmp_path / "logs"))
    log.log_metrics({"epoch": 0, "loss": 1.5}, step=3)
    log.log_metrics({"epoch": 0, "loss": 2.5, "new": 7.0}, step=4)
    log.log_metrics({"epoch": 1, "new": 8.0}, step=5)
    CSVLog(next_version(tmp_path / "logs")).log_metrics({"epoch": 2, "loss": 0.5}, step=6)
    assert names(tmp_path / "logs") == ["version_0", "version_1"]
    assert read_logs(tmp_path) == {"loss": {0: 2.5, 2: 0.5}, "new": {0: 7.0, 1: 8.0}}
    text = (tmp_path / "logs/version_0/metrics.csv").read_text()
    assert text == "epoch,loss,new,step\n0,1.5,,3\n0,2.5,7.0,4\n1,,8.0,5\n"


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"another": 1.0}])
def test_a_log_on_a_full_disk_loses_no_earlier_line_and_has_no_half_one(row, tmp_path):
    log = CSVLog(tmp_path / "log")
    log.log_metrics({"loss": 1.5}, step=1)
    text = (tmp_path / "log/metrics.csv").read_text()
    with small_disk(len(text) + 3), pytest.raises(InputError, match=r"cannot write .*metrics\.csv"):
        log.log_metrics(row, step=2)
    assert (tmp_path / "log/metrics.csv").read_text() == text
    assert names(tmp_path / "log") == ["metrics.csv"]


def test_a_line_cut_short_does_not_spoil_a_log(tmp_path):
    file = tmp_path / "logs/version_0/metrics.csv"
    write_bytes(file, b"epoch,loss,step\n0,1.5,3\n,2.5,4\n1,2.0,5\n1,3.e")
    (tmp_path / "logs/version_0 (copy)").mkdir()
    assert read_logs(tmp_path) == {"loss": {0: 1.5, 1: 2.0}}


def test_what_is_appended_is_there_or_not(tmp_path):
    append(tmp_path / "file", b"one\n")
    with small_disk(6), pytest.raises(InputError):
        append(tmp_path / "file", b"two\n")
    assert (tmp_path / "file").read_bytes() == b"one\n"
