"""A gated path as its backbone computes it, for gates that do more than mask."""

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solo_gating_runtime.encoder import Decisions, Results
from solo_gating_runtime.network import Floats, Network

from ...backbones import TwoPathResNet
from ...backbones.paths import Choice
from ...gates import Gate
from .forks import one_thread_if_forked


class WholeEngine:
    """Runs a backbone in PyTorch, image by image.

    Masks are those of gates that have some; where a `ConvolutionGate` computes channels in part, all
    of them are computed.

    Args:
        network: the gated path, for its shapes.
        backbone: a copy that nobody else changes.
    """

    is_compilable = False

    def __init__(self, network: Network, backbone: TwoPathResNet):
        self._net, self._backbone = network, backbone
        self._encoder: Any = backbone.encoder("gated")
        self._turning = threading.Lock()  # a threshold is the gates' own

    def decide(self, threshold: float, budget: float | None) -> Decisions:
        """As `TorchEngine.decide`."""
        thresholds = np.full(sum(self._net.hidden), threshold, np.float32)
        return Decisions(thresholds, np.full(len(self._net.hidden), -1), budget)

    @torch.no_grad()
    def run(
        self, images: Floats, decisions: Decisions | None, threads: int, maps: bool = False
    ) -> Results:
        """As `TorchEngine.run`."""
        assert decisions is not None
        results = Results.empty(self._net, images, maps)
        results.masks.fill(True)
        with self._turning, torch.autocast("cpu", enabled=False), one_thread_if_forked():
            for gate in self._backbone.gates:
                gate.threshold = float(decisions.thresholds[0])
            for index, image in enumerate(images):
                stages, masks = self._one(torch.from_numpy(image[None].copy()), decisions.budget)
                results.features[index] = self._backbone._pooled(stages[-1])[0].numpy()
                if masks:
                    results.masks[index] = torch.cat(masks, 1)[0].numpy() > 0
                for to, stage in zip(results.maps, stages, strict=False):
                    to[index] = stage[0].numpy()
        return results

    def _one(self, image: Tensor, budget: float | None) -> tuple[list[Tensor], list[Tensor]]:
        """The stages' outputs, and the masks over hidden channels."""
        choice = Choice("gated", None if budget is None else image.new_tensor(budget))
        stages: list[Tensor] = []
        self._encoder._maps(image, choice, stages)
        masks = choice.masks[len(self._backbone.stream_gates) :]
        return stages, masks if isinstance(self._backbone.gates[0], Gate) else []
