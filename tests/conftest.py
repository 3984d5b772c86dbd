import pytest
import torch

import solo_gating  # noqa: F401 (solo-learn 1.0.2 can be imported only after it)

# Tiny tensors: a second thread costs more than it gives, and sums could depend on it.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
