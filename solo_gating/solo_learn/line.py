"""What can be said of solo-learn without importing it, such as which of its lines is installed."""

import importlib.util
from pathlib import Path

# The data sets on which its ResNets get the CIFAR stem (`solo/methods/base.py`).
WITH_CIFAR_STEM = ("cifar10", "cifar100")

INSTALL_HINT = (
    "solo-learn is missing: install it with `pip install --no-deps solo-learn==1.0.2`, or put a "
    "checkout of vturrisi/solo-learn (1.0.6 to 1.0.8) first on PYTHONPATH"
)


def installed_line() -> str:
    """ "modern" (GitHub's 1.0.6 to 1.0.8, Hydra configs) or "legacy" (PyPI's 1.0.2, argparse).

    Raises:
        ImportError: if there is no solo-learn; the message says which command installs it.
    """
    spec = importlib.util.find_spec("solo")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(INSTALL_HINT)
    folder = Path(next(iter(spec.submodule_search_locations)))
    return "modern" if (folder / "args" / "pretrain.py").exists() else "legacy"
