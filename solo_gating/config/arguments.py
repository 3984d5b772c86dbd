"""The commands' one grammar: `key=value`, or `--key value`, in any order.

Commands with a config hand it to Hydra (`read_arguments`), those without to argparse
(`read_options`).
"""

import argparse
import os
import re
from collections import deque
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from ..checks import no_such_key
from ..errors import InputError
from ..terminal import note

# Earlier names of keys, solo-learn's among them, and today's.
ALIASES = {
    "pretrained_feature_extractor": "checkpoint",
    "normalise": "normalize",
    "neighbours": "neighbors",
}

# Paths and names may hold what means something else to Hydra: = ' [ { ~ # and, unless in a sweep,
# commas. These keys' values are what was typed.
_LISTS = ("data.train_path", "data.val_path")
# A group whose keys its owner knows.
_OPEN_GROUP = "gating.gate_kwargs."

_TEXTS = (
    *_LISTS,
    *("checkpoint", "resume_from_checkpoint", "pretrained", "checkpoint.dir", "output"),
    *("flops.checkpoint", "flops.output", "name", "wandb.project", "wandb.entity"),
    *("method_kwargs.teacher", "backbone.kwargs.policy"),
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


def command_parser(
    command: str, explanation: str | None, epilog: str | None = None
) -> argparse.ArgumentParser:
    """A command's options, for `read_options`; the caller adds them.

    Args:
        command: as `main_export`.
        explanation: what `--help` says, as it is written.
        epilog: what it says at the end.
    """
    return _Parser(
        prog=f"python -m solo_gating.{command}",
        description=explanation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
    )


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
            f"{flag}: no such flag, expected Hydra's and key=value, as in "
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


def flags_to_overrides(typed: Iterable[str], switches: Container[str] = ()) -> list[str]:
    """`--calibrate 0.3` and `--calibrate=0.3` become `calibrate=0.3`, which is Hydra's language.

    Args:
        typed: without the program's name; Hydra's own flags stay as they are.
        switches: keys whose flag alone means true.

    Raises:
        InputError: for a flag without a value, or one whose key has another value, too.
    """
    hydras = get_args_parser()._option_string_actions
    overrides: list[str] = []
    given: dict[str, str] = {}
    words = deque(typed)
    while words:
        word = words.popleft()
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or any(option.startswith(flag) for option in hydras):
            overrides.append(word)
            continue
        name = _named(flag)
        given[name] = value if equals else _next_value(words, name in switches)
        _check_value(flag, given[name])
        overrides.append(f"{name}={given[name]}")
    for argument in overrides:
        name, _, value = argument.lstrip("+").partition("=")
        if given.get(name, value) != value:
            raise _given_twice(f"--{name}", given[name], argument)
    return overrides


def read_options(
    parser: argparse.ArgumentParser, typed: Iterable[str], overridden: Iterable[str] = ()
) -> argparse.Namespace:
    """The options of a command without a config, as `key=value` or as `--key value`.

    A list is `key=[a,b]` or `--key a b`, a switch `key=true` or `--key`; null is an option that was
    not given.

    Args:
        parser: from `command_parser`; what else is typed are its positionals.
        typed: without the program's name.
        overridden: keys of a config, which may be typed among the options.

    Raises:
        InputError: for a key that does not exist, one with two values, or a value that its option
            does not take.
    """
    options: dict[str, Any] = {a.dest: a for a in parser._actions if a.option_strings}
    positionals = len(options) < len(parser._actions)
    known = list(overridden)
    given: dict[str, list[str]] = {}
    others: list[str] = []
    words = deque("--help" if word == "-h" else word for word in typed)
    while words:
        word = words.popleft()
        if not _is_key(word):
            if not positionals:
                raise InputError(f"got {word!r}, expected key=value")
            others.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = todays_name(_named(flag), options)
        if name in options:
            values = _values(value if equals else None, options[name].nargs, words)
            if values != ["null"] and given.setdefault(name, values) != values:
                raise _given_twice(name, " ".join(given[name]), " ".join(values))
        elif _is_below(name.lstrip("~"), known):
            others.append(f"{name}={value if equals else _next_value(words)}")
        else:
            raise no_such_key(
                flag, [flag[: flag.startswith("--") * 2] + key for key in [*options, *known]]
            )
    return parser.parse_args([*_for_argparse(given, options), *(["--", *others] if others else [])])


def todays_name(key: str, known: Container[str]) -> str:
    """A key by today's name; if it was an earlier one, a line on standard error says so.

    Args:
        key: as it was typed, or written in a config.
        known: those that the command has.
    """
    name = ALIASES.get(key, key)
    if name == key or name not in known:
        return key
    note(f"{key} is called {name} now; the earlier name still works")
    return name


def _named(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else flag


def _is_key(word: str) -> bool:
    """Whether a word names a key, and is not the path of something with a `=` in its name."""
    typed = re.match(r"[+~]*[A-Za-z_][\w.@/]*=", word)
    return word.startswith("--") or (typed is not None and not os.path.exists(word))


def _is_below(key: str, known: Iterable[str]) -> bool:
    """Whether a config has the key, or a part of it; of `+key` Hydra judges."""
    return key.startswith("+") or any(
        f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in known
    )


def _next_value(words: deque[str], switch: bool = False) -> str:
    """What follows a flag; after a switch it may be left out."""
    if switch and (not words or words[0] not in ("true", "false")):
        return "true"
    return words.popleft() if words and not words[0].startswith("--") else ""


def _values(typed: str | None, nargs: int | str | None, words: deque[str]) -> list[str]:
    """An option's values: those behind its `=`, or the words behind its flag."""
    if nargs != "+":
        return [_next_value(words, nargs == 0) if typed is None else typed]
    found = []
    while typed is None and words and not _is_key(words[0]):
        found.append(words.popleft())
    if typed is not None:
        listed = re.fullmatch(r"\[(.*)\]", typed)
        found = [part.strip(" '\"") for part in listed[1].split(",")] if listed else [typed]
    return found


def _for_argparse(given: Mapping[str, list[str]], options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, values in given.items():
        flag, nargs = options[name].option_strings[-1], options[name].nargs
        _check_value(flag, "".join(values))
        if nargs == 0 and values not in (["true"], ["false"]):
            raise InputError(f"{name}: got {values[0]!r}, expected true or false")
        if nargs == 0:
            words += [flag] * (values == ["true"])
        else:  # in one word a value may begin with a dash
            words += [f"{flag}={values[0]}"] if nargs is None else [flag, *values]
    return words


def _check_value(flag: str, value: str) -> None:
    if not value or value.startswith("--"):
        raise InputError(f"{flag}: needs a value")


def _given_twice(key: str, found: str, other: str) -> InputError:
    return InputError(f"{key}: got {found}, and {other}; expected one of them")


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
        raise InputError(f"got {override!r}, expected key=value")
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{override!r} is not Hydra's key=value ({reason}); a value with special characters is "
            "quoted for the shell and for Hydra, as in \"key='value'\""
        ) from error
