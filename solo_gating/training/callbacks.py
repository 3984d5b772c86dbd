"""What watches a run: progress in one line, and the stop at a loss that is not finite."""

import io
import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from torch import Tensor
from tqdm import tqdm

# solo-learn logs each method's loss under a name of its own.
SSL_LOSSES = (
    "train_vicreg_loss",
    "train_barlow_loss",
    "train_neg_cos_sim",
    "train_nce_loss",
    "train_nnclr_loss",
    "train_nnsiam_loss",
    "train_vibcreg_loss",
    "train_wmse_loss",
    "train_simreg_loss",
    "train_seed_loss",
)
_LABELS = {
    **{f"{name}_step": "ssl" for name in SSL_LOSSES},
    "train_budget_loss_step": "budget",
    "train_bound_loss_step": "bound",
    "train_flops_share_step": "flops",
    "val_flops_share": "val flops",
    "val_dense_acc1": "val dense %",
    "val_gated_acc1": "val gated %",
    "val_dense_knn_acc1": "kNN dense %",
    "val_gated_knn_acc1": "kNN gated %",
    "val_acc1": "val %",
}


class RunProgress(ProgressBar):
    """One bar for the whole run, with the time left and the figures that matter.

    On a terminal it is redrawn twice a second; into a file it writes a line every 10 seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm | None = None

    def disable(self) -> None:
        """Called by Lightning on every process but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar where the run begins or continues."""
        terminal = sys.stdout.isatty()
        if self._enabled:
            self._bar = tqdm(
                total=int(trainer.estimated_stepping_batches),
                initial=_steps_done(trainer, pl_module),
                unit="step",
                file=sys.stdout if terminal else _Lines(),
                mininterval=0.5 if terminal else 10,
                dynamic_ncols=terminal,
                bar_format="{desc}{percentage:3.0f}% [{elapsed}<{remaining}]{postfix}",
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Move on; figures are read only when the bar is due to be drawn."""
        if self._bar is None:
            return
        self._bar.set_description_str(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} ", refresh=False
        )
        if self._bar._time() - self._bar.last_print_t >= self._bar.mininterval:
            self._bar.set_postfix_str(summary_line(trainer.callback_metrics), refresh=False)
        self._bar.update(_steps_done(trainer, pl_module) - self._bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar with the last figures."""
        if self._bar is not None:
            self._bar.set_postfix_str(summary_line(trainer.callback_metrics), refresh=True)
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _steps_done(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    """Of the steps that Lightning has estimated: the optimiser's, or where these are several, batches."""
    if pl_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


class _Lines(io.StringIO):
    """Turns a bar's redrawings into lines on the standard output."""

    def write(self, text: str) -> int:
        if line := text.strip():
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        return len(text)


def summary_line(metrics: dict[str, Tensor]) -> str:
    """The figures that matter among Lightning's metrics, in a few words."""
    shown = {label: float(metrics[name]) for name, label in _LABELS.items() if name in metrics}
    if "val dense %" in shown or "val gated %" in shown:
        shown.pop("val %", None)
    return " | ".join(
        f"{label} {value:.0%}" if label.endswith("flops") else f"{label} {value:.4g}"
        for label, value in shown.items()
    )


class NonFiniteLossError(ArithmeticError):
    """A loss or a weight became infinite or NaN.

    Args:
        epoch: in which the run stopped.
        name: of what is not finite.
        step: after which it was first seen.
    """

    def __init__(self, epoch: int, name: str, step: int):
        super().__init__(epoch, name, step)

    def __str__(self) -> str:
        epoch, name, step = self.args
        return (
            f"training stopped in epoch {epoch}: {name} is not finite at step {step}; the last "
            "checkpoint before it is kept"
        )


def first_not_finite(checkpoint: Mapping[str, Any]) -> str | None:
    """The name of the first weight, buffer or state of an optimizer that is infinite or NaN.

    All are looked at on their device, which is waited for once.

    Args:
        checkpoint: `state_dict` and, if it is there, `optimizer_states`, as in a checkpoint.
    """
    named = dict(checkpoint["state_dict"])
    for optimizer in checkpoint.get("optimizer_states", []):
        for parameter, state in optimizer["state"].items():
            for key, value in state.items():
                named[f"the optimizer's {key} of parameter {parameter}"] = value
    names = [
        name
        for name, value in named.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    ]
    if not names:
        return None
    device = named[names[0]].device
    finite = torch.stack([torch.isfinite(named[name]).all().to(device) for name in names])
    return None if finite.all() else names[int(finite.logical_not().nonzero()[0])]


class StopAtNonFiniteLoss(Callback):
    """Stops the run at a loss that is not finite, before a checkpoint is written with it.

    What the last step makes of the weights has no loss any more: they are checked at the end. (The
    checkpoints check what they save, see `checkpoints.WholeFiles`.)

    Every step is checked on the device; the result is read at the logger's interval and at the
    end of each epoch, so that the check costs no synchronisation in between.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._first_bad: Tensor | None = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the first step at which each part is not finite."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        parts = {
            name: value
            for name, value in trainer.callback_metrics.items()
            if name.startswith("train_") and name.endswith("_step")
        }
        parts["the total loss"] = loss
        finite = torch.isfinite(torch.stack([p.detach().reshape(()) for p in parts.values()]))
        if self._first_bad is None or len(self._first_bad) != len(parts):
            self._parts = list(parts)
            self._first_bad = torch.full((len(parts),), -1, device=finite.device)
        step = trainer.global_step
        self._first_bad = torch.where(~finite & (self._first_bad < 0), step, self._first_bad)
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._stop_if_bad(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before the epoch's checkpoint is written (Lightning runs that callback last)."""
        self._stop_if_bad(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the weights, of a run without checkpoints, too."""
        if name := first_not_finite({"state_dict": pl_module.state_dict()}):
            # Lightning counts the epoch as done by now.
            raise NonFiniteLossError(trainer.current_epoch - 1, name, trainer.global_step)

    def _stop_if_bad(self, trainer: pl.Trainer) -> None:
        if self._first_bad is None or (first := self._first_bad.max().item()) < 0:
            return
        steps = {
            name: step
            for name, step in zip(self._parts, self._first_bad.tolist(), strict=True)
            if step >= 0
        }
        first = min(steps.values())
        name = next(name for name, step in steps.items() if step == first)
        raise NonFiniteLossError(trainer.current_epoch, name.removesuffix("_step"), first)
