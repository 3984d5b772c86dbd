"""What a run says when a signal ends it, or when one of its processes dies."""

import logging
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

CONTINUE = "the same command with auto_resume.enabled=true continues from the last checkpoint"

_LIGHTNING_LAUNCHER = "lightning.fabric.strategies.launchers.subprocess_script"
# What PyTorch raises in a process when another one is gone, and which one that was.
_SIGNS = {
    r"^DataLoader worker": "a process that loads images (data.num_workers)",
    r"gloo|NCCL|[Cc]onnection (closed|reset) by peer": "another process of this run (devices)",
}


class SignalInterrupt(KeyboardInterrupt):
    """A signal asked this process to end; what Ctrl-C ends, it ends.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """For a while SIGTERM and SIGHUP raise `SignalInterrupt`, unless they are ignored or handled."""
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    ]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python has signals in the main thread only
    for number in numbers:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Where Lightning has the signal it calls this, too, and ends between two steps by itself.
    if signal.getsignal(number) is _interrupt:
        raise SignalInterrupt(number)


class EndBySignal(Callback):
    """Takes SIGTERM back from Lightning, which has processes wait for each other in its handler.

    There they may wait for ever. Not under SLURM, where that handler lets requeueing come to its end.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has set its handlers just before."""
        # Those that it calls: its own, under SLURM one more of its own, and what was there before.
        called = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", [])
        if called[1:] == [_interrupt]:
            signal.signal(signal.SIGTERM, _interrupt)


def ending_signal(error: BaseException) -> signal.Signals | None:
    """The signal behind the exception that ends a process; None if there is none."""
    if isinstance(error, SIGTERMException):
        return signal.SIGTERM
    cause: Any = error.__context__ if isinstance(error, SystemExit) else error  # Lightning's ending
    if not isinstance(cause, KeyboardInterrupt):
        return None
    return signal.Signals(getattr(cause, "number", signal.SIGINT))


def lost_process(error: BaseException) -> str | None:
    """One sentence, if an error means that another process died; None for any other error."""
    if isinstance(error, RuntimeError):
        for sign, which in _SIGNS.items():
            if re.search(sign, str(error)):
                reason = str(error).splitlines()[0].split(". ")[0]
                return f"{which} died ({reason}), often for want of memory"
    return None


def announce_dead_processes() -> None:
    """Let Lightning's observer of DDP's processes say why it is about to end this one.

    When a process of a run has died, the observer kills all the others, after a message in a log
    that Hydra has switched off by then.
    """
    logger = logging.getLogger(_LIGHTNING_LAUNCHER)
    if not any(isinstance(handler, _DeadProcess) for handler in logger.handlers):
        logger.addHandler(_DeadProcess())
    logger.disabled = False
    logger.setLevel(logging.INFO)


class _DeadProcess(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"PID (\d+) terminated with code (-?\d+)", record.getMessage()):
            pid, code = found.groups()
            sys.stderr.write(
                f"error: process {pid} of this run ended with code {code}, so that all end; "
                f"{CONTINUE}\n"
            )
            sys.stderr.flush()
