"""The command line of an entry point under Hydra: what was typed, in the order that Hydra takes."""

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from ..errors import InputError

# Paths and names may hold what means something else to Hydra: = ' [ { ~ # and, unless in a sweep,
# commas. These keys' values are what was typed.
_LISTS = ("data.train_path", "data.val_path")
# A group whose keys its owner knows.
_OPEN_GROUP = "gating.gate_kwargs."

_TEXTS = (
    *_LISTS,
    *("pretrained_feature_extractor", "resume_from_checkpoint", "checkpoint.dir", "output"),
    *("flops.checkpoint", "flops.output", "name", "wandb.project", "wandb.entity"),
)


@dataclass(frozen=True)
class Arguments:
    """What was typed.

    Attributes:
        flags: Hydra's, by their long names with underscores: "config_name", "multirun", ...
        overrides: `key=value`, as Hydra reads them.
    """

    flags: dict[str, Any]
    overrides: list[str]

    def __contains__(self, flag: str) -> bool:
        return flag in self.flags

    def parsed(self) -> list[Override]:
        """The overrides, parsed.

        Raises:
            InputError: for one that is not Hydra's grammar.
        """
        return [_parsed(override) for override in self.overrides]

    def to_list(self) -> list[str]:
        """As Hydra takes them: flags first."""
        flags = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in self.flags.items()
        ]
        return [*flags, *self.overrides]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def read_arguments(typed: list[str]) -> Arguments:
    """Hydra's flags and overrides, in any order.

    Args:
        typed: without the program's name.

    Raises:
        InputError: for a flag that does not exist or lacks its value, or an override that is not
            `key=value`.
    """
    parser = get_args_parser()
    parser.__class__ = _Parser  # Hydra's own ends the process with twenty lines
    words = list(typed)
    for index, word in enumerate(words):  # its value may be left out
        if word in ("--info", "-i") and "=" in "".join(words[index + 1 : index + 2]):
            words[index] = "--info=all"
    found, unknown = parser.parse_known_intermixed_args(words)
    for word in unknown:
        flag = word.partition("=")[0]
        raise InputError(
            f"{flag}: no such flag, accepted are Hydra's and key=value, as in "
            f"{flag.lstrip('-').replace('-', '_')}=..."
        )
    flags = {key: value for key, value in vars(found).items() if value not in (None, False)}
    overrides = [as_typed(word, found.multirun) for word in flags.pop("overrides")]
    return Arguments(_at_their_place(flags), overrides)


def _at_their_place(flags: dict[str, Any]) -> dict[str, Any]:
    """Config folders are relative to where one is, not to this package."""
    for flag in ("config_path", "config_dir"):
        folder = str(flags.get(flag, ""))
        if folder and "://" not in folder:
            path = Path(folder).expanduser()
            if not path.is_dir():
                raise InputError(f"--{flag.replace('_', '-')}: {folder!r} is not a folder")
            flags[flag] = os.path.abspath(path)
    return flags


def flags_to_overrides(typed: list[str], flags: Mapping[str, str | None]) -> list[str]:
    """`--calibrate 0.3` and `--calibrate=0.3` become `calibrate=0.3`, which is Hydra's language.

    Args:
        typed: without the program's name.
        flags: config keys that may be given so, and their values where there is none.

    Raises:
        InputError: for a flag without a value, or one whose key has another value, too.
    """
    overrides: list[str] = []
    given: dict[str, str] = {}
    rest = iter(typed)
    for argument in rest:
        name, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in flags:
            overrides.append(argument)
            continue
        if "=" not in argument:
            value = flags[name] or next(rest, "")
        if not value or value.startswith("--"):
            raise InputError(f"--{name}: needs a value")
        given[name] = value
        overrides.append(f"{name}={value}")
    for argument in typed:
        name, _, value = argument.lstrip("+").partition("=")
        if given.get(name, value) != value:
            raise InputError(
                f"--{name}: found {given[name]}, and {argument}; accepted is one of them"
            )
    return overrides


def quoted(text: str) -> str:
    """A text as Hydra's grammar quotes it, whatever it holds."""
    # Backslashes before a quotation mark, or at the end, are escapes; others are themselves.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


def as_typed(override: str, multirun: bool = False) -> str:
    """An override as Hydra wants it for what was typed.

    A path or a name is quoted where Hydra would not read it as typed; arguments of a kind of gates,
    which no config can name beforehand, are added.

    Args:
        override: `key=value`.
        multirun: whether commas separate the values of a sweep.
    """
    if override.startswith(_OPEN_GROUP):
        override = f"++{override}"
    key, equals, value = override.partition("=")
    if not equals or key.lstrip("+") not in _TEXTS or _reads_as_text(key, value, multirun):
        return override
    parts = value.split(",") if multirun else [value]
    return f"{key}=" + ",".join(
        part if _reads_as_text(key, part, multirun) else quoted(part) for part in parts
    )


def _reads_as_text(key: str, value: str, multirun: bool) -> bool:
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        return False
    if override.is_sweep_override():
        return multirun
    found = override.value()
    return found is None or isinstance(found, str) or (isinstance(found, list) and key in _LISTS)


def _parsed(override: str) -> Override:
    if "=" not in override and not override.startswith("~"):
        raise InputError(f"found {override!r}, accepted is key=value")
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{override!r} is not Hydra's key=value ({reason}); a value with special characters is "
            "quoted for the shell and for Hydra, as in \"key='value'\""
        ) from error
