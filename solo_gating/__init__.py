"""solo-gating: one label-free pre-training, two encoders (dense and gated) in one set of weights.

Importing the package registers its methods and backbones with solo-learn, and does nothing else.
"""

from . import deploy
from .backbones import BACKBONES, create_backbone, keep_registered
from .checkpoints.encoder import load_encoder
from .errors import InputError
from .methods import GATED_METHODS
from .solo_learn import METHODS, BaseMethod

__version__ = "0.1.0"

keep_registered(BaseMethod._BACKBONES)

__all__ = [
    "BACKBONES",
    "GATED_METHODS",
    "METHODS",
    "BaseMethod",
    "InputError",
    "__version__",
    "create_backbone",
    "deploy",
    "load_encoder",
]
