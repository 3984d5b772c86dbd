"""Where the package's configs are, and what a pre-training does where its config says nothing."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def configs_folder() -> Path:
    """The package's configs, in an installed wheel or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


DEFAULTS: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
    OmegaConf.load(configs_folder() / "base" / "solo_learn.yaml")
)
