"""What the evaluations of a frozen encoder share: config, hardware, data, and where results go."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..backbones import TwoPathResNet
from ..backbones.statistics import recalibrated
from ..checkpoints.encoder import Encoder, encoder_of
from ..checkpoints.reading import args_beside, as_text, literal
from ..checks import at_least, is_number, one_of, require, true_or_false
from ..config.arguments import ALIASES
from ..config.compose import composed
from ..config.defaults import DEFAULTS
from ..config.pretraining import number_of_classes
from ..data import (
    DATASETS,
    FORMATS,
    check_augmentations,
    check_data,
    evaluation_loader,
    evenly,
)
from ..data.augmentations import evaluation_transform
from ..data.folders import UnlabelledFolder
from ..data.workers import end_with_parent
from ..errors import InputError
from ..files import make_folder, one_at_a_time, read_json, write_json
from ..flops import count_flops
from ..metrics import data_of
from ..solo_learn import METHODS
from ..training.checkpoints import plain
from ..training.trainer import refusal
from .extract import Extraction, extract

# The sizes at which solo-learn's main_linear.py shows the images of a data set.
_CROP_SIZES = {"cifar10": 32, "cifar100": 32, "stl10": 96, "imagenet100": 224, "imagenet": 224}
_IMAGES_AT_ONCE = 256  # that re-estimate statistics
# Lightning's precisions in which the weights themselves are; with the others they are float32.
_TRUE_DTYPES = {
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "64-true": torch.float64,
    64: torch.float64,
    "64": torch.float64,
}


@dataclass(frozen=True)
class Evaluation:
    """An encoder, images, and a folder for what comes out.

    Attributes:
        kind: "linear", "knn", ...
        cfg: the complete config: `data` and `augmentations` are those of the evaluation.
        fabric: Lightning's processes and devices.
        encoder: on this process's device.
        paths: those to evaluate.
        loaders: images without augmentation, of each split that was asked for.
        statistics: batches of the training images that re-estimate BatchNorm statistics; None if these
            stay as pre-training has left them.
        settings: all that decides the result, but for path and seeds.
        identity: of settings, data and checkpoint: equal for equal results.
        folder: for the results; by default one for each identity.
    """

    kind: str
    cfg: DictConfig
    fabric: Fabric
    encoder: Encoder
    paths: tuple[str, ...]
    loaders: dict[str, DataLoader]
    settings: dict[str, Any]
    identity: str
    folder: Path
    statistics: DataLoader | None = None

    def of_path(self, path: str) -> AbstractContextManager[None]:
        """A context in which a path is evaluated as its dial stands, with statistics of its own
        where the config asks for them (`recalibrate`)."""
        return nullcontext() if self.statistics is None else self._recalibrated(path)

    @contextmanager
    def _recalibrated(self, path: str) -> Iterator[None]:
        with ExitStack() as stack:
            with self.fabric.autocast():
                stack.enter_context(recalibrated(self.encoder.backbone, self.statistics, path))  # type: ignore[arg-type]
            yield

    def some(self, split: str, most: int) -> tuple[Tensor, Tensor]:
        """At most so many images of a split, evenly spread over it, and their targets."""
        dataset: Any = self.loaders[split].dataset
        images, targets = zip(*(dataset[i] for i in evenly(len(dataset), most)), strict=True)
        return torch.stack(images), torch.as_tensor(targets)

    def extract(self, split: str, path: str) -> Extraction:
        """Features, decisions and FLOPs of a split on one path."""
        with self.fabric.autocast():
            return extract(self.encoder.backbone, self.loaders[split], path, self.encoder.head)

    def extract_labelled(self, split: str, path: str) -> Extraction:
        """The same, of a split that needs labels.

        Raises:
            InputError: if none of the images has one.
        """
        found = self.extract(split, path)
        if not (found.targets >= 0).any():
            raise InputError(
                f"data.{split}_path: no image has a label, expected for this evaluation are "
                "labelled images (data.no_labels=false)"
            )
        return found

    def say(self, line: str) -> None:
        """Tell the user, once, however many processes there are."""
        self.fabric.print(line, flush=True)

    def earlier(self) -> dict[str, Any]:
        """What the folder's `metrics.json` holds of these settings; empty where that is nothing."""
        before = _metrics_before(self.folder / "metrics.json")
        return before if before.get("identity") == self.identity else {}

    def write(
        self, rows: dict[str, dict[str, Any]], train_images: int, train: Any = None
    ) -> dict[str, Any]:
        """Write `metrics.json`, keeping what it holds of other paths in the same settings.

        Args:
            rows: the figures of each path.
            train_images: how many images had a part in them, besides the validation images.
            train: their loader, if it is not among `loaders`.

        Returns:
            What the file then holds.
        """
        file = self.folder / "metrics.json"
        loaders = self.loaders if train is None else {**self.loaders, "train": train}
        figures = {
            "identity": self.identity,
            "evaluation": self.kind,
            "pretraining": self.encoder.description(),
            "data": data_of(
                self.cfg,
                train_images,
                len(self.loaders["val"].dataset),  # type: ignore[arg-type]
                **loaders,
            ),
            "settings": self.settings,
            **rows,
        }
        with one_at_a_time(self.folder):  # another terminal may evaluate the other path
            metrics = self.earlier() | figures
            if self.fabric.is_global_zero:
                write_json(file, metrics)
        self.say(str(file))
        return metrics


def _metrics_before(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except InputError:  # there is none, or it is damaged: then there is nothing in it to keep
        return {}


def prepare_evaluation(
    cfg: DictConfig, kind: str, settings: tuple[str, ...], splits: tuple[str, ...]
) -> Evaluation:
    """Check a config, start the processes, load encoder and images, before any long work.

    The folder for the results is made, and that it can be written is checked.

    The images are those of pre-training unless `data` names others. Images of another data set
    have the size and the normalisation with which solo-learn evaluates it.

    Args:
        cfg: an evaluation's config; completed in place.
        kind: the evaluation's name, in paths and in `metrics.json`.
        settings: the config keys that decide this evaluation's result, besides the data.
        splits: of the images, "train" and "val", whose features are wanted.

    Raises:
        InputError: naming the key, what was found and what is accepted.
    """
    evaluation = _prepare(cfg, kind, settings, splits)
    make_folder(evaluation.folder)
    if cfg.output:  # else it lies beside the checkpoint, whatever that was called before
        before = _metrics_before(evaluation.folder / "metrics.json").get("pretraining")
        if before is not None and _run(before) != _run(evaluation.encoder.description()):
            raise InputError(
                f"output: got {str(evaluation.folder)!r}, whose metrics.json is of another run, "
                f"{before.get('checkpoint')!r}; expected another folder"
            )
    return evaluation


def _run(pretraining: Mapping[str, Any]) -> list[Any]:
    """What tells runs apart wherever their folders are moved, and however long they are continued."""
    folder = Path(pretraining.get("checkpoint") or "").parent.name
    return [folder, *(pretraining.get(key) for key in ("name", "method", "seed"))]


def _prepare(
    cfg: DictConfig, kind: str, settings: tuple[str, ...], splits: tuple[str, ...]
) -> Evaluation:
    OmegaConf.set_struct(cfg, False)
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise InputError("checkpoint: missing, expected a checkpoint's path")
    at_least("batch_size", cfg.batch_size, 1)
    require("threshold", cfg.threshold, is_number, "a number")
    encoder = encoder_of(cfg.checkpoint, cfg.get("features", "backbone"))
    paths = encoder.paths(cfg.path)
    backbone = encoder.backbone
    if isinstance(backbone, TwoPathResNet):
        backbone.threshold = cfg.threshold
        backbone.budget = cfg.budget
    else:
        for key, accepted in (("threshold", 0), ("budget", "null")):
            if cfg[key]:
                raise InputError(
                    f"{key}: got {cfg[key]}, the encoder has no gates; expected {accepted}"
                )
    _complete_data(cfg, encoder.args)
    loaders = {split: evaluation_loader(cfg, split, cfg.batch_size) for split in splits}
    if cfg.recalibrate is None:
        cfg.recalibrate = getattr(METHODS.get(encoder.args.method), "recalibrate", 0)
    statistics = statistics_loader(cfg, cfg.recalibrate) if cfg.recalibrate else None
    fabric = _launch(cfg)
    dtype = _TRUE_DTYPES.get(cfg.precision, torch.float32)
    backbone.to(fabric.device, dtype)
    encoder.head.to(fabric.device, dtype)

    config = plain(cfg)
    decisive = {
        key: config[key]
        for key in (*settings, "threshold", "features", "precision")
        if key in config
    }
    if getattr(backbone, "budget", None) is not None:
        decisive["budget"] = backbone.budget
    if cfg.recalibrate:
        decisive["recalibrate"] = cfg.recalibrate
    earlier = {name: key for key, name in ALIASES.items()}
    free = ("num_workers", "on_damaged", "num_large_crops", "num_small_crops")
    data = {key: value for key, value in config["data"].items() if key not in free}
    # Earlier names, so that folders of finished evaluations are found again.
    named = {earlier.get(key, key): value for key, value in decisive.items()}
    decides = [named, data, cfg.augmentations[0].crop_size, encoder.epochs]
    identity = hashlib.sha1(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:6]
    name = f"{kind}-{cfg.data.dataset}-{identity}"
    folder = Path(cfg.output) if cfg.output else encoder.checkpoint.parent / "evaluation" / name
    return Evaluation(
        kind, cfg, fabric, encoder, paths, loaders, decisive, identity, folder, statistics
    )


def statistics_loader(cfg: DictConfig, images: int) -> DataLoader:
    """Batches `[images, targets]` for `recalibrated`: training images, evenly spread over the set.

    Their sizes are the same but for one image, and no key's: no figure depends on what fits into memory.

    Args:
        cfg: a complete config.
        images: at most so many.
    """
    dataset: Any = evaluation_loader(cfg, "train", 1).dataset
    chosen = evenly(len(dataset), images)
    parts = -(-len(chosen) // _IMAGES_AT_ONCE)
    return DataLoader(
        dataset,
        batch_sampler=[
            chosen[part::parts] for part in range(parts)
        ],  # a folder is in order of class
        num_workers=cfg.data.num_workers,
        worker_init_fn=end_with_parent,
    )


def evaluation_of(checkpoint: Path, overrides: list[str], splits: tuple[str, ...]) -> Evaluation:
    """An encoder with images, for commands that take `key=value` but no config of their own.

    Args:
        checkpoint: of the encoder.
        overrides: of the data and the hardware, as `data.val_path=...`.
        splits: as in `prepare_evaluation`.

    Raises:
        InputError: as `prepare_evaluation`.
    """
    cfg = composed("knn", overrides)
    cfg.checkpoint = as_text(str(checkpoint))
    return _prepare(cfg, "knn", (), splits)


def images_of(
    checkpoint: Path, overrides: list[str], split: str, folder: str | None = None
) -> Dataset:
    """Images as an encoder expects them, `(image, target)`, without the encoder.

    Args:
        checkpoint: of the encoder.
        overrides: of the data, as for `evaluation_of`.
        split: "train" or "val", unless there is a folder.
        folder: whose images are wanted, at any depth, prepared as those of pre-training.

    Raises:
        InputError: as `prepare_evaluation`.
    """
    cfg = composed("knn", overrides)
    _complete_data(cfg, args_beside(checkpoint, "checkpoint"))
    if folder is None:
        return evaluation_loader(cfg, split, 1).dataset
    transform = evaluation_transform(cfg.data.dataset, cfg.augmentations)
    return UnlabelledFolder(folder, transform, "images")


def flops_row(found: Extraction, encoder: Encoder) -> dict[str, float]:
    """The keys `flops` and, on the gated path, `flops_cut` of a row; empty if they are not known."""
    if found.flops is None:
        return {}
    row = {"flops": found.flops}
    if found.channels is not None:
        dense = count_flops(encoder.backbone, found.resolution).dense  # type: ignore[arg-type]
        row["flops_cut"] = 1 - found.flops / dense
    return row


def _complete_data(cfg: DictConfig, args: DictConfig) -> None:
    """The evaluation's `data` and `augmentations`, from the config and the pre-training's."""
    given = _given(cfg.get("data"))
    base = _given(None if given.get("dataset") else args.data)
    cfg.data = OmegaConf.merge(DEFAULTS["data"], base, given)
    if cfg.data.dataset != args.data.dataset and not given.get("train_path"):
        raise InputError(f"data.train_path: missing for data.dataset={cfg.data.dataset}")
    # It names the folder of the results.
    one_of("data.dataset", cfg.data.dataset, DATASETS)
    # solo-learn's "dali" reads folders, too.
    require("data.format", cfg.data.format, lambda v: v in (*FORMATS, "dali"), " or ".join(FORMATS))
    true_or_false("data.no_labels", cfg.data.no_labels)
    check_data(cfg.data)
    at_least("data.num_workers", cfg.data.num_workers, 0)
    cfg.data.split = "train"  # STL-10's labelled part
    cfg.data.num_classes = number_of_classes(cfg.data)
    # What else a view has is augmentation.
    first = (args.get("augmentations") or [{}])[0]
    view = OmegaConf.create(
        {key: first[key] for key in ("crop_size", "mean", "std") if first.get(key) is not None}
    )
    view.num_crops = 1
    if cfg.data.dataset != args.data.dataset:
        view.crop_size = _CROP_SIZES.get(cfg.data.dataset, view.get("crop_size"))
    if cfg.crop_size is not None:
        at_least("crop_size", cfg.crop_size, 1)
        view.crop_size = cfg.crop_size
    cfg.augmentations = OmegaConf.create([view])
    check_augmentations(cfg.augmentations)


def _given(group: DictConfig | None) -> Any:
    """What a group has that is not null; no text in it is interpolated a second time."""
    values: Any = OmegaConf.to_container(group, resolve=True) if group else {}
    return OmegaConf.create(literal({k: v for k, v in values.items() if v is not None}))


def _launch(cfg: DictConfig) -> Fabric:
    try:
        fabric = Fabric(
            accelerator=cfg.accelerator,
            devices=cfg.devices,
            num_nodes=cfg.num_nodes,
            strategy=cfg.strategy,
            precision=cfg.precision,
        )
    except Exception as error:  # whatever a value, or SLURM's variables, make Lightning say
        raise InputError(refusal("Fabric", error)) from error
    fabric.launch()
    return fabric
