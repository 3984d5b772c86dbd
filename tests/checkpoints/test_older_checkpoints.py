"""Checkpoints and losses of version 0.1.0, from before gates had kinds (`fixtures/before_gate_kinds`).

`fixed` and `range` are `vicreg_dual` on the embedded digits, width 3, two epochs with LARS; beside
each is what its backbone computed in float64. `losses.json` holds the losses of 20 steps of SGD, from
weights that do not depend on how a network draws its own.
"""

import json
import math

import numpy as np
import pytest
import torch

from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.flops import count_flops, selected_channels

from ..support.helpers import ROOT, fixed_noise, random_batch, tiny_config, tiny_model

FOLDER = ROOT / "tests/fixtures/before_gate_kinds"
SIZE = (13, 17)
LOSSES = json.loads((FOLDER / "losses.json").read_text())
CASES = {
    "vicreg_dual": {},
    "vicreg_dual range per image": {
        "gating": {"target_budget": [0.1, 0.9], "budget_per_image": True, "budget_anneal": 0.5}
    },
    "vicreg_dual two encoders": {"backbone": {"name": "resnet18_two_encoders"}},
    "barlow_dual": {},
    "simsiam_gated": {"gating": {"separate_bn": False}},
}


@pytest.mark.parametrize(
    ("kind", "budgets"), [("fixed", [None]), ("range", [0.1, 0.5, 0.9])], ids=["fixed", "range"]
)
def test_a_checkpoint_gives_the_same_features_masks_and_flops(kind, budgets):
    expected = np.load(FOLDER / kind / "expected.npz")
    backbone = encoder_of(FOLDER / kind / "last.ckpt").backbone.double()
    images = torch.from_numpy(np.random.RandomState(0).standard_normal((6, 3, *SIZE)))
    flops = count_flops(backbone, SIZE)
    assert flops.dense == expected["dense_flops"]
    assert flops.decisions == expected["gate_flops"]
    with torch.no_grad():
        np.testing.assert_allclose(backbone(images), expected["dense"], rtol=1e-9, atol=1e-12)
        for budget in budgets:
            for threshold in (0.0, 0.3):
                backbone.threshold = threshold
                with backbone.path("gated", budget=budget) as passes:
                    features = backbone(images)
                at = f"{budget}_{threshold}"
                np.testing.assert_allclose(
                    features, expected[f"features_{at}"], rtol=1e-9, atol=1e-12
                )
                masks = passes[-1].masks
                assert (torch.cat(masks, dim=1).bool().numpy() == expected[f"masks_{at}"]).all()
                assert (
                    flops.gated(selected_channels(masks).long()).numpy() == expected[f"flops_{at}"]
                ).all()


def set_weights(model):
    """Weights that follow from their names' order alone; BatchNorms and gates' biases stay as they start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim > 1:
                drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weight.copy_(drawn / math.sqrt(weight[0].numel()))
            elif name.endswith("bias") and not name.startswith("backbone."):
                weight.zero_()


@pytest.mark.parametrize("case", CASES)
def test_losses_of_twenty_steps_are_the_same(case):
    model = tiny_model(tiny_config(case.split()[0], **CASES[case]))
    set_weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    with fixed_noise(3):
        for step in range(20):
            model._trainer.global_step = step
            loss = model.training_step(random_batch(seed=step), 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses == pytest.approx(LOSSES[case], rel=1e-9)
