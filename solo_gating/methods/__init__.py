"""Dual and gated versions of solo-learn's two-view methods, one line each.

`X_dual`: one view gated, one dense. `X_gated`: both gated. Each is registered in solo-learn's
`METHODS` under that name.
"""

from ..solo_learn import METHODS, BarlowTwins, BaseMethod, SimCLR, SimSiam, VICReg, register
from .gated import (
    DualMethod,
    GatedMethod,
    GatedViewsMethod,
    check_gated_backbone,
    global_mean,
)


class VICRegDual(VICReg, DualMethod):
    """VICReg-Dual-Gating, the unification paper's method."""


class VICRegGated(VICReg, GatedViewsMethod):
    """The unification paper's Baseline-2."""


class BarlowTwinsDual(BarlowTwins, DualMethod):
    """BT-Dual of the unification paper's Table 4."""


class BarlowTwinsGated(BarlowTwins, GatedViewsMethod):
    """Barlow Twins with both views gated."""


class SimSiamDual(SimSiam, DualMethod):
    """SimSiam with one view gated and one dense."""


class SimSiamGated(SimSiam, GatedViewsMethod):
    """The IMVIP paper's method."""


class SimCLRDual(SimCLR, DualMethod):
    """SimCLR with one view gated and one dense."""


class SimCLRGated(SimCLR, GatedViewsMethod):
    """SimCLR with both views gated."""


GATED_METHODS: dict[str, type[GatedMethod]] = {
    "vicreg_dual": VICRegDual,
    "vicreg_gated": VICRegGated,
    "barlow_dual": BarlowTwinsDual,
    "barlow_gated": BarlowTwinsGated,
    "simsiam_dual": SimSiamDual,
    "simsiam_gated": SimSiamGated,
    "simclr_dual": SimCLRDual,
    "simclr_gated": SimCLRGated,
}


def register_gated(name: str, method: type[BaseMethod]) -> None:
    """Register `<name>_dual` and `<name>_gated` for one more method of solo-learn.

    Args:
        name: as in `METHODS`.
        method: a method whose `training_step` calls its base's once, as solo-learn's
            non-momentum methods do; momentum methods have a second backbone and are not covered.
    """
    for kind, mixin in (("dual", DualMethod), ("gated", GatedViewsMethod)):
        title = f"{method.__name__}{kind.capitalize()}"
        cls = type(title, (method, mixin), {"__doc__": mixin.__doc__, "__module__": __name__})
        GATED_METHODS[f"{name}_{kind}"] = cls
        register(f"{name}_{kind}", cls)


for _name, _method in GATED_METHODS.items():
    register(_name, _method)
for _name in ("nnclr", "nnsiam", "vibcreg", "wmse"):
    if _name in METHODS:  # 1.0.2 has no VIbCReg
        register_gated(_name, METHODS[_name])

__all__ = [
    "GATED_METHODS",
    "BarlowTwinsDual",
    "BarlowTwinsGated",
    "DualMethod",
    "GatedMethod",
    "GatedViewsMethod",
    "SimCLRDual",
    "SimCLRGated",
    "SimSiamDual",
    "SimSiamGated",
    "VICRegDual",
    "VICRegGated",
    "check_gated_backbone",
    "global_mean",
    "register_gated",
]
