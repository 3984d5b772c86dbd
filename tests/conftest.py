import os

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
