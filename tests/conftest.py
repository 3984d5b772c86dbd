import os
import sys

import pytest
import torch

import solo_gating  # noqa: F401 (solo-learn 1.0.2 can be imported only after it)

# Tiny tensors: a second thread costs more than it gives, and sums could depend on it.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory):
    """The kernels that tests build, away from the user's own (unless the environment says where)."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one folder for all processes
        folder = folder.parent
    os.environ.setdefault("SOLO_GATING_CACHE", str(folder / "kernels"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Runs an entry point in this process, in an empty folder: exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run
