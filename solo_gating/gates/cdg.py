"""Contrastive dual gating (CDG): two views, two bases, decisions for each pixel."""

from typing import Any

from torch import nn

from ..checks import one_of, require
from ..errors import InputError
from .base import register_gate
from .partial_sum import InstanceNormalisation, PartialSumGate

BASES = ("diagonal", "antidiagonal")


@register_gate("cdg")
class ContrastiveDualGate(PartialSumGate):
    """CDG: the views of a training step have different bases; U is the base, instance-normalised.

    Meng et al., Contrastive Dual Gating, CVPR 2022. In the diagonal base output group g reads input group
    g, in the anti-diagonal one group G − 1 − g: for an even G they have no weight in common. View 0 has
    the first, view 1 the second, and so on in turn. An image's decisions do not depend on others.

    No code of CDG's is public. Assumptions, partly from its first author's supervised
    `models/cg.py` of mengjian0502/StructuredCG_RRAM: the normalisation is an instance norm; all 3×3
    convolutions of a block are gated; both views share τ and BatchNorm statistics; inference has the
    diagonal base; τ starts at 0, its target is 0.99, λ is 10⁻⁴, and α is 2; with a part of the overlap
    it is the last output groups that read the anti-diagonal ones. A patent application covers the
    method (US 2024/0135256); its status was not checked.

    Args:
        in_channels: C_in of the convolution.
        out_channels: C_out.
        overlap: share of the output groups whose base is the diagonal one in both views; 0 as published,
            and 1, 0.75 and 0.5 in its comparison.
        inference: the base in evaluation, "diagonal" or "antidiagonal".
        kwargs: those of `PartialSumGate`.

    Raises:
        InputError: for an odd G, whose two bases meet, or an overlap that is no whole number of groups.
    """

    own_target = 0.99
    views = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        overlap: float = 0.0,
        inference: str = "diagonal",
        **kwargs: Any,
    ):
        super().__init__(in_channels, out_channels, **kwargs)
        if self.groups % 2:
            raise InputError(
                f"gate_kwargs.groups: got {self.groups}, expected an even number: the views' bases "
                "of an odd one meet in its middle"
            )
        require(
            "gate_kwargs.overlap",
            overlap,
            lambda v: v in [n / self.groups for n in range(self.groups + 1)],
            f"a multiple of 1/{self.groups} from 0 to 1",
        )
        one_of("gate_kwargs.inference", inference, BASES)
        self.overlap, self.inference = overlap, inference

    def normalisation(self) -> nn.Module:
        """As in `PartialSumGate`."""
        return InstanceNormalisation()

    def sources(self, view: int) -> tuple[int, ...]:
        """As in `PartialSumGate`; in evaluation those of `inference`, whatever the view."""
        second = view % 2 == 1 if self.training else self.inference == "antidiagonal"
        diagonal = round(self.overlap * self.groups) if second else self.groups
        return tuple(g if g < diagonal else self.groups - 1 - g for g in range(self.groups))
