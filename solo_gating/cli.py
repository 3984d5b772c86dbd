"""What every entry point shares: Hydra, `--help`, and errors in one sentence."""

import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from .errors import InputError
from .gating_config import check_key
from .training.callbacks import NonFiniteLossError

# Like solo-learn's scripts: no folder and no log file of Hydra's own.
_QUIET_HYDRA = (
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
)


def configs_folder() -> Path:
    """The package's configs, in an installed wheel or in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """The configs that `--config-name` accepts without `--config-path`."""
    return sorted(file.stem for file in configs_folder().glob("*.yaml"))


def run(task: Callable[[DictConfig], Any]) -> None:
    """Run an entry point under Hydra, with the process's arguments.

    `--help` without a config prints the entry point's module docstring and the configs; a user's
    mistake (`InputError`) or a loss that is not finite ends the process with one sentence.

    Args:
        task: takes the composed config; what it returns is dropped.
    """
    arguments = sys.argv[1:]
    has_config = any(re.match(r"(--config-name|-cn|-cp|--config-path)\b", a) for a in arguments)
    if not has_config:
        explanation = inspect.getdoc(sys.modules[task.__module__]) or ""
        if {"-h", "--help"} & set(arguments):
            print(f"{explanation}\n\nconfigs:\n  " + "\n  ".join(config_names()))
            return
        _fail(f"--config-name: missing, accepted are {', '.join(config_names())}")
    # Lightning starts DDP's other processes with this argv, which then holds them already.
    sys.argv += [flag for flag in _QUIET_HYDRA if flag not in arguments]
    try:
        for argument in arguments:
            if key := re.match(r"\+{0,2}gating\.(\w+)=", argument):
                check_key(key[1])
        hydra.main(version_base="1.2", config_path=str(configs_folder()))(_guarded(task))()
    except InputError as error:
        _fail(str(error))


def _guarded(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], None]:
    # Inside Hydra, which would print a stack trace for any exception.
    def guarded(cfg: DictConfig) -> None:
        try:
            task(cfg)
        except (InputError, NonFiniteLossError) as error:
            if os.environ.get("HYDRA_FULL_ERROR"):
                raise
            _fail(str(error))
        except SystemExit as stop:  # how Lightning ends at Ctrl-C
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            _fail(
                "interrupted; the same command with auto_resume.enabled=true continues from the "
                "last checkpoint",
                130,
            )

    return guarded


def _fail(sentence: str, code: int = 2) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)
