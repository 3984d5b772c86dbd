"""Random overrides of every config: each ends in a run, or in one sentence.

    python -m tests.fuzz [--seed 0] [--cases 300] [--command main_pretrain]

Runs in this process and in a temporary folder, on 32 small images; training is one step. Prints what
ended otherwise, and exits with 1 if it was more than one in a hundred.
"""

import argparse
import contextlib
import inspect
import io
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf

import solo_gating.main_umap
import solo_gating.training.model
from solo_gating import main_flops, main_knn, main_linear, main_policy, main_pretrain, main_umap
from solo_gating.config.compose import composed

from .support.helpers import write_images

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (main_pretrain, main_flops, main_knn, main_linear, main_policy, main_umap)
}
VALUES = (
    *("0", "1", "-1", "2", "0.5", "-0.5", "1e-300", "1e400", "-1e400", "nan", "inf", "-inf"),
    *(str(2**31), str(2**63), str(-(2**63)), "1" + 400 * "0", "007", "1_000", "1.0"),
    *("''", "' '", "null", "true", "false", "abc", "None", "ünï 日本", "it's", "'a b'", 5000 * "x"),
    *("[]", "{}", "[1,2]", "[[]]", "[null]", "{a: 1}", "{a: {b: []}}", "[a,b]", "[0.1,0.9]", "1,2"),
    *("${x}", "${seed}", "${oc.env:HOME}", "${oc.env:ABSENT}", "${.}", "${", "$HOME", "a=b", "a:b"),
    *("../..", "a/b", "~", "~/x", "a\\b", "!", "#", "auto", "cpu", "gated", "dense", "euclidean"),
)
_PRETRAINING = (
    *("max_epochs=1", "backbone.kwargs.width=4", "method_kwargs.proj_hidden_dim=8"),
    *("method_kwargs.proj_output_dim=8", "final_knn.enabled=false", "data.num_workers=0"),
    *("enable_progress_bar=false", "optimizer.batch_size=8", "check_val_every_n_epoch=1"),
    *("data.format=npz", "augmentations.0.crop_size=8"),
)
_EVALUATION = ("data.num_workers=0",)
_SHORT = {
    "main_linear": ("seeds=1", "max_epochs=1", "enable_progress_bar=false"),
    "main_policy": ("calibration_images=4",),
}
_ADDED = (
    *("backbone.kwargs.path", "backbone.kwargs.budget", "backbone.kwargs.zero_init_residual"),
    *("optimizer.kwargs.eps", "optimizer.kwargs.lr", "optimizer.exclude_bias_n_norm_wd"),
    *("scheduler.lr_decay_steps", "scheduler.interval", "scheduler.min_lr", "data.nun_workers"),
    *("momentum.base_tau", "hydra.run.dir", "augmentations.0.rrc.crop_min_scale"),
)


class Fuzz:
    """A folder with images and a checkpoint, and commands run there.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path):
        self.work = folder / "a" / "b" / "c"  # so that ../.. leads nowhere else
        self.work.mkdir(parents=True)
        images = write_images(folder / "images.npz", 32)
        self.data = [f"data.{split}_path={images}" for split in ("train", "val")]
        self.data.append("data.num_classes=3")
        with self._here():
            code, text = self._call(
                main_pretrain, [*self._base("main_pretrain"), "checkpoint.dir=base"]
            )
        assert code == 0, text
        self.checkpoint = next(self.work.glob("base/*/*/last.ckpt"))
        self.keys = {name: self._keys(name) for name in COMMANDS}

    def _base(self, command: str) -> list[str]:
        if command in ("main_pretrain", "main_flops"):
            return ["--config-name", "vicreg_dual_digits", *_PRETRAINING, *self.data]
        checkpoint = f"checkpoint={self.checkpoint}"
        return [checkpoint, *_EVALUATION, *_SHORT.get(command, ())]

    def _keys(self, command: str) -> list[str]:
        config = command.removeprefix("main_")
        if command in ("main_pretrain", "main_flops"):
            config = "vicreg_dual_digits"
            trainer = inspect.signature(pl.Trainer.__init__).parameters
            added = [*_ADDED, *(key for key in trainer if key != "self")]
        else:
            added = ["nonsense", "data.nonsense"]
        keys = list(keys_of(composed(config, [])))
        return [*keys, *(f"{'' if key in keys else '+'}{key}" for key in added)]

    def case(self, command: str, draw: random.Random) -> tuple[list[str], str, str]:
        """One to three random overrides of a command.

        Returns:
            The overrides; "run", "sentence", or "trace"; and what was printed.
        """
        overrides = [
            f"{draw.choice(self.keys[command])}={draw.choice(VALUES)}"
            for _ in range(draw.choice((1, 1, 2, 3)))
        ]
        with self._here():
            code, text = self._call(COMMANDS[command], [*self._base(command), *overrides])
        sentences = [line for line in text.splitlines() if line.startswith("error: ")]
        if "Traceback" in text or (code and len(sentences) != 1):
            return overrides, "trace", text
        return overrides, "sentence" if code else "run", text

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        before = Path.cwd()
        os.chdir(self.work)
        home = {"HOME": str(self.work), "HYDRA_FULL_ERROR": ""}
        try:
            with (
                mock.patch.dict(os.environ, home),
                mock.patch.object(pl.Trainer, "fit", _one_step(pl.Trainer.fit)),
                mock.patch.object(Fabric, "launch", _alone(Fabric.launch)),
                mock.patch.object(solo_gating.training.model, "compile_model"),
                mock.patch("solo_gating.evaluate.tasks.umap.load_umap"),
                mock.patch("solo_gating.evaluate.tasks.umap.embed", _embed),
            ):
                yield
        finally:
            os.chdir(before)

    def _call(self, module: ModuleType, arguments: list[str]) -> tuple[int, str]:
        out, code = io.StringIO(), 0
        argv = mock.patch.object(sys, "argv", [module.__name__, *arguments])
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(out)
        with argv, streams[0], streams[1], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module.main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else bool(stop.code)
            except Exception:
                traceback.print_exc()
                code = 1
        return code, out.getvalue()


def keys_of(cfg: DictConfig) -> Iterator[str]:
    """The keys of a config, groups included, with dots."""
    groups: list[tuple[str, Any]] = [("", OmegaConf.to_container(cfg))]
    for above, group in groups:
        for name, value in group.items():
            yield f"{above}{name}"
            if isinstance(value, dict):
                groups.append((f"{above}{name}.", value))


def _one_step(fit: Any) -> Any:
    def fit_one_step(trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.world_size > 1:  # the others will never come
            return
        trainer.fit_loop.epoch_loop.max_steps = 1
        fit(trainer, *args, **kwargs)

    return fit_one_step


def _alone(launch: Any) -> Any:
    return lambda fabric: None if fabric.world_size > 1 else launch(fabric)


def _embed(features: Any, *settings: Any) -> np.ndarray:
    return np.zeros((len(features), 2))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--command", choices=COMMANDS)
    options = parser.parse_args()
    draw, counts = random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        for number in range(options.cases):
            # Two in three are of pre-training, which has most of the keys.
            command = options.command or draw.choice([*COMMANDS, *5 * ["main_pretrain"]])
            overrides, outcome, text = fuzz.case(command, draw)
            counts[outcome] += 1
            if outcome == "trace":
                print(
                    f"\n{number}: {command} {' '.join(overrides)[:300]}\n{text[-1500:]}", flush=True
                )
    print(", ".join(f"{outcome}: {count}" for outcome, count in sorted(counts.items())))
    sys.exit(counts["trace"] > options.cases / 100)


if __name__ == "__main__":
    main()
