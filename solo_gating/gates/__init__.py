"""Gates: which channels of a convolution one image needs. One file for each kind.

| kind | chooses | for an image it costs |
|---|---|---|
| `channel` (default) | channels whose own logit reaches a threshold | what the image needs |
| `top_k` | the ⌈b·C⌉ channels with the largest scores | the same for every image |
| `fixed` | the first ⌈b·C⌉ channels | the same for every image, and no decision |
| `slimmable` | the same, of all layers, between blocks too | as `fixed`, b² of the dense network |
| `fbs` | the ⌈b·C⌉ channels with the largest scores, which multiply them | the same for every image |
| `dgc` | input channels, for each group of output channels | the same for every image |
| `cgnet` | pixels of each channel where more than a base is computed | what the image needs |
| `cdg` | the same, with other bases for other views | what the image needs |
| `scdg` | the same, for eight channels at a time | what the image needs |

The last five are systems to compare with (docs/guide/gate_kinds.md). Another kind is a subclass of `Gate`
or of `ConvolutionGate` with a name; docs/guide/extend.md shows one.
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
from .cdg import ContrastiveDualGate
from .cgnet import ChannelGatingGate
from .channel import ChannelGate, gumbel_sigmoid, thresholded
from .dgc import DynamicGroupGate
from .fbs import BoostingGate
from .fixed import FixedGate, SlimmableGate
from .partial_sum import PartialSumGate
from .scdg import StructuredDualGate
from .scores import BudgetEmbedding, ScoringGate, logistic_noise, spatial_mean
from .top_k import TopKGate

__all__ = [
    "GATES",
    "BaseGate",
    "BoostingGate",
    "BudgetEmbedding",
    "ChannelGate",
    "ChannelGatingGate",
    "ContrastiveDualGate",
    "ConvolutionGate",
    "Decision",
    "DynamicGroupGate",
    "FixedGate",
    "FoldedEmbedding",
    "FoldedGate",
    "Gate",
    "GatedOutput",
    "PartialSumGate",
    "ScoringGate",
    "SlimmableGate",
    "StructuredDualGate",
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
