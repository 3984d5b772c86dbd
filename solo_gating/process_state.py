"""One run, one state: what a run changes in its process ends with it."""

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

# Lightning starts the other processes of DDP once; a sweep's next job finds them by these.
_OF_OTHER_PROCESSES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)


@contextmanager
def process_state_kept() -> Iterator[None]:
    """What a run changes in its process is as before when it ends, however it ends.

    That is: environment and arguments, random state, Hydra's current config, PyTorch's settings,
    loggers, warnings and signal handlers. A run of wandb's that began inside is finished. As a
    decorator: of a function that is a run.
    """
    wandb_before = _wandb_run()
    before = [(read(), read, write) for read, write in _STATE]
    python, numpy = random.getstate(), np.random.get_state()
    # Unless CUDA is in use it has no state, and reading one would start it on every device.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=gpus):
        code = 1
        try:
            yield
            code = 0
        finally:
            run = _wandb_run()
            if run is not None and run is not wandb_before:
                run.finish(exit_code=code)
            random.setstate(python)
            np.random.set_state(numpy)
            for state, read, write in before:
                if read() != state:
                    write(state)


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


def _set_environment(variables: dict[str, str]) -> None:
    kept = {}
    if dist.is_available() and dist.is_initialized():
        kept = {key: os.environ[key] for key in _OF_OTHER_PROCESSES if key in os.environ}
    for key in set(os.environ) - set(variables) - set(kept):
        del os.environ[key]
    os.environ.update(variables | kept)


def _set_arguments(arguments: list[str]) -> None:
    sys.argv[:] = arguments


def _deterministic() -> tuple[bool, bool]:
    enabled = torch.are_deterministic_algorithms_enabled()
    return enabled, torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(state: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def _cudnn() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32


def _set_cudnn(state: tuple[bool, bool, bool]) -> None:
    cudnn: Any = torch.backends.cudnn
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = state


def _loggers() -> dict[logging.Logger, tuple[int, bool, list[logging.Handler]]]:
    found = [logging.root, *logging.root.manager.loggerDict.values()]
    return {
        logger: (logger.level, logger.disabled, list(logger.handlers))
        for logger in found
        if isinstance(logger, logging.Logger)
    }


def _set_loggers(state: dict[logging.Logger, tuple[int, bool, list[logging.Handler]]]) -> None:
    for logger in _loggers():
        # Hydra disables all that exist, those that came during the run, too.
        level, logger.disabled, logger.handlers = state.get(
            logger, (logger.level, False, logger.handlers)
        )
        if logger.level != level:  # which all loggers hear of
            logger.setLevel(level)


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in _SIGNALS}


def _set_handlers(handlers: dict[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:  # one that was not set from Python
                signal.signal(number, handler)


def _hydra() -> tuple[Any, Any]:
    return GlobalHydra.instance().hydra, HydraConfig.instance().cfg


def _set_hydra(state: tuple[Any, Any]) -> None:
    GlobalHydra.instance().hydra, HydraConfig.instance().cfg = state


_STATE: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (lambda: dict(os.environ), _set_environment),
    (lambda: list(sys.argv), _set_arguments),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (_deterministic, _set_deterministic),
    (_cudnn, _set_cudnn),
    (_loggers, _set_loggers),
    (_handlers, _set_handlers),
    (_hydra, _set_hydra),
)
