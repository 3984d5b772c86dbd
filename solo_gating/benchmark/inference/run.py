"""How fast an encoder is on this CPU: ours beside PyTorch, ONNX Runtime and OpenVINO.

    python -m solo_gating.main_benchmark checkpoint=PATH/last.ckpt densities=[0.1,0.3,0.5] \\
        batch=[1,64] resolution=[32,224] threads=[1,2] output=DIR [data.val_path=PATH ...]
    python -m solo_gating.main_benchmark random=true densities=[0.1,0.3,0.5] output=DIR

Every key may also be written as --key value, a list as --key a b, a switch as --key.

    checkpoint=PATH     a trained gated encoder; densities are reached with the gates' threshold, and
                        without densities it keeps its own. With data.val_path=... the
                        images are those of the validation set, otherwise random ones
    random=true         an untrained one (backbone, width, stem, seed) whose gates decide by image
                        and are set to the densities: a third of a density is the same channels for all
                        images. Stem: cifar up to 64 pixels, imagenet above
    densities=[...]     shares of the channels to compute, of those that gates choose from
    engines=[...]       of the following; the first four run the dense encoder, and in each precision the
                        fastest of them is the baseline:
        torch           PyTorch, in the faster memory format; bfloat16 by autocast or converted
        compile         torch.compile; it needs a C++ compiler and a minute for each case
        onnxruntime     ONNX Runtime; int8 by its quantiser
        openvino        OpenVINO; int8 by NNCF's quantiser, or without it by ONNX Runtime's
        ours            dense                 our engine, all channels
                        dynamic               our engine, for each image its own channels
        static          static                main_export keep=dynamic of the images: the smaller network
                                              on ONNX Runtime or OpenVINO, the faster of the two
                        static without gates  the same with gates=drop: an approximation (also in int8)
                        dynamic on static     our engine on the smaller network
    dtypes=[...]        float32, and of bfloat16 and int8 those that are wanted; bfloat16 of others' engines
                        where the CPU has instructions for it
    clock=cpu           CPU time of the process, with one thread, for machines that others use, too
    isa=avx2            keep to an instruction set (also: portable). ONNX Runtime cannot and is left out;
                        OpenVINO's convolutions can, its own kernels, as for pooling, cannot

All engines take turns, of as many calls for each, in a new order each round, for seconds=20 per case or five
rounds; speed-up is the median over rounds of baseline time / own time in the same round, over the fastest dense
engine of the same precision, and over that in float32. The ceiling is dense FLOPs / FLOPs of what was computed,
gates included (Amdahl), by the engine's own decisions, and efficiency is speed-up / ceiling. Every engine's
features are compared with PyTorch's first; in bfloat16 and int8 with those at the same masks, and how many
decisions rounding flips is said (with random=true those of random gates, which decide on noise: that says
nothing of trained ones). There each density is met by a threshold for the engine's own decisions. The last line
says what is fastest here. Writes benchmark.json and benchmark.png.
"""

import argparse
from typing import Any

from solo_gating_runtime.library import chosen_engine

from ...backbones import gated_backbones
from ...backbones.resnet import STEMS
from ...checks import at_least, is_share, one_of, require
from ...config.arguments import command_parser
from ...config.compose import check_overrides, user_path
from ...config.schema import SEED
from ...errors import InputError
from ...files import make_folder, write_json
from ...plots.benchmark import draw_chart
from ...terminal import say
from ..machine import check_effort, cores, cpu_name, versions
from ..timing import CLOCKS
from .advice import advice
from .cases import LEAST_WIDTH
from .engines import DTYPES, ENGINES, OURS, STATIC, Conditions
from .machine import NOT_RESTRICTED
from .measure import Case, measure
from .sources import CheckpointSource, RandomSource
from .table import format_case

# The options that decide what overrides would, too.
_DECIDED_BY = {
    "threshold": "densities alone",
    "crop_size": "resolution alone",
    "batch_size": "batch alone",
}
_DENSITIES = [0.1, 0.3, 0.5]


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Time all cases; print each one's table and write the files after it.

    Args:
        options: as parsed by `main`.

    Returns:
        What `benchmark.json` holds.

    Raises:
        InputError: before any timing, for what cannot be used; or for an engine that is wrong.
    """
    _check(options)
    source = _source(options)
    make_folder(options.output)
    report: dict[str, Any] = {
        "cpu": cpu_name(),
        "isa": chosen_engine(options.isa),
        "cores": cores(),
        "versions": versions(("torch", "onnxruntime", "openvino", "nncf")),
        "network": source.description,
        "images": source.images,
        "seconds": options.seconds,
        "clock": options.clock,
        "rows": [],
        "advice": [],
    }
    say(_heading(report))
    engines, say_once = _engines(options), _Once()
    dtypes = tuple(dtype for dtype in DTYPES if dtype in options.dtypes)
    for name in set(options.engines) - set(engines):
        say_once(f"{name} is left out: it cannot be kept to {options.isa}")
    if STATIC in engines and not source.has_static:
        engines = tuple(name for name in engines if name != STATIC)
        say_once(
            "static is left out: gates that do more than choose channels have no smaller network"
        )
    for resolution in options.resolution or source.resolutions:
        for dense, gated in source.batches(resolution, options.batch):
            for threads in options.threads:
                conditions = Conditions(threads, CLOCKS[options.clock])
                rows = measure(
                    Case(dense, gated, source.others(resolution)),
                    engines,
                    dtypes,
                    conditions,
                    options.seconds,
                    say_once,
                )
                report["rows"] += rows
                report["advice"].append(advice(rows))
                write_json(options.output / "benchmark.json", report)
                draw_chart(report["rows"], options.output / "benchmark.png", report["cpu"])
                say("\n" + format_case(rows) + "\n" + report["advice"][-1])
    return report


class _Once:
    """Prints each sentence the first time that it is said."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            say(sentence)


def _source(options: argparse.Namespace) -> RandomSource | CheckpointSource:
    if options.random:
        return RandomSource(
            options.backbone or "resnet18_gated",
            options.width or 64,
            options.stem,
            options.densities or _DENSITIES,
            options.seed,
        )
    return CheckpointSource(
        options.checkpoint, options.densities or [], options.overrides, options.seed
    )


def _check(options: argparse.Namespace) -> None:
    if options.random == (options.checkpoint is not None):
        found = "both" if options.random else "neither"
        raise InputError(f"checkpoint, random: got {found}, expected one of them")
    check_overrides(options.overrides, _DECIDED_BY)
    SEED.check("seed", options.seed)
    for name in options.engines:
        one_of("engines", name, ENGINES)
    if not set(_engines(options)) - {OURS, STATIC}:
        raise InputError(
            "engines: got none to compare with, expected at least one besides ours and static"
            + (f", and not {', '.join(NOT_RESTRICTED)} with isa" if options.isa else "")
        )
    for dtype in options.dtypes:
        one_of("dtypes", dtype, DTYPES)
    if "float32" not in options.dtypes:
        raise InputError(
            f"dtypes: got {', '.join(options.dtypes)}, expected float32, too: all are compared with it"
        )
    one_of("clock", options.clock, CLOCKS)
    if options.clock == "cpu" and max(options.threads) > 1:
        raise InputError(
            f"clock: got cpu with {max(options.threads)} threads, whose times it would add up; "
            "expected threads=[1]"
        )
    for density in options.densities or []:
        require("densities", density, is_share, "a number in (0, 1]")
    for key in ("batch", "resolution"):
        for number in getattr(options, key) or []:
            at_least(key, number, 1)
    for threads in options.threads:
        check_effort(threads, options.seconds)
    if options.checkpoint is not None:
        for key in ("backbone", "width", "stem"):
            if getattr(options, key) is not None:
                found = getattr(options, key)
                raise InputError(f"{key}: got {found} for a checkpoint, expected with random=true")
        return
    if options.overrides:
        raise InputError(f"got {options.overrides[0]!r}, expected only with checkpoint=...")
    if options.backbone is not None:
        one_of("backbone", options.backbone, gated_backbones())
    if options.width is not None:
        at_least("width", options.width, LEAST_WIDTH)
    if options.stem is not None:
        one_of("stem", options.stem, STEMS)


def _engines(options: argparse.Namespace) -> tuple[str, ...]:
    left_out = NOT_RESTRICTED if options.isa else ()
    return tuple(name for name in ENGINES if name in options.engines and name not in left_out)


def _heading(report: dict[str, Any]) -> str:
    known = [f"{name} {number}" for name, number in report["versions"].items() if number]
    network = ", ".join(f"{key} {value}" for key, value in report["network"].items())
    return (
        f"{report['cpu']}, {report['isa']}, {report['cores']} cores\n{', '.join(known)}\n"
        f"{network}; {report['images']} images"
    )


def parser() -> argparse.ArgumentParser:
    """What the command understands."""
    made = command_parser("main_benchmark", __doc__)
    made.add_argument("--checkpoint", type=user_path)
    made.add_argument("--random", action="store_true")
    made.add_argument("--densities", type=float, nargs="+", help="random: default 0.1 0.3 0.5")
    made.add_argument("--batch", type=int, nargs="+", default=[1])
    made.add_argument(
        "--resolution", type=int, nargs="+", help="default: 32, or pre-training's crop size"
    )
    made.add_argument("--threads", type=int, nargs="+", default=[1])
    made.add_argument("--engines", nargs="+", default=list(ENGINES))
    made.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    made.add_argument("--clock", default="wall", help="wall or cpu")
    made.add_argument("--seconds", type=float, default=20.0, help="for each case; default 20")
    made.add_argument("--isa")
    made.add_argument("--backbone", help="default resnet18_gated")
    made.add_argument("--width", type=int, help="default 64")
    made.add_argument("--stem")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output", type=user_path, required=True)
    made.add_argument("overrides", nargs="*", metavar="key=value")
    return made
