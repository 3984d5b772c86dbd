import os
import sys

import pytest

# Compiling umap-learn takes a minute, its few points here a second without.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")


def pytest_collectstart():
    """Not at the top: the process that only hands test files to others needs none of it."""
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
    import torch

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


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw no curves, which takes longer than some of them."""
    monkeypatch.setattr("solo_gating.training.pretrain.draw_curves", lambda *args: None)


# With what takes longest last, one process would wait for the other.
FIRST = (
    *("continuation", "pretrain", "processes", "distributed", "performance", "engine"),
    *("every_budget", "strangers", "methods", "export", "cli", "evaluation", "no_waiting"),
    *("randomness", "benchmark", "benchmark_train", "umap", "import", "wheel"),
)


def pytest_collection_modifyitems(items):
    """The files that take longest first; `--no-loadscope-reorder` keeps this order."""
    order = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
