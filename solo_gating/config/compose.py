"""The package's configs: where they are, what they are called, and one of them composed by Hydra."""

import re
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..checkpoints.reading import args_beside
from ..checks import no_such_key, shown
from ..errors import InputError
from ..terminal import note
from .arguments import Arguments, as_typed
from .defaults import DEFAULTS, configs_folder
from .schema import EVALUATIONS as EVALUATION_KEYS
from .schema import PRETRAINING, own_copy

EVALUATIONS = ("linear", "knn", "policy", "umap")


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
        InputError: for an override that the config does not take, or a value that an evaluation's
            does not accept.
    """
    arguments = Arguments({"config_name": name}, [as_typed(override) for override in overrides])
    arguments.parsed()
    try:
        with hydra.initialize_config_dir(str(configs_folder()), version_base="1.2"):
            cfg = hydra.compose(name, overrides=[*arguments.overrides, "hydra.run.dir=."])
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(hydra_sentence(error, known_keys(arguments, None))) from error
    return own_copy(cfg, EVALUATION_KEYS.get(name))


def config_of_checkpoint(arguments: Arguments, key: str) -> str | None:
    """The name under which Hydra then finds the config that a checkpoint was trained with.

    Without the validation images, where they are no more.

    Args:
        arguments: what was typed.
        key: that names the checkpoint.

    Returns:
        None if no checkpoint was named, or several.

    Raises:
        InputError: for a checkpoint without an args.json that can be used.
    """
    found = [o.value() for o in arguments.parsed() if o.key_or_group == key]
    if len(found) != 1 or not isinstance(found[0], str):
        return None
    cfg: Any = OmegaConf.merge(DEFAULTS, args_beside(user_path(found[0]), "checkpoint"))
    paths = cfg.data.val_path
    if paths is not None and not all(map(glob, [paths] if isinstance(paths, str) else paths)):
        note(f"data.val_path is null: {shown(paths)} of pre-training is not here")
        cfg.data.val_path = None
    name = "args"
    ConfigStore.instance().store(name, cfg)
    return name


def overridable(config: str | None = None) -> list[str]:
    """The keys of a config that `key=value` reaches, for commands that are not Hydra's own.

    Args:
        config: the name of an evaluation's; None for one of pre-training.
    """
    folders = [path.name for path in configs_folder().iterdir() if path.is_dir()]
    return [*(PRETRAINING if config is None else EVALUATION_KEYS[config]), *folders]


def check_overrides(overrides: list[str], decided: Mapping[str, str]) -> None:
    """Refuse overrides of what an option decides: a setting has one place.

    Args:
        overrides: `key=value`.
        decided: the option of each key that has one.

    Raises:
        InputError: naming the override and the option.
    """
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in decided:
            raise InputError(f"got {override}, expected {decided[key]}")


def user_path(text: str) -> Path:
    """A path from the command line, its `~` written out, which shells do not after a `=`."""
    return Path(text).expanduser()


def hydra_sentence(error: Exception, known: list[str]) -> str:
    """What Hydra says in a paragraph; of an unknown key, with the nearest one."""
    if key := re.match(r"Could not override '([^'@]+)'", str(error)):
        return str(no_such_key(key[1], known))
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:399]}…"


def known_keys(arguments: Arguments, evaluation: str | None) -> list[str]:
    """The groups and the keys of the config that was named."""
    folder = arguments.flags.get("config_path", str(configs_folder()))
    keys = [path.name for path in configs_folder().iterdir() if path.is_dir()]
    try:
        with hydra.initialize_config_dir(folder, version_base="1.2"):
            cfg = hydra.compose(arguments.flags.get("config_name", evaluation))
    except (HydraException, OmegaConfBaseException):
        return keys
    groups: list[tuple[str, Any]] = [("", OmegaConf.to_container(cfg))]
    for above, group in groups:
        for name, value in group.items():
            keys.append(f"{above}{name}")
            if isinstance(value, dict):
                groups.append((f"{above}{name}.", value))
    return keys
