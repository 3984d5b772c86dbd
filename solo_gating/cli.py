"""What every entry point shares: Hydra, `--help`, and errors in one sentence."""

import difflib
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from .config.arguments import ALIASES, Arguments, flags_to_overrides, read_arguments, todays_name
from .config.compose import (
    config_names,
    config_of_checkpoint,
    hydra_sentence,
    known_keys,
)
from .config.defaults import configs_folder
from .config.gating import check_key
from .config.schema import EVALUATIONS, PRETRAINING, TRUTH
from .distributed import rank_and_processes
from .errors import InputError
from .process_state import process_state_kept
from .terminal import lasting_streams
from .training.callbacks import NonFiniteLossError
from .training.processes import CONTINUE, ending_signal, lost_process, signals_as_interrupts

_FULL_ERROR = "HYDRA_FULL_ERROR"

# Like solo-learn's scripts: no folder and no log file of Hydra's own.
_QUIET_HYDRA = (
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
)


def run(
    task: Callable[[DictConfig], Any],
    evaluation: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Run an entry point under Hydra, with the process's arguments.

    `--help` without a config prints the entry point's module docstring and the configs; a user's
    mistake (`InputError`) or a loss that is not finite ends the process with one sentence. Of a
    sweep (`--multirun`) every job is run; if some fail, the process ends with a sentence that names
    them.

    Args:
        task: takes the composed config; what it returns is dropped.
        evaluation: the evaluation it does, whose config of the same name is the default; None for
            what needs a pre-training's config.
        checkpoint: the key of a checkpoint, for which `checkpoint` is short, and whose args.json is
            the config where none is named.
    """
    with lasting_streams(), process_state_kept():
        try:
            arguments = read_arguments(_overrides(sys.argv[1:], evaluation, checkpoint))
            config = evaluation
            if _needs_config(arguments):
                if checkpoint is not None and "help" not in arguments:
                    config = config_of_checkpoint(arguments, checkpoint)
                if _explained(task, arguments, evaluation, config):
                    return
            _run_hydra(task, arguments, evaluation, config)
        except InputError as error:
            if os.environ.get(_FULL_ERROR):
                raise
            _fail(str(error))


def _overrides(typed: list[str], evaluation: str | None, checkpoint: str | None) -> list[str]:
    """What was typed, in Hydra's grammar and with today's names."""
    table = PRETRAINING if evaluation is None else EVALUATIONS[evaluation]
    switches = {key for key, kind in table.items() if kind is TRUTH}
    switches |= {earlier for earlier, key in ALIASES.items() if key in switches}
    words = flags_to_overrides(typed, switches)
    for index, word in enumerate(words):
        key, equals, value = word.partition("=")
        if equals and key == "checkpoint" and checkpoint is not None:
            words[index] = f"{checkpoint}={value}"
        elif equals:
            words[index] = f"{todays_name(key, table)}={value}"
    return words


def _needs_config(arguments: Arguments) -> bool:
    if {"config_name", "config_path"} & set(arguments.flags):
        _check_config_name(arguments)
        return False
    return not {"hydra_help", "info", "shell_completion"} & set(arguments.flags)


def _explained(
    task: Callable[[DictConfig], Any],
    arguments: Arguments,
    evaluation: str | None,
    config: str | None,
) -> bool:
    """Whether the user asked for an explanation, which then was printed."""
    names = config_names(evaluation)
    if "help" in arguments:
        explanation = inspect.getdoc(sys.modules[task.__module__]) or ""
        print(f"{explanation}\n\nconfigs:\n  " + "\n  ".join(names))
        return True
    if config is None:
        raise InputError(f"--config-name: missing, expected {', '.join(names)}")
    return False


def _check_config_name(arguments: Arguments) -> None:
    name = arguments.flags.get("config_name")
    folders = [arguments.flags.get(key) for key in ("config_path", "config_dir")]
    if name is None or any(folders) or "hydra.searchpath" in str(arguments.overrides):
        return
    names = [file.stem for file in configs_folder().glob("*.yaml")]
    if name.removesuffix(".yaml") not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"the nearest is {near[0]}" if near else "--help lists them"
        raise InputError(
            f"--config-name: got {name!r}, of which there is no config; {hint}, and one of your "
            "own needs --config-dir FOLDER"
        )


def _run_hydra(
    task: Callable[[DictConfig], Any],
    arguments: Arguments,
    evaluation: str | None,
    config: str | None,
) -> None:
    for override in arguments.parsed():
        if key := re.fullmatch(r"gating\.(\w+)", override.key_or_group):
            check_key(key[1])
    if "config_path" in arguments:  # the user's configs may extend ours
        arguments.flags.setdefault("config_dir", str(configs_folder()))
    typed = {override.partition("=")[0] for override in arguments.overrides}
    quiet = [item for item in _QUIET_HYDRA if item.partition("=")[0] not in typed]
    # Lightning starts DDP's other processes with this argv, which then holds them already.
    sys.argv[1:] = Arguments(arguments.flags, [*quiet, *arguments.overrides]).to_list()
    jobs = _Jobs(task, evaluation, arguments)
    GlobalHydra.instance().clear()  # of a notebook's; it is put back
    try:
        with _variable(_FULL_ERROR, "1"):  # Hydra then leaves its errors to us
            hydra.main(version_base="1.2", config_path=str(configs_folder()), config_name=config)(
                jobs.run
            )()
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        if os.environ.get(_FULL_ERROR) or error is jobs.error:
            raise
        raise InputError(hydra_sentence(error, known_keys(arguments, config))) from error
    jobs.report()


@contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """A variable of the environment has a value, or none, for a while."""
    before = os.environ.get(name)
    try:
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


class _Jobs:
    """What Hydra calls, once for each job; a sweep's failures wait for its end."""

    def __init__(
        self, task: Callable[[DictConfig], Any], evaluation: str | None, arguments: Arguments
    ):
        self.task, self.evaluation = task, evaluation
        self.swept = {o.key_or_group for o in arguments.parsed() if o.is_sweep_override()}
        self.sweep = "multirun" in arguments
        self.full_error = os.environ.get(_FULL_ERROR)
        self.number = 0
        self.failed: list[tuple[str, int]] = []
        self.error: Exception | None = None

    def run(self, cfg: DictConfig) -> None:
        """One job."""
        try:
            # Inside Hydra, which would print a stack trace for any exception.
            with _variable(_FULL_ERROR, self.full_error), one_sentence_errors(self.evaluation):
                self.task(cfg)
        except SystemExit as stop:
            if not self._goes_on() or stop.code in (None, 0) or _is_signal(stop.code):
                raise
            self._note(stop.code if isinstance(stop.code, int) else 1)
        except Exception as error:
            self.error = error
            if not self._goes_on():
                raise
            traceback.print_exc()
            self._note(1)
        finally:
            self.number += 1

    def _goes_on(self) -> bool:
        # Other processes of the job may still wait for this one.
        return self.sweep and rank_and_processes()[1] == 1

    def _note(self, code: int) -> None:
        swept = [
            override
            for override in HydraConfig.get().overrides.task
            if override.partition("=")[0].lstrip("+") in self.swept
        ]
        self.failed.append((f"{self.number} ({' '.join(swept)})", code))

    def report(self) -> None:
        """End the process if a job has failed."""
        # The first process of a job speaks for all; Lightning kills it if another ends with a code.
        if self.failed and os.environ.get("LOCAL_RANK", "0") == "0":
            names = ", ".join(name for name, _ in self.failed)
            _fail(
                f"{len(self.failed)} of the sweep's {self.number} jobs failed: {names}; the others "
                "are finished",
                max(code for _, code in self.failed),
            )


def _is_signal(code: Any) -> bool:
    return isinstance(code, int) and code >= 128


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
        with lasting_streams(), signals_as_interrupts():
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
    if evaluation is None:
        return CONTINUE
    finished = "continues after what was finished" if evaluation == "linear" else "begins again"
    return f"the same command {finished}"


def _fail(sentence: str, code: int = 2) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)
