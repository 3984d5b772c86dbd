"""solo-learn's modern names, whichever line is installed.

This is the only room that knows which line that is: `modern` re-exports GitHub's 1.0.6 to 1.0.8,
`legacy` gives PyPI's 1.0.2 the same names, signatures and config schema, and `fixes` mends what
is broken or slow on both, `lars` is the optimiser of both. The rest of the package is
written against the modern API. No solo-learn code is copied here.
"""

import warnings

from .line import WITH_CIFAR_STEM, installed_line

LINE = installed_line()

with warnings.catch_warnings():
    # solo-learn imports what PyTorch and timm have renamed since, and replaces models of timm's.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", message="Overwriting .* in registry")
    if LINE == "modern":
        from . import modern as installed
        from .modern import *
    else:
        from . import legacy as installed  # type: ignore[no-redef]
        from .legacy import *

from solo.losses import vicreg
from solo.methods import METHODS as SOLO_METHODS
from solo.methods import barlow_twins

from .fixes import mend, with_momentum

mend(BaseMethod, VICReg, vicreg, barlow_twins)


def register(name: str, method: type[BaseMethod]) -> None:
    """Give a method a name, in `METHODS` and in solo-learn's own, which on 1.0.2 is another one.

    Args:
        name: for the key `method` of a config.
        method: takes a config.
    """
    METHODS[name] = SOLO_METHODS[name] = method


__all__ = [
    *installed.__all__,
    "LINE",
    "SOLO_METHODS",
    "WITH_CIFAR_STEM",
    "installed_line",
    "register",
    "with_momentum",
]
