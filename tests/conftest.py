import pytest
import torch

# Tiny tensors: a second thread costs more than it gives, and sums could depend on it.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
