"""Reading what strangers may have written: checkpoints, and the args.json beside them.

Both are data. Nothing in them is run, resolved or downloaded, nothing in them decides where files
are written, and what makes no sense is refused before it can become a figure.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..backbones import PATHS
from ..budgets import RANGE, is_range
from ..checks import are_three, is_int, is_number, is_positive, is_share, require, shown
from ..errors import InputError
from ..files import read_json

LIGHTNING = "a Lightning checkpoint with `state_dict`, as pre-training writes it"
_BEFORE_ZIP = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Checkpoints


def read_checkpoint(path: str | Path, key: str) -> dict[str, Any]:
    """Load a checkpoint's content to the CPU, without running code from it.

    Args:
        path: a Lightning checkpoint.
        key: the config key that names it, for messages.

    Returns:
        Its content; `state_dict` maps names to dense tensors that hold all their values.

    Raises:
        InputError: if there is no such file, it is damaged, or it is no checkpoint.
    """
    content = _read(path, key)
    _check_content(content, f"{key}: {str(path)!r}")
    return content


def read_weights(path: str | Path, key: str) -> dict[str, Tensor]:
    """The weights of a checkpoint, or of a file that holds nothing but weights.

    Args:
        path: a checkpoint with `state_dict`, or a bare state dict; also as PyTorch wrote them before
            1.6 (MoCo's and many of torchvision's).
        key: the config key that names it, for messages.

    Returns:
        Names and dense tensors that hold all their values.

    Raises:
        InputError: as `read_checkpoint`.
    """
    content = _read(path, key, before_zip=True)
    if isinstance(content, dict) and "state_dict" not in content:
        content = {"state_dict": content}
    _check_content(content, f"{key}: {str(path)!r}")
    return content["state_dict"]


def _read(path: str | Path, key: str, before_zip: bool = False) -> Any:
    if not os.path.isfile(path):  # of a path that is too long, too
        raise InputError(f"{key}: {str(path)!r} is not a file")
    cannot = f"{key}: cannot read {str(path)!r} as a checkpoint"
    # Foreign and damaged files make zipfile and torch raise whatever they like; torch's own words
    # advise to run the code in them.
    try:
        damage = None if before_zip and _is_before_zip(Path(path)) else _damage(Path(path))
    except OSError as error:
        raise InputError(f"{cannot} ({error.strerror})") from error
    except Exception as error:
        raise InputError(
            f"{cannot} (it is damaged, or not in the zip format of torch.save)"
        ) from error
    if damage:
        raise InputError(f"{cannot} (it is damaged: {damage})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{cannot} (it is damaged, or holds code)") from error
    except Exception as error:
        raise InputError(
            f"{cannot} (it is damaged, or not in the zip format of torch.save)"
        ) from error
    return content


def _is_before_zip(file: Path) -> bool:
    """Whether a file begins as torch.save's did before PyTorch 1.6; such files have no checksums."""
    with file.open("rb") as opened:
        return opened.read(len(_BEFORE_ZIP)) == _BEFORE_ZIP


def _damage(file: Path) -> str | None:
    """What is wrong with a file of torch.save, which is a zip without compression."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > file.stat().st_size:
            return "it claims to hold more than its size"
        # torch.serialization.set_crc32_options(False) writes zeros.
        if any(member.CRC for member in members) and (name := archive.testzip()):
            return f"the checksum of {shown(name)} in it differs"
    return None


def _check_content(content: Any, where: str) -> None:
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, Mapping):
        raise InputError(f"{where} {_without_state_dict(content)}, expected {LIGHTNING}")
    for name, value in state.items():
        if not isinstance(name, str):
            raise InputError(f"{where}: got the name {shown(name)} in `state_dict`")
        if reason := _not_dense(value):
            raise InputError(f"{where}: {shown(name)} {reason}, expected a dense tensor")
    epoch = content.get("epoch", 0)
    require(f"{where}: epoch", epoch, lambda v: is_int(v, 0), "an integer ≥ 0")


def _without_state_dict(content: Any) -> str:
    """What a file holds instead, in words."""
    if not isinstance(content, dict):
        return f"holds no `state_dict` but a {type(content).__name__}"
    if "state_dict" in content:
        return f"holds a {type(content['state_dict']).__name__} as `state_dict`"
    if any(isinstance(value, Tensor) for value in content.values()):
        return "holds bare weights and no `state_dict`"
    for name, value in content.items():
        if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
            return f"holds no `state_dict` but weights under {shown(name)}"
    return "holds no `state_dict`"


def _not_dense(value: Any) -> str | None:
    """Why something is no tensor that holds all its values; None if it is one."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}"
    for kind in ("nested", "quantized", "meta"):
        if getattr(value, f"is_{kind}"):
            return f"is a {kind} tensor"
    if value.layout != torch.strided:
        return f"is of the layout {str(value.layout).removeprefix('torch.')}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"has the shape {tuple(value.shape)} and holds fewer values"
    return None


def check_architecture(
    module: nn.Module,
    checkpoint: dict[str, Any],
    path: str | Path,
    parts: Collection[str] | None = None,
) -> None:
    """Refuse a checkpoint whose weights do not fit a model, or are no weights.

    Args:
        module: the model; may be on the device "meta".
        checkpoint: its key `state_dict` holds the weights, dense tensors.
        path: the file, for messages.
        parts: submodules to which both are restricted.

    Raises:
        InputError: naming the first weight that differs, or is not finite.
    """
    ours, theirs = (
        weights_of(state, parts) for state in (module.state_dict(), checkpoint["state_dict"])
    )
    shapes = [{name: tuple(v.shape) for name, v in state.items()} for state in (ours, theirs)]
    for name in [*ours, *theirs]:
        if shapes[0].get(name) != shapes[1].get(name):
            raise InputError(
                f"checkpoint {str(path)!r} is of another architecture: {name} is "
                f"{shapes[1].get(name, 'absent')} there and {shapes[0].get(name, 'absent')} in this "
                "config"
            )
    for name, value in theirs.items():
        if reason := no_weight(name, value, ours[name].dtype):
            raise InputError(f"checkpoint {str(path)!r} cannot be used: {name} {reason}")


def weights_of(state: Mapping[str, Tensor], parts: Collection[str] | None) -> dict[str, Tensor]:
    """The weights of some submodules in a state dict; of all for None."""
    return {n: value for n, value in state.items() if parts is None or n.split(".")[0] in parts}


def no_weight(name: str, value: Tensor, dtype: torch.dtype) -> str | None:
    """Why a tensor is no weight of a dtype; None if it is one."""
    if not dtype.is_floating_point:
        same = value.dtype == dtype or (_is_integer(value.dtype) and _is_integer(dtype))
        return None if same else f"is of {value.dtype}, expected {dtype}"
    if value.dtype not in _FLOATS:
        return f"is of {value.dtype}, expected {', '.join(map(str, _FLOATS))}"
    bad = value.numel() - int(value.to(dtype).isfinite().sum())
    if bad:
        return f"has {bad} of {value.numel()} values that are infinite or NaN in {dtype}"
    if name.endswith("running_var") and (value < 0).any():
        return "has variances below 0"
    return None


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


# args.json

LARGEST_SIDE = 4096  # of an image, in pixels

_Check = tuple[Callable[[Any], Any], str]

_TEXT: _Check = (lambda v: isinstance(v, str), "text")
_GROUP: _Check = (lambda v: isinstance(v, dict), "a group")
_NUMBER: _Check = (is_number, "a number")
_COUNT: _Check = (lambda v: is_int(v, 0), "an integer ≥ 0")
_TRUTH: _Check = (lambda v: isinstance(v, bool), "true or false")
_PATHS: _Check = (lambda v: _is_paths(v), "a path, or several")

# What is read of it, where it is not null. `method_kwargs` and `optimizer` are a run's description;
# for the rest a pre-training's config has the checks, and the network's constructor.
_ARGS: dict[str, _Check] = {
    "name": (lambda v: isinstance(v, str) or is_number(v), "text"),  # name=5 is a number
    "method": _TEXT,
    "seed": _NUMBER,
    "max_epochs": _NUMBER,
    "backbone": _GROUP,
    "backbone.name": _TEXT,
    "backbone.kwargs": _GROUP,
    "backbone.policy": _GROUP,
    "data": _GROUP,
    "data.dataset": _TEXT,
    "data.num_classes": (lambda v: is_int(v, 1), "an integer ≥ 1"),
    "data.num_large_crops": _COUNT,
    "data.num_small_crops": _COUNT,
    "data.format": _TEXT,
    "data.train_path": _PATHS,
    "data.val_path": _PATHS,
    "data.fraction": (lambda v: v == -1 or is_share(v), "a number in (0, 1], or -1"),
    "data.no_labels": _TRUTH,
    "data.num_workers": _COUNT,
    "augmentations": (
        lambda v: isinstance(v, list) and v and all(isinstance(view, dict) for view in v),
        "a list of at least one group",
    ),
    "augmentations.0.crop_size": (
        lambda v: is_int(v, 1) and v <= LARGEST_SIDE,
        f"an integer from 1 to {LARGEST_SIDE}",
    ),
    "augmentations.0.mean": (lambda v: are_three(v, is_number), "a list of 3 numbers"),
    "augmentations.0.std": (lambda v: are_three(v, is_positive), "a list of 3 numbers > 0"),
    "method_kwargs": _GROUP,
    "optimizer": _GROUP,
    "optimizer.kwargs": _GROUP,
    "scheduler": _GROUP,
    "knn_eval": _GROUP,
    "performance": _GROUP,
    "gating": _GROUP,
    "gating.views": (
        lambda v: isinstance(v, list) and v and all(view in PATHS for view in v),
        f"a list of {' and '.join(PATHS)}",
    ),
    "gating.target_budget": (
        lambda v: is_share(v) or is_range(v),
        f"a number in (0, 1] or {RANGE}",
    ),
}
_NEEDED = ("method", "backbone.name", "data.dataset", "data.num_classes")
# What a metrics.json repeats, which must then be JSON.
_REPEATED = ("seed", "backbone", "data", "method_kwargs", "optimizer", "gating")
# Arguments with which timm's and torchvision's networks read or download files.
_READING_FILES = re.compile(r"pretrained.*|weights.*|checkpoint_path")


def trained_paths(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The paths that a run with a group `gating` trains, dense first; of a group without views, both."""
    if not group:
        return ("dense",)
    taken = set(group.get("views") or PATHS)
    if group.get("distillation_weight") is not None:
        taken.add("gated")
    return tuple(path for path in ("dense", "gated") if path in taken)


def read_args(file: Path, key: str) -> DictConfig:
    """Read a pre-training's args.json, which is data: interpolations in it are plain text.

    Args:
        file: solo-learn's or this package's.
        key: the config key that names the checkpoint beside it, for messages.

    Raises:
        InputError: naming the key in it that is missing or cannot be used, and the file.
    """
    content = read_json(file, key)
    where = f"{key}: {str(file)!r}"
    for name, (accepted, wording) in _ARGS.items():
        value = _select(content, name)
        if value is not None:
            require(f"{where}: {name}", value, accepted, wording)
        elif name in _NEEDED:
            raise InputError(f"{where} lacks {name}, expected solo-learn's args.json")
    for group in _REPEATED:
        _check_finite(content.get(group), f"{where}: {group}")
    if _select(content, "backbone.kwargs.policy") is not None:
        raise InputError(
            f"{where}: backbone.kwargs.policy: got a file, expected backbone.kwargs.hidden, the widths "
            "in it, which main_pretrain writes"
        )
    for name, value in (_select(content, "backbone.kwargs") or {}).items():
        if _READING_FILES.fullmatch(name) and value:
            raise InputError(
                f"{where}: backbone.kwargs.{name}: got {shown(value)}, expected null: the "
                "checkpoint has all weights"
            )
    content["backbone"]["kwargs"] = content["backbone"].get("kwargs") or {}
    return OmegaConf.create(literal(content))


def args_beside(checkpoint: Path, key: str) -> DictConfig:
    """The args.json of a checkpoint's run, as `read_args`.

    Args:
        checkpoint: the file; it may be missing.
        key: the config key that names it, for messages.

    Raises:
        InputError: as `read_args`, or if there is none.
    """
    file = checkpoint.parent / "args.json"
    if not file.exists():
        raise InputError(
            f"{key}: there is no args.json beside {str(checkpoint)!r}; solo-learn writes it there, "
            "and it says which network this is"
        )
    return read_args(file, key)


def literal(value: Any) -> Any:
    """Escaped, so that OmegaConf takes a text for what it is, and without what it holds missing."""
    if isinstance(value, dict):
        return {name: literal(part) for name, part in value.items() if part != "???"}
    if isinstance(value, list):
        return [literal(part) for part in value]
    return as_text(value) if isinstance(value, str) else value


def as_text(value: str) -> str:
    """A text as OmegaConf takes it for text, with interpolations escaped."""
    return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)


def _select(content: dict[str, Any], name: str) -> Any:
    """What a dotted name has; None if there is none."""
    found: Any = content
    for part in name.split("."):
        if isinstance(found, list):
            found = found[int(part)]
        else:
            found = found.get(part) if isinstance(found, dict) else None
    return None if found == "???" else found  # which is OmegaConf's word for a missing value


def _is_paths(value: Any) -> bool:
    several = list(value.values()) if isinstance(value, dict) else value
    if isinstance(several, list):
        return bool(several) and all(isinstance(path, str) for path in several)
    return isinstance(several, str)


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for name, part in value.items():
            _check_finite(part, f"{where}.{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _check_finite(part, f"{where}[{number}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        require(where, value, is_number, "a finite number")
