"""Two encoders that share nothing, as the two paths of one backbone."""

import copy
from typing import Any

from torch import Tensor, nn

from .paths import Choice
from .resnet import ResNet
from .two_path import GatedResNet, TwoPathResNet

_GATING = ("gate", "gate_kwargs", "reduction", "temperature", "open_start", "budget_range")


class TwoEncoderResNet(TwoPathResNet):
    """Two encoders that share nothing: the dense path is one, the gated path the other.

    The unification paper's Table 5 (2 × ResNet-18). The dense encoder has torchvision's parameter
    names; the gated one lives under `gated_net` and has a single set of BatchNorms.

    Args:
        layers: number of blocks of the four stages.
        separate_bn: no effect: the paths have nothing in common. Accepted like `GatedResNet`'s.
        path: the path taken outside of every scope.
        threshold: of the gates' logits in evaluation.
        budget: as in `TwoPathResNet`.
        kwargs: those of `ResNet`, for both encoders, and of `GatedResNet`'s gates.
    """

    def __init__(
        self,
        layers: list[int],
        *,
        separate_bn: bool = True,
        path: str = "dense",
        threshold: float = 0.0,
        budget: float | None = None,
        **kwargs: Any,
    ):
        gating = {key: kwargs.pop(key) for key in _GATING if key in kwargs}
        super().__init__(layers, path=path, **kwargs)
        self.gated_net = GatedResNet(
            layers,
            separate_bn=False,
            path="gated",
            threshold=threshold,
            budget=budget,
            **gating,
            **kwargs,
        )
        self.gated_net.fc = nn.Identity()
        self.budget_range = self.gated_net.budget_range

    def encoder(self, path: str) -> ResNet:
        """As in `ResNet`: the network itself, or the gated one."""
        return self.gated_net if path == "gated" else self

    @property
    def gated_only(self) -> list[nn.Module]:
        """The whole gated encoder."""
        return [self.gated_net]

    def _maps(self, x: Tensor, choice: Choice, stages: list[Tensor] | None = None) -> Tensor:
        if choice.path == "gated":
            return self.gated_net._maps(x, choice, stages)
        return super()._maps(x, choice, stages)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # A stem that solo-learn puts in is meant for both encoders; each has its own weights.
        if name in ("conv1", "maxpool") and "gated_net" in self._modules:
            setattr(self.gated_net, name, _reinitialised_copy(value))


def _reinitialised_copy(module: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(module)
    if isinstance(fresh, nn.Conv2d):
        fresh.reset_parameters()
    return fresh
