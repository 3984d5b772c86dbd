"""How fast views are made: by solo-learn's pipeline from PIL images, and in batches on a device.

    python -m solo_gating.main_benchmark_data --config-name vicreg_dual_cifar100 output=DIR \\
        data.format=npz data.train_path='data/train_*.npz' [key=value ...]

    seconds=20  for all pipelines together
    threads=1   of PyTorch's operations

The config is one of pre-training, for what `data.pipeline: device` can take; --help lists them. Both pipelines
run in this process and take turns in a new order each round: `workers` is what one worker process does
(data.num_workers of them, each on a core of its own, are at best so many times as fast), `device` runs on the CPU
and, where there is one, on the GPU. A batch is everything up to what a training step is given. Writes
benchmark_data.json: for each pipeline the median over rounds of milliseconds per batch and images/s (each with
all its views), and the ratio, the median over rounds of workers' time / own time.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from ..checks import one_of
from ..config.arguments import command_parser
from ..config.compose import check_overrides, composed, config_names, user_path
from ..config.pretraining import prepare_config
from ..data import Place, training_loader
from ..files import make_folder, write_json
from ..terminal import say
from ..texts import aligned
from .machine import check_effort, cores, cpu_name, torch_threads, versions
from .timing import interleaved, is_noisy, paired_ratio

_BASELINE = "workers"


def benchmark_data(options: argparse.Namespace) -> dict[str, Any]:
    """Time the pipelines, print a line for each, and write the file.

    Args:
        options: as parsed by `main`.

    Returns:
        What `benchmark_data.json` holds.

    Raises:
        InputError: before any timing, for what cannot be used.
    """
    cfg = _config(options)
    calls = _pipelines(cfg)
    make_folder(options.output)
    with torch_threads(options.threads):
        times = interleaved(calls, options.seconds)
    batch = cfg.optimizer.batch_size
    report = {
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": cores(),
        "threads": options.threads,
        "versions": versions(("torch", "torchvision", "pillow", "kornia")),
        "config": options.config_name,
        "batch": batch,
        "augmentations": OmegaConf.to_container(cfg.augmentations, resolve=True),
        "rows": [_row(name, times, batch) for name in calls],
    }
    write_json(options.output / "benchmark_data.json", report)
    say("\n".join(aligned([_cells(row) for row in report["rows"]])))
    return report


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["pipeline"],
        f"{row['milliseconds']:.2f} ms",
        f"{row['images_per_second']:.0f} images/s",
        f"{row['ratio']:.2f}×",
        *(["(noisy)"] if row["noisy"] else []),
    ]


def _row(name: str, times: dict[str, list[float]], batch: int) -> dict[str, Any]:
    own, baseline = times[name], times[_BASELINE]
    seconds = float(np.median(own))
    return {
        "pipeline": name,
        "milliseconds": 1000 * seconds,
        "images_per_second": batch / seconds,
        "ratio": paired_ratio(baseline, own),
        "rounds": len(own),
        "noisy": is_noisy(own, baseline),
    }


def _config(options: argparse.Namespace) -> DictConfig:
    check_effort(options.threads, options.seconds)
    one_of("config-name", options.config_name, config_names())
    check_overrides(options.overrides, {"data.pipeline": "none: both are timed"})
    cfg = composed(options.config_name, options.overrides)
    cfg.data.pipeline, cfg.data.num_workers = "device", 0
    return prepare_config(cfg)


def _pipelines(cfg: DictConfig) -> dict[str, Callable[[], Any]]:
    workers: Any = OmegaConf.merge(cfg, {"data": {"pipeline": "workers"}})
    calls = {
        _BASELINE: _next_batch(training_loader(workers)),
        "device, CPU": _next_batch(training_loader(cfg)),
    }
    if torch.cuda.is_available():
        place = Place(torch.device("cuda"))
        calls["device, GPU"] = _next_batch(training_loader(cfg, place), torch.cuda.synchronize)
    return calls


def _next_batch(loader: Any, wait: Callable[[], Any] | None = None) -> Callable[[], Any]:
    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()

    def call() -> None:
        next(batches)
        if wait is not None:
            wait()

    return call


def parser() -> argparse.ArgumentParser:
    """What the command understands."""
    made = command_parser(
        "main_benchmark_data", __doc__, "configs:\n  " + "\n  ".join(config_names())
    )
    made.add_argument("--config-name", required=True)
    made.add_argument("--seconds", type=float, default=20.0)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--output", type=user_path, required=True)
    made.add_argument("overrides", nargs="*", metavar="key=value")
    return made
