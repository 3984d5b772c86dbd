"""How the kernel is built, cached and replaced: every file here is written to a folder of its own."""

import multiprocessing
import os
import shutil
import stat
import subprocess
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from solo_gating import deploy
from solo_gating.backbones import BACKBONES
from solo_gating_runtime import library

# What a compiler would make of it does not matter to the cache.
FAKE_COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
for last; do :; done
cp "{kernel}" "$last"
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A built kernel, without its checksum: the session's own, which other tests use, too."""
    library.load_library("portable", "float32")
    (file,) = Path(os.environ["SOLO_GATING_CACHE"]).glob("*-portable-float32-*")
    target = tmp_path_factory.mktemp("built") / "kernel"
    target.write_bytes(file.read_bytes()[:-32])
    return target


@pytest.fixture
def cache(tmp_path, monkeypatch, kernel):
    """An empty cache, and a compiler that only copies."""
    library._load.cache_clear()
    compiler = tmp_path / "compiler"
    compiler.write_text(FAKE_COMPILER.format(log=tmp_path / "log", kernel=kernel))
    compiler.chmod(0o755)
    folder = tmp_path / "cache"
    monkeypatch.setenv("SOLO_GATING_CACHE", str(folder))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SOLO_GATING_ISA", "portable")
    yield folder
    library._load.cache_clear()


def runs(cache):
    log = cache.parent / "log"
    return log.read_text().splitlines() if log.exists() else []


def encoder():
    torch.manual_seed(0)
    net = BACKBONES["resnet18_gated"](width=4, stem="cifar").eval()
    net.fc = nn.Identity()
    return net


def compiled_without_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = deploy.compile(encoder())
    assert fast.engine == "portable"
    return fast


def compiled_with_warning(message):
    with pytest.warns(RuntimeWarning, match=message) as caught:
        fast = deploy.compile(encoder())
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert fast.engine == "pytorch"
    x = torch.randn(2, 3, 8, 8)
    net = encoder()
    with torch.no_grad(), net.path("gated"):
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)


def test_it_is_built_once(cache):
    compiled_without_warning()
    library._load.cache_clear()  # as in another process
    compiled_without_warning()
    assert len(runs(cache)) == 1
    (file,) = cache.iterdir()  # and nothing else is left
    assert stat.S_ISREG(file.stat().st_mode)


def test_other_sources_flags_and_dtypes_have_files_of_their_own(cache, tmp_path, monkeypatch):
    compiled_without_warning()
    library.load_library("portable", "bfloat16")
    copy = tmp_path / "kernel-sources"
    shutil.copytree(library.SOURCES, copy)
    with (copy / "simd.h").open("a") as file:
        file.write("// newer\n")
    monkeypatch.setattr(library, "SOURCES", copy)
    library._load.cache_clear()
    compiled_without_warning()
    assert len(runs(cache)) == len(list(cache.iterdir())) == 3
    assert "-DGATED_BFLOAT16" in runs(cache)[1]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1]])
def test_a_damaged_file_is_built_anew(cache, damage):
    compiled_without_warning()
    (file,) = cache.iterdir()
    content = file.read_bytes()
    file.unlink()  # this process runs on it
    file.write_bytes(damage(content))
    library._load.cache_clear()
    compiled_without_warning()
    assert len(runs(cache)) == 2


def test_two_processes_at_once(cache):
    context = multiprocessing.get_context("fork")
    both, compile_kernel = context.Barrier(2), library._compile

    def build():
        library._compile = lambda *arguments: (both.wait(60), compile_kernel(*arguments))
        library._cached([], [], cache, "kernel.so")

    processes = [context.Process(target=build) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [file.name for file in cache.iterdir()] == ["kernel.so"]
    assert library._is_whole((cache / "kernel.so").read_bytes())
    assert len(runs(cache)) == 2


def test_a_forked_process_does_not_wait_for_a_thread_that_builds(cache):
    def build():
        assert deploy.compile(encoder()).engine == "portable"

    child = multiprocessing.get_context("fork").Process(target=build)
    with library._lock:  # as another thread holds it while it builds
        child.start()
        child.join(timeout=60)
    assert child.exitcode == 0


def test_without_a_compiler(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    compiled_with_warning("more slowly: /no/such/compiler failed")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    library._load.cache_clear()
    compiled_with_warning("no C\\+\\+ compiler was found")
    assert list(cache.iterdir()) == []


def test_a_compiler_that_fails(cache, monkeypatch):
    compiler = cache.parent / "compiler"
    compiler.write_text("#!/bin/sh\necho 'kernel.cpp:1: error: too old' >&2\nexit 3\n")
    compiled_with_warning(r"failed: kernel.cpp:1: error: too old \(exit status 3\)")
    compiler.write_text("#!/bin/sh\nexit 0\n")  # and makes nothing
    library._load.cache_clear()
    compiled_with_warning(r"failed: no message \(exit status 0\)")


def test_a_compiler_that_knows_no_flags_of_an_engine(cache, monkeypatch):
    monkeypatch.delenv("SOLO_GATING_ISA")
    monkeypatch.setattr(library, "cpu_features", lambda: frozenset(AVX512))
    compiler = cache.parent / "compiler"
    fake = compiler.read_text().splitlines()
    fake[1:1] = ['case "$*" in *-mavx512f*) echo "error: unknown -mavx512f" >&2; exit 1;; esac']
    compiler.write_text("\n".join(fake))
    message = r"on avx2 instead of avx512, more slowly: .* failed: error: unknown -mavx512f"
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=message):
            fast = deploy.compile(encoder())
        assert fast.engine == "avx2"
    assert [file.name.split("-")[2] for file in cache.iterdir()] == ["avx2"]
    # One that knows them and fails has another reason.
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *nothing.o) touch "$(echo "$*" | sed "s/.* //")"; '
        'exit 0;; esac\necho "error: no" >&2\nexit 1\n'
    )
    library._load.cache_clear()
    shutil.rmtree(cache)
    compiled_with_warning("PyTorch instead of its own kernel, more slowly: .* failed: error: no")


@pytest.mark.parametrize("command", ["c++ 'half", "''"])
def test_a_compiler_that_is_no_command(cache, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    compiled_with_warning("instead of its own kernel")


def test_a_compiler_that_speaks_another_encoding(cache, monkeypatch):
    (cache.parent / "compiler").write_text("#!/bin/sh\nprintf 'error: \\351\\n' >&2\nexit 1\n")
    compiled_with_warning("failed: error: .")


def test_a_blank_name_of_a_compiler_is_none(cache, monkeypatch):
    compiler = os.environ["CXX"]
    (cache.parent / "c++").symlink_to(compiler)
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", f"{cache.parent}:{os.environ['PATH']}")
    compiled_without_warning()


def test_a_compiler_that_makes_no_library(cache):
    (cache.parent / "compiler").write_text('#!/bin/sh\nfor last; do :; done\necho no > "$last"\n')
    compiled_with_warning("the kernel in .* cannot be used")


def test_a_failure_costs_its_time_once(cache):
    (cache.parent / "compiler").write_text(f"#!/bin/sh\necho run >> {cache.parent}/log\nexit 1\n")
    compiled_with_warning("more slowly")
    first = len(runs(cache))
    compiled_with_warning("more slowly")
    assert len(runs(cache)) == first > 0


def test_a_compiler_without_openmp(cache, kernel):
    (cache.parent / "compiler").write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nfor last; do :; done\n'
        f'cp "{kernel}" "$last"\n'
    )
    compiled_without_warning()


def test_a_cache_folder_that_cannot_be_made(cache, monkeypatch):
    (cache.parent / "file").write_text("")
    monkeypatch.setenv("SOLO_GATING_CACHE", str(cache.parent / "file" / "folder"))
    compiled_with_warning("the cache folder .* cannot be written .*SOLO_GATING_CACHE")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_folder(cache):
    cache.mkdir()
    cache.chmod(0o500)
    compiled_with_warning("cannot be written")


def test_a_full_cache_folder_that_is_read_only_serves(cache, monkeypatch):
    compiled_without_warning()
    library._load.cache_clear()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(library.tempfile, "TemporaryDirectory", refuse)
    compiled_without_warning()
    next(cache.iterdir()).unlink()
    library._load.cache_clear()
    compiled_with_warning("the cache folder .* cannot be written \\(Permission denied\\)")


@pytest.mark.parametrize("name", [".", "sub/folder", "~/folder"])
def test_a_folder_of_any_spelling(cache, monkeypatch, tmp_path, name):
    monkeypatch.setenv("SOLO_GATING_CACHE", name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir(mode=0o700)
    monkeypatch.chdir(tmp_path / "work")
    compiled_without_warning()
    parent = tmp_path / ("home" if name.startswith("~") else "work")
    assert len(list(parent.glob("**/kernel-*.so"))) == 1
    library._load.cache_clear()
    monkeypatch.chdir("/")  # what is loaded stays loaded, and another folder is another one
    monkeypatch.setenv("SOLO_GATING_CACHE", str(parent / name.removeprefix("~/")))
    compiled_without_warning()
    assert len(runs(cache)) == 1


@pytest.mark.parametrize("home", [None, "/dev/null/home"])
def test_without_a_home_it_is_built_in_a_folder_for_temporary_files(
    cache, monkeypatch, tmp_path, home
):
    monkeypatch.delenv("SOLO_GATING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", home or "")
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user without an entry
    monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        compiled_without_warning()
        library._load.cache_clear()
    folder = tmp_path / f"solo-gating-{os.geteuid()}"
    assert len(list(folder.iterdir())) == len(runs(cache)) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_current_folder_that_was_deleted(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("SOLO_GATING_CACHE", ".")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    compiled_with_warning("there is no cache folder")


@pytest.fixture
def planted(cache, tmp_path):
    """A whole library under the kernel's name; its constructor leaves a file when it runs."""
    compiled_without_warning()
    library._load.cache_clear()
    (file,) = cache.iterdir()
    source, ran = tmp_path / "planted.c", tmp_path / "ran"
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void f(void)"
        f'{{ fclose(fopen("{ran}", "w")); }}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", file, source], check=True)
    content = file.read_bytes()
    file.write_bytes(content + library.hashlib.sha256(content).digest())
    file.chmod(0o755)
    yield file
    assert not ran.exists()


def give_away(path, monkeypatch):
    """Make a file or folder somebody else's."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1, follow_symlinks=False)
    else:  # then it is us who are somebody else
        monkeypatch.setattr(library.os, "geteuid", lambda: 12345)


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_a_library_of_somebody_else_is_not_loaded(planted, monkeypatch, what):
    path = planted if what == "file" else planted.parent
    if what == "link":
        path = planted.parent.parent / "link"
        path.symlink_to(planted.parent)
        monkeypatch.setenv("SOLO_GATING_CACHE", str(path))
    give_away(path, monkeypatch)
    compiled_with_warning("belongs to another user, .*; expected one that only you or root")


@pytest.mark.parametrize("spelling", [".", "../cache"])
def test_nor_from_a_relative_folder(planted, monkeypatch, spelling):
    monkeypatch.chdir(planted.parent)
    monkeypatch.setenv("SOLO_GATING_CACHE", spelling)
    give_away(planted, monkeypatch)
    compiled_with_warning("belongs to another user")


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o722])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_library_that_others_may_write_to_is_not_loaded(planted, what, mode):
    (planted if what == "file" else planted.parent).chmod(mode)
    compiled_with_warning(f"may be written by other users \\(mode {mode:o}\\)")
    assert len(list(planted.parent.iterdir())) == 1  # and nothing is built there


def test_a_link_to_a_library_is_replaced_and_a_pipe_is_not_waited_for(planted):
    elsewhere = planted.parent.parent / "elsewhere.so"
    planted.rename(elsewhere)
    planted.symlink_to(elsewhere)
    compiled_without_warning()
    assert not planted.is_symlink()
    planted.unlink()
    os.mkfifo(planted)
    library._load.cache_clear()
    compiled_without_warning()
    assert planted.is_file()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="folders cannot be held")
def test_what_was_checked_is_what_is_loaded(planted, monkeypatch):
    whole = library._is_whole
    mine = planted.parent.with_name("mine")

    def swap(content):  # at the last moment
        if not mine.exists():
            planted.parent.rename(mine)
            planted.parent.mkdir()
            (mine / planted.name).rename(planted)
            return False
        return whole(content)

    monkeypatch.setattr(library, "_is_whole", swap)
    compiled_without_warning()
    assert len(list(mine.iterdir())) == 1


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_any_umask(cache, umask):
    before = os.umask(umask)
    try:
        for _ in range(2):
            compiled_without_warning()
            library._load.cache_clear()
    finally:
        os.umask(before)
    assert len(runs(cache)) == 1


def test_a_folder_that_is_mended_serves_at_once(cache):
    cache.mkdir()
    cache.chmod(0o777)
    compiled_with_warning("may be written by other users")
    cache.chmod(0o755)
    compiled_without_warning()


def test_what_a_killed_build_left_is_removed(cache):
    cache.mkdir(mode=0o700)
    for age in (0, 7200):
        folder = cache / f"build-{age}"
        folder.mkdir()
        (folder / "kernel.so").write_text("half")
        os.utime(folder, (time.time() - age,) * 2)
    compiled_without_warning()
    assert (cache / "build-0").exists()  # of a build that may be running
    assert not (cache / "build-7200").exists()


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SOLO_GATING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.cache_folder() == tmp_path / "solo-gating"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(library.cache_folder()) == "/home/someone/.cache/solo-gating"


AVX2 = {"avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512vl", "avx512dq", "avx512bw"}


@pytest.mark.parametrize(
    ("dtype", "features", "engines"),
    [
        ("float32", AVX512, ("avx512", "avx2", "portable")),
        ("float32", AVX512 - {"avx512bw"}, ("avx2", "portable")),
        ("float32", AVX2 - {"fma"}, ("portable",)),
        ("float32", {"asimd", "asimddp"}, ("portable",)),
        ("bfloat16", AVX2, ("avx2", "portable")),
        ("bfloat16", AVX512 | {"avx512_bf16"}, ("avx512_bf16", "avx512", "avx2", "portable")),
        ("bfloat16", {"asimd", "bf16"}, ("neon_bf16", "portable")),
        ("int8", AVX512 | {"avx512_vnni"}, ("avx512_vnni", "avx512", "avx2", "portable")),
        ("int8", AVX2 | {"avx_vnni"}, ("avx_vnni", "avx2", "portable")),
        ("int8", {"asimd", "asimddp"}, ("neon_dot", "portable")),
        ("int8", set(), ("portable",)),
    ],
)
def test_the_best_engine_that_the_cpu_has_is_taken(monkeypatch, dtype, features, engines):
    monkeypatch.delenv("SOLO_GATING_ISA", raising=False)
    monkeypatch.setattr(library, "cpu_features", lambda: frozenset(features))
    assert library.supported_engines(dtype) == engines
    assert library.chosen_engine(dtype=dtype) == engines[0]


def test_cpu_features_are_those_that_pytorch_finds():
    assert ("avx2" in library.cpu_features()) == torch.cpu._is_avx2_supported()
    assert ("avx512f" in library.cpu_features()) == torch.cpu._is_avx512_supported()


def test_the_environment_may_ask_for_pytorch(monkeypatch):
    monkeypatch.setenv("SOLO_GATING_ISA", "pytorch")
    assert library.chosen_engine(also=("pytorch",)) == "pytorch"
    with pytest.raises(library.InputError, match="SOLO_GATING_ISA: got 'pytorch', expected here"):
        library.chosen_engine()
    assert deploy.compile(encoder()).engine == "pytorch"
