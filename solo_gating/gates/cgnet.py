"""Channel gating (CGNet): each output's partial sum decides about the rest of it."""

from typing import Any

import torch.fx
from torch import Tensor, nn

from .base import register_gate
from .partial_sum import PartialSumGate, in_float32

torch.fx.wrap("in_float32")


@register_gate("cgnet")
class ChannelGatingGate(PartialSumGate):
    """CGNet: U is the base's output behind an affine-free BatchNorm; all views have the same base.

    Hua et al., Channel Gating Neural Networks, NeurIPS 2019; `utils/cg_utils.py` and
    `scripts/train_cg.sh` of cornell-zhang/dnn-gating, whose defaults these are. The base is block
    diagonal: output group g reads input group g. In training an image's decisions depend on the others
    of its batch, through the BatchNorm. Arguments are those of `PartialSumGate`.

    Assumptions, where the published SimCLR figures say nothing: all 3×3 convolutions of a block are
    gated (the supervised default gates the first one), and input channels are not shuffled.
    """

    own_target = 1.0
    own_sparse_gradient = True

    def normalisation(self) -> nn.Module:
        """As in `PartialSumGate`."""
        return nn.BatchNorm2d(self.out_channels, affine=False)

    def normalised(self, salience: Tensor) -> Tensor:
        """As in `PartialSumGate`; a network in half precision has its statistics in that."""
        norm: Any = self.norm
        return in_float32(norm(salience.to(norm.running_mean.dtype)))
