"""What a run says when one of its processes dies."""

import logging
import re
import sys

CONTINUE = "the same command with auto_resume.enabled=true continues from the last checkpoint"

_LIGHTNING_LAUNCHER = "lightning.fabric.strategies.launchers.subprocess_script"
# What PyTorch raises in a process when another one is gone, and which one that was.
_SIGNS = {
    r"^DataLoader worker": "a process that loads images (data.num_workers)",
    r"gloo|NCCL|[Cc]onnection (closed|reset) by peer": "another process of this run (devices)",
}


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
