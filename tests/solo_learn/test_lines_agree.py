"""Both solo-learn lines train alike: the same losses, step by step.

Only one line can be installed at a time, so they meet in `reference_losses.json`. It is written
on the modern line, with a checkout of vturrisi/solo-learn at <solo-learn>:

    PYTHONPATH=<solo-learn>:. python -m tests.solo_learn.test_lines_agree
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from solo_gating.solo_learn import LINE

from ..support.helpers import default_dtype, fixed_noise, random_batch, tiny_config, tiny_model

FILE = Path(__file__).with_name("reference_losses.json")
STEPS = 20
LARS = {
    "name": "lars",
    "lr": 0.05,
    "kwargs": {"momentum": 0.9, "eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True},
}
RUNS = {
    "vicreg_dual": {"optimizer": LARS},
    "barlow_dual": {"optimizer": LARS},
    "simsiam_gated": {"optimizer": {"lr": 0.05, "weight_decay": 1e-5}},
}


def set_weights(model):
    """From NumPy's frozen stream, in alphabetical order: both lines and every PyTorch get these."""
    rng = np.random.RandomState(7)
    norms = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            values = rng.standard_normal(tuple(weight.shape))
            values *= weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            weight.copy_(torch.from_numpy(values) + (name in norms))


def losses(method):
    gating = {"target_budget": 0.3, "sparsity_weight": 100.0}
    cfg = tiny_config(method, max_epochs=4, gating=gating, **RUNS[method])
    with default_dtype(torch.float64):
        model = tiny_model(cfg, steps=STEPS)
        set_weights(model)
        (optimizer,), (scheduler,) = model.configure_optimizers()
        curve = []
        for step in range(STEPS):
            model._trainer.current_epoch = step // 5
            batch = random_batch(seed=step % 5)

            def closure(step=step, batch=batch):
                optimizer.zero_grad()
                with fixed_noise(100 + step):
                    loss = model.training_step(batch, step)
                loss.backward()
                return loss

            curve.append(optimizer.step(closure).item())
            scheduler["scheduler"].step()
    return curve


@pytest.mark.parametrize("method", RUNS)
def test_losses_are_those_of_the_modern_line(method):
    expected = json.loads(FILE.read_text())[method]
    assert len(set(expected)) == STEPS
    assert losses(method) == pytest.approx(expected, rel=1e-9)


if __name__ == "__main__":
    if LINE != "modern":
        sys.exit("put a checkout of vturrisi/solo-learn first on PYTHONPATH")
    FILE.write_text(json.dumps({method: losses(method) for method in RUNS}, indent=1) + "\n")
