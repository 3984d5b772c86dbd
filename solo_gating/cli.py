"""What every entry point shares: Hydra, `--help`, and errors in one sentence."""

import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from .errors import InputError
from .gating_config import check_key
from .training.callbacks import NonFiniteLossError
from .training.processes import CONTINUE, ending_signal, lost_process, signals_as_interrupts

EVALUATIONS = ("linear", "knn", "policy", "umap")

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


def config_names(evaluation: str | None = None) -> list[str]:
    """The configs that `--config-name` accepts without `--config-path`.

    Args:
        evaluation: "linear", "knn", ... for that evaluation's; None for those of pre-training.
    """
    names = sorted(file.stem for file in configs_folder().glob("*.yaml"))
    kinds = {name: name.split("_")[0] for name in names}
    if evaluation is None:
        return [name for name in names if kinds[name] not in (*EVALUATIONS, "run")]
    return [name for name in names if kinds[name] == evaluation]


def composed(name: str, overrides: list[str]) -> DictConfig:
    """One of the package's configs, for entry points that are not Hydra's own.

    Args:
        name: as `--config-name` takes it.
        overrides: `key=value`, in Hydra's language.

    Raises:
        InputError: for an override that the config does not take.
    """
    try:
        with hydra.initialize_config_dir(str(configs_folder()), version_base="1.2"):
            return hydra.compose(name, overrides=[*overrides, "hydra.run.dir=."])
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(str(error).splitlines()[0]) from error


def run(
    task: Callable[[DictConfig], Any],
    evaluation: str | None = None,
    flags: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Run an entry point under Hydra, with the process's arguments.

    `--help` without a config prints the entry point's module docstring and the configs; a user's
    mistake (`InputError`) or a loss that is not finite ends the process with one sentence.

    Args:
        task: takes the composed config; what it returns is dropped.
        evaluation: the evaluation it does, whose config of the same name is the default; None for
            what needs a pre-training's config.
        flags: config keys that may also be given as `--key value` or, where this says the value,
            as a bare `--key`.
    """
    sys.argv[1:] = arguments = _flags_to_overrides(sys.argv[1:], flags)
    has_config = any(re.match(r"(--config-name|-cn|-cp|--config-path)\b", a) for a in arguments)
    if not has_config:
        explanation = inspect.getdoc(sys.modules[task.__module__]) or ""
        names = config_names(evaluation)
        if {"-h", "--help"} & set(arguments):
            print(f"{explanation}\n\nconfigs:\n  " + "\n  ".join(names))
            return
        if evaluation is None:
            _fail(f"--config-name: missing, accepted are {', '.join(names)}")
    # Lightning starts DDP's other processes with this argv, which then holds them already.
    sys.argv += [flag for flag in _QUIET_HYDRA if flag not in arguments]
    try:
        for argument in arguments:
            if key := re.match(r"\+{0,2}gating\.(\w+)=", argument):
                check_key(key[1])
        hydra.main(version_base="1.2", config_path=str(configs_folder()), config_name=evaluation)(
            _guarded(task, evaluation)
        )()
    except InputError as error:
        _fail(str(error))


def _flags_to_overrides(arguments: list[str], flags: Mapping[str, str | None]) -> list[str]:
    """`--calibrate 0.3` and `--calibrate=0.3` become `calibrate=0.3`, which is Hydra's language."""
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in flags:
            overrides.append(argument)
            continue
        if "=" not in argument:
            value = flags[name] or next(rest, "")
        if not value or value.startswith("--"):
            _fail(f"--{name}: needs a value")
        overrides.append(f"{name}={value}")
    return overrides


def _guarded(
    task: Callable[[DictConfig], Any], evaluation: str | None
) -> Callable[[DictConfig], None]:
    # Inside Hydra, which would print a stack trace for any exception.
    def guarded(cfg: DictConfig) -> None:
        with one_sentence_errors(evaluation):
            task(cfg)

    return guarded


@contextmanager
def one_sentence_errors(evaluation: str | None = None) -> Iterator[None]:
    """End the process with one sentence for what is no fault of the program.

    That is a user's mistake, a loss that is not finite, the death of another process, Ctrl-C, or a
    signal: SIGTERM and SIGHUP end it as Ctrl-C does, with 128 + their number as the exit code.
    With HYDRA_FULL_ERROR=1 in the environment the stack trace is shown.

    Args:
        evaluation: as in `run`.
    """
    try:
        with signals_as_interrupts():
            yield
    except (InputError, NonFiniteLossError) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        _fail(str(error))
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        _fail(f"{lost}; {_how_to_continue(evaluation)}", 1)
    except (SystemExit, KeyboardInterrupt) as stop:
        number = ending_signal(stop)
        if number is None:
            raise
        what = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        _fail(f"{what}; {_how_to_continue(evaluation)}", 128 + number)


def _how_to_continue(evaluation: str | None) -> str:
    return CONTINUE if evaluation is None else "the same command continues after what was finished"


def _fail(sentence: str, code: int = 2) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)
