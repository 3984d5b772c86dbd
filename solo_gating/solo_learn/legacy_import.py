"""Importing 1.0.2, which was written for Lightning 1.4, beside today's Lightning."""

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator

import lightning.pytorch


@contextlib.contextmanager
def _lightning_1_names() -> Iterator[None]:
    """For the import only: `pytorch_lightning` is `lightning.pytorch`, and `pl_bolts` is there.

    1.0.2 takes nothing from `pl_bolts` but a scheduler, which `legacy` replaces. `distutils`, which
    left Python with 3.12 and which 1.0.2 imports for one function of a method not bridged here, is
    given only where it is missing.
    """
    names: dict[str, types.ModuleType] = {
        "pytorch_lightning": lightning.pytorch,
        "pytorch_lightning.callbacks": lightning.pytorch.callbacks,
    }
    for name in ("pl_bolts", "pl_bolts.optimizers", "pl_bolts.optimizers.lr_scheduler"):
        names[name] = types.ModuleType(name)
    names["pl_bolts.optimizers.lr_scheduler"].LinearWarmupCosineAnnealingLR = None  # type: ignore
    if importlib.util.find_spec("distutils") is None:
        names["distutils"] = types.ModuleType("distutils")
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def import_solo() -> types.ModuleType:
    """Import and return 1.0.2's top-level package.

    Raises:
        ImportError: if it cannot be imported; the message says what is missing.
    """
    with _lightning_1_names():
        return importlib.import_module("solo")
