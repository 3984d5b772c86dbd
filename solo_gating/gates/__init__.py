"""Gates: which channels of a convolution one image needs. One file for each kind.

| kind | chooses | for an image it costs |
|---|---|---|
| `channel` (default) | channels whose own logit reaches a threshold | what the image needs |
| `top_k` | the ⌈b·C⌉ channels with the largest scores | the same for every image |
| `fixed` | the first ⌈b·C⌉ channels | the same for every image, and no decision |
| `slimmable` | the same, of all layers, between blocks too | as `fixed`, b² of the dense network |

Another kind is a subclass of `Gate` with a name; docs/guide/extend.md shows one.
"""

from .base import (
    GATES,
    BaseGate,
    ConvolutionGate,
    Decision,
    FoldedEmbedding,
    FoldedGate,
    Gate,
    GatedOutput,
    check_gate_kwargs,
    gate_class,
    make_gate,
    register_gate,
)
from .channel import ChannelGate, gumbel_sigmoid, thresholded
from .fixed import FixedGate, SlimmableGate
from .scores import BudgetEmbedding, ScoringGate, logistic_noise, spatial_mean
from .top_k import TopKGate

__all__ = [
    "GATES",
    "BaseGate",
    "BudgetEmbedding",
    "ChannelGate",
    "ConvolutionGate",
    "Decision",
    "FixedGate",
    "FoldedEmbedding",
    "FoldedGate",
    "Gate",
    "GatedOutput",
    "ScoringGate",
    "SlimmableGate",
    "TopKGate",
    "check_gate_kwargs",
    "gate_class",
    "gumbel_sigmoid",
    "logistic_noise",
    "make_gate",
    "register_gate",
    "spatial_mean",
    "thresholded",
]
