"""The accuracies in `metrics.json` files, one record for each path of each evaluation."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..budgets import is_range, middle
from ..checks import is_int, is_number, is_share, shown
from ..config.arguments import ALIASES
from ..errors import InputError
from ..files import UnreadableError, json_content
from ..metrics import ACCURACIES, DEFAULT_SETTINGS

PATHS = ("dense", "gated")
STUDENTS = ("simreg", "seed")  # of Table 3
_LARGEST_COUNT = 10**12


@dataclass(frozen=True)
class Record:
    """An accuracy of one path of one encoder.

    Attributes:
        file: the `metrics.json`.
        pretraining: its key of that name: method, data set, backbone, width, epochs, seed, ...
        metric: "linear" or "knn".
        settings: of the evaluation, complete.
        data: of the evaluation: `dataset`, `train_images`, `val_images`, `resolution`.
        path: "dense" or "gated".
        value: top-1 accuracy in percent.
        std: over the linear classifiers of this encoder, if there are several.
        flops: per image.
        flops_cut: 1 − share of the dense FLOPs, on the gated path.
        own: written by the pre-training itself rather than by an evaluation.
    """

    file: Path
    pretraining: dict[str, Any]
    metric: str
    settings: dict[str, Any]
    data: dict[str, Any]
    path: str
    value: float
    std: float | None = None
    flops: float | None = None
    flops_cut: float | None = None
    own: bool = False

    @property
    def variant(self) -> str:
        """As `variant_of`."""
        return variant_of(self.pretraining)

    @property
    def target_budget(self) -> float | None:
        """t_d; of a range of budgets the one that the gates were told in this evaluation.

        Of a student that of the gated encoder whose policy its widths are.
        """
        policy: dict[str, Any] = self.pretraining.get("policy") or {}
        target: Any = policy.get("target_budget", self.pretraining.get("target_budget"))
        return self.settings.get("budget", middle(target)) if is_range(target) else target

    @property
    def published_metric(self) -> str | None:
        """The metric of the papers that it belongs to, whatever its other settings; None for none.

        "linear"; "knn", 1-NN as in Tables 4 to 6; "knn_normalized", the same with features of length 1,
        as in Table 3.
        """
        if self.metric == "linear":
            return "linear"
        wanted = {"k": 1, "distance": "euclidean", "features": "backbone"}
        if any(self.settings[key] != value for key, value in wanted.items()):
            return None
        return "knn_normalized" if self.settings["normalize"] else "knn"

    @property
    def images(self) -> str:
        """Numbers of training and test images of the evaluation."""
        counts = [self.data.get(f"{split}_images") for split in ("train", "val")]
        return " / ".join("–" if count is None else f"{count:,}" for count in counts)

    @property
    def checkpoint(self) -> Path:
        """The evaluated file, as far as it is known."""
        named = self.pretraining.get("checkpoint")
        return Path(named) if named else self.file.parent / "last.ckpt"


@dataclass(frozen=True)
class SweepPoint:
    """A position of the dial.

    Attributes:
        asked: the share of the dense FLOPs that was asked for; None for the network as it is.
        flops: per image.
        value: 1-NN accuracy in percent.
    """

    asked: float | None
    flops: float
    value: float


@dataclass(frozen=True)
class Sweep:
    """1-NN accuracy along the dial of one checkpoint (`main_policy --sweep`).

    Attributes:
        file: the `metrics.json`.
        pretraining: as of a `Record`.
        data: as of a `Record`.
        points: of the gated path.
        dense_flops: per image.
        dense_value: of the dense path.
    """

    file: Path
    pretraining: dict[str, Any]
    data: dict[str, Any]
    points: tuple[SweepPoint, ...]
    dense_flops: float
    dense_value: float

    @property
    def variant(self) -> str:
        """As `variant_of`."""
        return variant_of(self.pretraining)


def variant_of(pretraining: dict[str, Any]) -> str:
    """The method, with what the papers vary: a second encoder, the invariance loss.

    These are Tables 5 and 6 of the unification paper. Another backbone than the papers' ResNet-18
    is named, and so are another kind of gates and a range of budgets, so that no table of theirs takes
    it.

    Args:
        pretraining: the key of that name of a `metrics.json`.
    """
    method, backbone = pretraining["method"], pretraining["backbone"]
    gated = method.endswith(("_dual", "_gated", "_distilled"))
    name = method
    if gated and backbone.endswith("_two_encoders"):
        name += "_two_encoders"
    elif backbone not in _usual_backbones(method, gated):
        name += f" ({backbone})"
    if (pretraining.get("method_kwargs") or {}).get("sim_loss_weight") == 0:
        name += "_no_invariance"
    gating = pretraining.get("gating")
    kind = gating.get("gate", "channel") if isinstance(gating, dict) else "channel"
    if gated and kind != "channel":
        name += f" ({kind} gates)"
    if is_range(pretraining.get("target_budget")):
        name += " (range of budgets)"
    return name


def _usual_backbones(method: str, gated: bool) -> tuple[str, ...]:
    """The papers' ResNet-18 by its names here."""
    if gated:
        return ("resnet18_gated",)
    return ("resnet18_policy",) if method in STUDENTS else ("resnet18", "resnet18_plain")


@dataclass(frozen=True)
class Skipped:
    """A `metrics.json` that gave nothing, and why."""

    file: Path
    reason: str


class _UnusableError(ValueError):
    pass


class Found(NamedTuple):
    """What some folders hold; records and sweeps are in the order of their files' paths.

    Attributes:
        records: all accuracies, at least one.
        skipped: files that could not be used.
        sweeps: of the dial.
    """

    records: list[Record]
    skipped: list[Skipped]
    sweeps: list[Sweep]


def read_records(folders: Sequence[Path], key: str = "RUN_DIR") -> Found:
    """All accuracies, and all sweeps of the dial, below some folders.

    Args:
        folders: searched recursively; one may lie in another.
        key: that named them, for messages.

    Returns:
        Both, and the files that were skipped. Files of evaluations that give neither ("umap", a
        "policy" without a sweep, ...) are nowhere.

    Raises:
        InputError: for something that is not a folder, or if there is no record at all.
    """
    files = _metrics_files(folders, key)
    named = ", ".join(repr(str(folder)) for folder in folders)
    found = Found([], [], [])
    for file in files:
        try:
            content = _content(file)
            if content.get("evaluation") == "policy":
                found.sweeps.extend(_sweeps(file, content))
            else:
                found.records.extend(_records(file, content))
        except _UnusableError as error:
            found.skipped.append(Skipped(file, str(error)))
    if not (found.records or found.sweeps):
        why = ""
        if found.skipped:
            first = found.skipped[0]
            why = f"; {str(first.file)!r}: {first.reason}"
        raise InputError(
            f"{key}: got {len(files)} metrics.json below {named}, none with the accuracy of a "
            f"pre-training or of an evaluation (linear, knn, a sweep){why}"
        )
    return found._replace(records=_without_copies(_without_superseded(found.records)))


def _sweeps(file: Path, content: dict[str, Any]) -> list[Sweep]:
    gated = content.get("gated")
    if not isinstance(gated, dict) or "sweep" not in gated:
        return []
    listed, dense = gated["sweep"], _object(content, "dense")
    if not isinstance(listed, list) or not all(isinstance(point, dict) for point in listed):
        raise _UnusableError(f"`gated.sweep` is {shown(listed)}, expected a list of objects")
    where = "gated.sweep"
    return [
        Sweep(
            file=file,
            pretraining=_pretraining(content),
            data=_data(content),
            points=tuple(
                SweepPoint(
                    asked=_within(point, "asked", where, 0, 1),
                    flops=_flops(point, where) or _refuse(point, "flops", where, "a number"),
                    value=_accuracy(point, "knn_top1", where),
                )
                for point in listed
            ),
            dense_flops=_flops(dense, "dense") or _refuse(dense, "flops", "dense", "a number"),
            dense_value=_accuracy(dense, "knn_top1", "dense"),
        )
    ]


def _metrics_files(folders: Sequence[Path], key: str) -> list[Path]:
    for folder in folders:
        if not folder.is_dir():
            found = "a file" if folder.exists() else "absent"
            raise InputError(f"{key}: {str(folder)!r} is {found}, expected folders of runs")
    files = {
        file.resolve(): file for folder in folders for file in sorted(folder.rglob("metrics.json"))
    }
    if not files:
        named = ", ".join(repr(str(folder)) for folder in folders)
        raise InputError(f"{key}: there is no metrics.json below {named}")
    return sorted(files.values())


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json_content(file)
    except UnreadableError as error:
        raise _UnusableError(f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _UnusableError("holds no JSON object")
    return content


def _records(file: Path, content: dict[str, Any]) -> list[Record]:
    metric = content.get("evaluation")
    if metric is not None and metric not in ACCURACIES:
        return []
    if "pretraining" not in content:
        raise _UnusableError("has no key `pretraining`, which says of which run it is")
    own = metric is None
    metric = metric or "knn"
    rows = {path: content[path] for path in PATHS if path in content}
    if not rows:
        raise _UnusableError("holds no accuracy, neither `dense` nor `gated`")
    pretraining = _pretraining(content)
    data = _data(content)
    settings = _settings(content, metric)
    return [
        Record(
            file=file,
            pretraining=pretraining,
            metric=metric,
            settings=settings | varied,
            data=data,
            path=path,
            value=value,
            std=_within(row, f"{metric}_top1_std", path, 0, 100),
            flops=_flops(row, path),
            flops_cut=_within(row, "flops_cut", path, -1, 1),
            own=own,
        )
        for path, row in rows.items()
        for varied, value in _accuracies(row, path, metric)
        if value is not None
    ]


def _accuracies(row: Any, path: str, metric: str) -> list[tuple[dict[str, Any], float | None]]:
    """A row's accuracies with the settings in which they differ."""
    if not isinstance(row, dict):
        raise _UnusableError(f"`{path}` is {shown(row)}, expected an object")
    # main_knn lists every combination of its settings that it has tried.
    listed = row.get("knn") if metric == "knn" else None
    found = [
        (
            _checked_settings({k: v for k, v in one.items() if k in DEFAULT_SETTINGS["knn"]}, path),
            _accuracy(one, "knn_top1", path),
        )
        for one in (listed if isinstance(listed, list) else [])
        if isinstance(one, dict)
    ]
    if found:
        return [*found]
    name = f"{metric}_top1"
    # Null: there were no labels, or the features were not finite.
    return [({}, None if name in row and row[name] is None else _accuracy(row, name, path))]


def _pretraining(content: dict[str, Any]) -> dict[str, Any]:
    where = "pretraining"
    found = _object(content, where)
    for key in ("method", "dataset", "backbone"):
        _text(found, key, where)
    for key in ("epochs", "width"):
        _count(found, key, where)
    _optional(found, "seed", where)
    for key, group in ((where, found), (f"{where}.policy", found.get("policy") or {})):
        if not isinstance(group, dict):
            _refuse(found, "policy", where, "an object")
        budget = group.get("target_budget")
        if not (budget is None or is_share(budget) or is_range(budget)):
            _refuse(group, "target_budget", key, "a number in (0, 1] or a range of two")
    for key in ("name", "checkpoint"):
        value = found.get(key)
        if not (value is None or isinstance(value, str) or (key == "name" and is_number(value))):
            _refuse(found, key, where, "text")
    for key in ("gating", "method_kwargs", "optimizer"):
        if not isinstance(found.get(key) or {}, dict):
            _refuse(found, key, where, "an object")
    return found


def _data(content: dict[str, Any]) -> dict[str, Any]:
    found = _object(content, "data")
    _text(found, "dataset", "data")
    for key in ("train_images", "val_images"):
        if found.get(key) is not None:
            _count(found, key, "data")
    return found


def _settings(content: dict[str, Any], metric: str) -> dict[str, Any]:
    given = _object(content, "settings") if "settings" in content else {}
    given = {ALIASES.get(key, key): value for key, value in given.items()}
    # The number of classifiers changes the deviation, not the accuracy.
    given.pop("seeds", None)
    if "max_epochs" in given:
        given["epochs"] = given.pop("max_epochs")
    settings = _checked_settings(DEFAULT_SETTINGS[metric] | given, "settings")
    if metric == "knn" and settings["distance"] == "euclidean":
        settings.pop("temperature", None)  # which has no effect there
    return settings


# Those that are compared or written as numbers and words; others are shown as they are.
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "threshold": (is_number, "a number"),
    "budget": (lambda v: v is None or is_share(v), "a number in (0, 1]"),
    "k": (lambda v: is_int(v, 1), "an integer ≥ 1"),
    "normalize": (lambda v: isinstance(v, bool), "true or false"),
    "epochs": (lambda v: is_int(v, 1), "an integer ≥ 1"),
}


def _checked_settings(settings: dict[str, Any], where: str) -> dict[str, Any]:
    for key, (accepted, wording) in _SETTINGS.items():
        if key in settings and not accepted(settings[key]):
            _refuse(settings, key, where, wording)
    return settings


def _object(content: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(content.get(key), dict):
        value = shown(content.get(key, "missing"))
        raise _UnusableError(f"`{key}` is {value}, expected an object")
    return content[key]


def _text(found: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(found.get(key), str):
        _refuse(found, key, where, "a name")
    return found[key]


def _number(found: dict[str, Any], key: str, where: str) -> float | int:
    if not is_number(found.get(key)):  # JSON as Python reads it may hold NaN and Infinity
        _refuse(found, key, where, "a number")
    return found[key]


def _count(found: dict[str, Any], key: str, where: str) -> int:
    if not is_int(found.get(key), 0) or found[key] > _LARGEST_COUNT:
        _refuse(found, key, where, "an integer ≥ 0")
    return found[key]


def _refuse(found: dict[str, Any], key: str, where: str, accepted: str) -> NoReturn:
    value = shown(found.get(key, "missing"))
    raise _UnusableError(f"`{where}.{key}` is {value}, expected {accepted}")


def _optional(found: dict[str, Any], key: str, where: str) -> float | int | None:
    return None if found.get(key) is None else _number(found, key, where)


def _within(
    row: dict[str, Any], key: str, path: str, least: float, most: float
) -> float | int | None:
    value = _optional(row, key, path)
    if value is not None and not least <= value <= most:
        _refuse(row, key, path, f"{least} to {most}")
    return value


def _flops(row: dict[str, Any], path: str) -> float | int | None:
    value = _optional(row, "flops", path)
    if value is not None and value <= 0:
        _refuse(row, "flops", path, "a number > 0")
    return value


def _accuracy(row: dict[str, Any], key: str, path: str) -> float:
    _number(row, key, path)
    return float(_within(row, key, path, 0, 100))  # type: ignore[arg-type]


def _without_superseded(records: list[Record]) -> list[Record]:
    """Leave out a pre-training's own 1-NN where an evaluation of the same checkpoint has it."""
    evaluated = [r for r in records if r.published_metric == "knn" and not r.own]
    return [
        record
        for record in records
        if not record.own
        or not any(
            other.path == record.path
            and other.data["dataset"] == record.data["dataset"]
            and other.settings["threshold"] == 0
            and other.target_budget == record.target_budget
            and _same_checkpoint(other, record)
            for other in evaluated
        )
    ]


def _same_checkpoint(one: Record, other: Record) -> bool:
    # Runs are copied between machines, and a path may be relative: a run's folder and file decide,
    # together with what is known of the run. The backbone may have got solo-gating's name.
    return one.checkpoint.parts[-2:] == other.checkpoint.parts[-2:] and all(
        one.pretraining.get(key) == other.pretraining.get(key)
        for key in {*one.pretraining, *other.pretraining} - {"checkpoint", "backbone"}
    )


def _without_copies(records: Iterable[Record]) -> list[Record]:
    """Keep the first of several files that say the same of the same checkpoint."""
    kept: dict[str, Record] = {}
    for r in records:
        same = [
            r.pretraining,
            str(r.checkpoint),
            r.settings,
            r.data,
            r.path,
            r.value,
            r.std,
            r.metric,
        ]
        kept.setdefault(json.dumps(same, sort_keys=True), r)
    return list(kept.values())
