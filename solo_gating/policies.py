"""The channel policy: which channels a gated encoder uses on a set of images.

A policy is a JSON file that other commands read:

    {
      "schema": "solo-gating policy 1",
      "backbone": {"name": "resnet18_gated", "kwargs": {...}},
      "resolution": [32, 32],           height and width of the images
      "images": 10000,                  N
      "threshold": 0.0,                 of the gates' logits
      "budget": null,                   that the gates were told, of a network trained for a range
      "target_budget": 0.3,             t_d of the pre-training, a number or a range, or null
      "share": 0.331,                   F^R / F^O, mean over the images
      "share_std": 0.02,                its standard deviation over the images
      "blocks": [{
        "name": "layer1.0",
        "channels": 64,                 C_out
        "selected": [10000, 0, 17, ...],   by how many of the N images each channel was selected
        "always_on": 20,                number of channels selected by all images,
        "always_off": 30,               ... by none,
        "input_dependent": 14,          ... by some
        "active": 0.37,                 mean share of the channels that an image selects
        "active_std": 0.04              its standard deviation over the images
      }, ...],
      "classes": [{"label": 0, "images": 100, "share": 0.33, "active": [0.4, ...]}, ...]
    }

`classes` holds each class's mean share and its mean active share in each block; it is empty for
images without labels.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .budgets import RANGE, is_range
from .checks import at_least, checked_threshold, is_int, is_not_negative, is_share, require, shown
from .errors import InputError
from .files import read_json

SCHEMA = "solo-gating policy 1"


@dataclass(frozen=True)
class BlockPolicy:
    """The policy of one block; see the module's docstring."""

    name: str
    channels: int
    selected: list[int]
    always_on: int
    always_off: int
    input_dependent: int
    active: float
    active_std: float


@dataclass(frozen=True)
class Policy:
    """The policy of an encoder; see the module's docstring."""

    backbone: dict[str, Any]
    resolution: list[int]
    images: int
    threshold: float
    target_budget: float | list[float] | None
    share: float
    share_std: float
    blocks: list[BlockPolicy]
    classes: list[dict[str, Any]]
    budget: float | None = None

    @property
    def hidden(self) -> list[int]:
        """Of each block the channels that any image selected, "always on" and "data dependent".

        One for a block of which no image selects any.
        """
        return [max(1, block.always_on + block.input_dependent) for block in self.blocks]

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        return {"schema": SCHEMA, **asdict(self)}


def read_policy(path: str | Path, key: str = "policy") -> Policy:
    """Read a policy file.

    Args:
        path: what `main_policy` wrote.
        key: the config key that names it, for messages.

    Raises:
        InputError: if it is missing, damaged, no policy, or contradicts itself.
    """
    content = read_json(Path(path), key)
    if content.pop("schema", None) != SCHEMA:
        raise InputError(f"{key}: {str(path)!r} is no policy, expected main_policy's policy.json")
    try:
        blocks = [BlockPolicy(**block) for block in content.pop("blocks")]
        policy = Policy(blocks=blocks, **content)
    except (KeyError, TypeError) as error:
        raise InputError(f"{key}: {str(path)!r} is incomplete ({error})") from error
    _check_policy(policy, f"{key}: {str(path)!r}")
    return policy


def _check_policy(policy: Policy, where: str) -> None:
    resolution, none = "a list of two integers ≥ 1", "or null"
    at_least(f"{where}: images", policy.images, 1)
    require(
        f"{where}: resolution",
        policy.resolution,
        lambda v: isinstance(v, list) and len(v) == 2 and all(is_int(side, 1) for side in v),
        resolution,
    )
    checked_threshold(policy.threshold, f"{where}: threshold")
    for name in ("share", "share_std"):
        require(f"{where}: {name}", getattr(policy, name), is_not_negative, "a number ≥ 0")
    require(
        f"{where}: budget", policy.budget, lambda v: v is None or is_share(v), f"a share {none}"
    )
    require(
        f"{where}: target_budget",
        policy.target_budget,
        lambda v: v is None or is_share(v) or is_range(v),
        f"a number in (0, 1], {RANGE} {none}",
    )
    if not policy.blocks:
        raise InputError(f"{where}: blocks: got none")
    for block in policy.blocks:
        _check_block(block, policy.images, f"{where}: block {shown(block.name)}")


def _check_block(block: BlockPolicy, images: int, where: str) -> None:
    at_least(f"{where}: channels", block.channels, 1)
    require(
        f"{where}: selected",
        block.selected,
        lambda v: (
            isinstance(v, list)
            and len(v) == block.channels
            and all(is_int(count, 0) and count <= images for count in v)
        ),
        f"a list of {block.channels} integers from 0 to {images}, one for each channel",
    )
    on, off = (block.selected.count(count) for count in (images, 0))
    counts = {"always_on": on, "always_off": off, "input_dependent": block.channels - on - off}
    for name, count in counts.items():
        require(
            f"{where}: {name}", getattr(block, name), count.__eq__, f"{count}, as selected says"
        )
    for name in ("active", "active_std"):
        require(f"{where}: {name}", getattr(block, name), is_not_negative, "a number ≥ 0")
