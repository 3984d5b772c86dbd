"""Dual, gated and distilled versions of solo-learn's methods, one line each, and their rivals.

`X_dual`: one view gated, one dense. `X_gated`: both gated. `X_distilled`: both dense, and a gated
pass that regresses to their features. Each is registered in solo-learn's `METHODS` under that name,
momentum methods as well: there the student's views are meant.

`us3l` trains one network for every width. `simreg` and `seed` have no gates: a frozen teacher's
students, of the unification paper's Table 3.
"""

from ..solo_learn import METHODS, BarlowTwins, SimCLR, SimSiam, VICReg, register
from .gated import (
    DistilledMethod,
    DualMethod,
    GatedMethod,
    GatedViewsMethod,
    check_gated_backbone,
    global_mean,
    plain_method,
)
from .registry import GATED_METHODS, REFUSED, register_gated, register_own
from .seed import SEED
from .simreg import SimReg
from .student import StudentMethod, record_widths
from .us3l import US3L

VICRegDual, VICRegGated = register_gated(
    "vicreg",
    VICReg,
    "VICReg-Dual-Gating, the unification paper's method.",
    "The unification paper's Baseline-2.",
)
BarlowTwinsDual, BarlowTwinsGated = register_gated(
    "barlow", BarlowTwins, "BT-Dual of the unification paper's Table 4."
)
SimSiamDual, SimSiamGated = register_gated("simsiam", SimSiam, gated="The IMVIP paper's method.")
SimCLRDual, SimCLRGated = register_gated("simclr", SimCLR)
for _name in (
    *("nnclr", "nnsiam", "vibcreg", "wmse", "supcon"),
    *("byol", "mocov2plus", "mocov3", "nnbyol", "dino", "all4one"),
):
    if _name in METHODS:  # 1.0.2 lacks some
        register_gated(_name, METHODS[_name])
register_own("us3l", US3L)
register("simreg", SimReg)
register("seed", SEED)

__all__ = [
    "GATED_METHODS",
    "REFUSED",
    "SEED",
    "US3L",
    "BarlowTwinsDual",
    "BarlowTwinsGated",
    "DistilledMethod",
    "DualMethod",
    "GatedMethod",
    "GatedViewsMethod",
    "SimCLRDual",
    "SimCLRGated",
    "SimReg",
    "SimSiamDual",
    "SimSiamGated",
    "StudentMethod",
    "VICRegDual",
    "VICRegGated",
    "check_gated_backbone",
    "global_mean",
    "plain_method",
    "record_widths",
    "register_gated",
]
