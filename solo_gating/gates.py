"""Channel gates: which channels of a residual block one image needs."""

import torch
from torch import Tensor, nn


def logistic_noise(logits: Tensor) -> Tensor:
    """Logistic noise log u − log(1 − u), u ~ U(0, 1), one draw for each logit.

    Drawn in at least float32: in half precision u is often exactly 0 or 1.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    uniform = torch.rand(logits.shape, dtype=dtype, device=logits.device)
    return torch.logit(uniform, eps=torch.finfo(dtype).eps)


def gumbel_sigmoid(logits: Tensor, temperature: float) -> Tensor:
    """Sample binary masks with a straight-through gradient.

    soft = sigmoid((logits + noise) / temperature), hard = soft ≥ 0.5; the value is hard, the
    gradient that of soft. (Jang et al., "Categorical Reparameterization with Gumbel-Softmax",
    arXiv:1611.01144, for two categories; DGNet, `models/mask.py` of lfr-0531/DGNet.)

    Args:
        logits: any shape.
        temperature: τ > 0; the papers use 2/3.

    Returns:
        A tensor of zeros and ones, of the logits' shape, in at least float32.
    """
    soft = torch.sigmoid((logits + logistic_noise(logits)) / temperature)
    hard = (soft >= 0.5).to(soft.dtype)
    return hard - soft.detach() + soft


class ChannelGate(nn.Module):
    """Predicts from a block's input which of its hidden channels to compute.

    logits = W₂ · relu(BN(W₁ · avgpool(x))), with W₁ of C_in → C_in / reduction and
    W₂ of C_in / reduction → C_out (unification paper, Eq. 2; a squeeze-and-excitation
    bottleneck). In training the mask is sampled (`gumbel_sigmoid`); in evaluation it is
    logits ≥ threshold, so that it is known before the block's first convolution runs.

    Args:
        in_channels: C_in, channels of the block's input.
        out_channels: C_out, channels that the block's first convolution computes.
        reduction: r, the bottleneck's reduction rate.
        temperature: τ of the sampling in training.

    Attributes:
        threshold: of the logits in evaluation; 0 in the papers, higher means fewer channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, reduction: int = 4, temperature: float = 2 / 3
    ):
        super().__init__()
        hidden = max(1, in_channels // reduction)
        self.temperature = temperature
        self.threshold = 0.0
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(in_channels, hidden, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(hidden, out_channels, kernel_size=1, bias=False)
        for conv in (self.reduce, self.expand):  # as torchvision initialises a ResNet's
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def logits(self, x: Tensor) -> Tensor:
        """B × C_in × H × W → B × C_out; at least the threshold means: compute the channel."""
        hidden = self.relu(self.norm(self.reduce(self.pool(x))))
        return self.expand(hidden).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """B × C_in × H × W → the binary mask, B × C_out."""
        logits = self.logits(x)
        if self.training:
            return gumbel_sigmoid(logits, self.temperature)
        return (logits >= self.threshold).to(torch.promote_types(logits.dtype, torch.float32))
