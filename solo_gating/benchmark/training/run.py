"""How long a training step takes: gated methods beside solo-learn's own VICReg.

    python -m solo_gating.main_benchmark_train batch=64 resolution=32 output=DIR [key=value ...]

Every key may also be written as --key value.

    methods             of vicreg_dual, vicreg_gated, vicreg_dual_two_encoders (two encoders that share nothing,
                        the unification paper's Table 5), vicreg_any, vicreg_distilled; vicreg always takes part
    batch               images of each of the two views
    resolution          in pixels; stem: cifar up to 64, imagenet above
    backbone_width      of the first stage; 64 is ResNet-18's
    projector_width     of its layers; 2048 in the papers
    optimization        lars (the papers'), sgd or adamw
    precision           32-true, bf16-mixed or 16-mixed
    memory_format       contiguous or channels_last
    compile             torch.compile of backbone and projector; it needs a C++ compiler and some minutes
    changes             also the first of the methods with one thing different, each a row of its own: of compile,
                        contiguous, channels_last, 32-true, bf16-mixed, 16-mixed, fused (of sgd or adamw)
    accelerator         cpu, gpu, or auto
    threads             of PyTorch on the CPU

A step is forward, both views' losses, backward and optimiser, on one random batch: no data is loaded and nothing
is logged. The methods take turns of one step in a new order each round, for seconds=60 or five rounds; the ratio is
the median over rounds of a method's time / vicreg's in the same round. Memory is the most that is held at any
moment of a step: weights, gradients, the optimiser's state, the batch, and what the step allocates. Then the
parts of each method that vicreg has not are timed alone, and a large matrix product: a step's operations per
second are given as a share of its. Writes benchmark_train.json.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...checks import at_least, one_of, require
from ...config.arguments import command_parser
from ...config.compose import user_path
from ...config.schema import SEED
from ...files import make_folder, write_json
from ...terminal import say
from ...texts import aligned
from ..machine import check_effort, cores, cpu_name, torch_threads, versions
from ..timing import interleaved, is_noisy, noisy_note, paired_ratio
from .memory import MEANING
from .parts import part_milliseconds
from .peak import matrix_flops_per_second, step_flops
from .step import OPTIMIZATIONS, PRECISIONS, RECIPES, Setup, TrainingStep

BASELINE = "vicreg"
_FORMATS = ("contiguous", "channels_last")
_CHANGES: dict[str, dict[str, Any]] = {
    "compile": {"compile": True},
    "contiguous": {"channels_last": False},
    "channels_last": {"channels_last": True},
    **{precision: {"precision": precision} for precision in PRECISIONS},
    "fused": {"fused": True},
}


def benchmark_train(options: argparse.Namespace) -> dict[str, Any]:
    """Time and measure the steps, print the table and write the file.

    Args:
        options: as parsed by `main`.

    Returns:
        What `benchmark_train.json` holds.

    Raises:
        InputError: before any timing, for what cannot be used.
    """
    setup = _setup(options)
    cases = _cases(options, setup)
    make_folder(options.output)
    with torch_threads(options.threads):
        # Of a step that is not compiled; no setting changes them.
        flops = {
            method: step_flops(TrainingStep(method, replace(setup, compile=False)))
            for method in {method for method, _ in cases.values()}
        }
        steps = {name: TrainingStep(method, own) for name, (method, own) in cases.items()}
        device = steps[BASELINE].device
        for step in steps.values():
            step()
        memory = {method: step.peak_bytes() for method, step in steps.items()}
        calls = {method: step.timed for method, step in steps.items()}
        times = interleaved(calls, options.seconds)
        parts = {method: part_milliseconds(step) for method, step in steps.items()}
        peak = matrix_flops_per_second(device, setup.precision)
    report = {
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cores": cores(),
        "threads": options.threads,
        "versions": versions(("torch", "lightning", "solo-learn")),
        "batch": setup.batch,
        "resolution": setup.resolution,
        "backbone_width": setup.width,
        "projector_width": setup.projector,
        "optimization": setup.optimization,
        "precision": setup.precision,
        "memory_format": options.memory_format,
        "compile": setup.compile,
        "seconds": options.seconds,
        "memory": MEANING[device.type],
        "matrix_flops_per_second": peak,
        "rows": [
            {**row, "share_of_peak": 1000 * flops[method] / row["milliseconds"] / peak}
            for row, (method, _) in zip(
                rows(times, memory, parts, setup.batch), cases.values(), strict=True
            )
        ],
    }
    write_json(options.output / "benchmark_train.json", report)
    say(format_report(report))
    return report


def rows(
    times: Mapping[str, list[float]],
    memory: Mapping[str, int],
    parts: Mapping[str, dict[str, float]],
    batch: int,
) -> list[dict[str, Any]]:
    """The figures of each method, beside those of `BASELINE`.

    Args:
        times: seconds per step in each round.
        memory: bytes, the most that a step holds.
        parts: milliseconds of parts of the step.
        batch: images of each view.
    """
    base = times[BASELINE]
    return [
        {
            "method": method,
            "ratio": paired_ratio(own, base),
            "milliseconds": 1000 * float(np.median(own)),
            "peak_memory_mib": memory[method] / 2**20,
            "memory_ratio": memory[method] / memory[BASELINE],
            "images_per_second": batch / float(np.median(own)),
            "extra_milliseconds": 1000 * float(np.median(np.subtract(own, base))),
            "parts_milliseconds": parts[method],
            "rounds": len(own),
            "noisy": is_noisy(own, base),
        }
        for method, own in times.items()
    ]


def format_report(report: Mapping[str, Any]) -> str:
    """The rows as a table, and under it where the extra time goes."""
    on = report["gpu"] or f"{report['cpu']}, threads: {report['threads']}"
    lines = [
        f"{on}; torch {report['versions']['torch']}",
        f"batch {report['batch']}, {report['resolution']}×{report['resolution']} pixels, width "
        f"{report['backbone_width']}, {report['optimization']}, {report['precision']}, "
        f"{report['memory_format']}{', compiled' if report['compile'] else ''}; "
        f"{report['rows'][0]['rounds']} rounds",
        "",
        *aligned(
            [
                ["method", "ratio", "ms", "images/s", "MiB", "ratio"],
                *(
                    [
                        row["method"],
                        f"{row['ratio']:.3f}",
                        f"{row['milliseconds']:.1f}",
                        f"{row['images_per_second']:.2f}",
                        f"{row['peak_memory_mib']:.0f}",
                        f"{row['memory_ratio']:.3f}",
                        *(["*"] if row["noisy"] else []),
                    ]
                    for row in report["rows"]
                ),
            ]
        ),
        "",
        "parts alone, ms (forward and backward), beside what the whole step takes more",
        *aligned([[row["method"], _parts(row)] for row in report["rows"]], left=2),
        "",
        f"of the speed of a large matrix product, {report['matrix_flops_per_second'] / 1e12:.3g} TFLOP/s: "
        + ", ".join(f"{row['method']} {row['share_of_peak']:.0%}" for row in report["rows"]),
        f"MiB: {report['memory']}",
    ]
    return "\n".join([*lines, *noisy_note(report["rows"])])


def _parts(row: Mapping[str, Any]) -> str:
    found = [f"{part} {ms:.1f}" for part, ms in row["parts_milliseconds"].items()]
    return f"{', '.join(found)}; more: {row['extra_milliseconds']:.1f}"


def _cases(options: argparse.Namespace, setup: Setup) -> dict[str, tuple[str, Setup]]:
    """The method and the setup of each row."""
    cases = {method: (method, setup) for method in (BASELINE, *options.methods)}
    for change in options.changes:
        method = options.methods[0]
        cases[f"{method}, {change}"] = (method, replace(setup, **_CHANGES[change]))
    for _, own in cases.values():
        require(
            "precision",
            own.precision,
            lambda v: setup.accelerator == "gpu" or v != "16-mixed",
            "32-true or bf16-mixed on a CPU",
        )
    return cases


def _setup(options: argparse.Namespace) -> Setup:
    for method in options.methods:
        one_of("methods", method, RECIPES)
    for change in options.changes:
        one_of("changes", change, _CHANGES)
        require(
            "changes",
            change,
            lambda v: v != "fused" or options.optimization != "lars",
            "any but fused with lars, of which there is no fused one",
        )
    at_least("batch", options.batch, 2)
    for key in ("resolution", "backbone_width", "projector_width"):
        at_least(key, getattr(options, key), 1)
    SEED.check("seed", options.seed)
    check_effort(options.threads, options.seconds)
    one_of("optimization", options.optimization, OPTIMIZATIONS)
    one_of("precision", options.precision, PRECISIONS)
    one_of("memory_format", options.memory_format, _FORMATS)
    on_gpu = torch.cuda.is_available()
    require(
        "accelerator",
        options.accelerator,
        lambda v: v in ("auto", "cpu") or (v == "gpu" and on_gpu),
        "one of auto, cpu, gpu" if on_gpu else "auto or cpu: PyTorch sees no GPU here",
    )
    accelerator = "gpu" if on_gpu and options.accelerator != "cpu" else "cpu"
    return Setup(
        batch=options.batch,
        resolution=options.resolution,
        width=options.backbone_width,
        projector=options.projector_width,
        optimization=options.optimization,
        precision=options.precision,
        channels_last=options.memory_format == "channels_last",
        compile=options.compile,
        accelerator=accelerator,
        seed=options.seed,
    )


def parser() -> argparse.ArgumentParser:
    """What the command understands."""
    made = command_parser("main_benchmark_train", __doc__)
    made.add_argument(
        "--methods",
        nargs="+",
        default=["vicreg_dual", "vicreg_gated", "vicreg_dual_two_encoders"],
    )
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--resolution", type=int, default=32)
    made.add_argument("--backbone-width", type=int, default=64)
    made.add_argument("--projector-width", type=int, default=2048)
    made.add_argument("--optimization", default="lars")
    made.add_argument("--precision", default="32-true")
    made.add_argument("--memory-format", default="channels_last")
    made.add_argument("--compile", action="store_true")
    made.add_argument("--changes", nargs="+", default=[])
    made.add_argument("--accelerator", default="auto")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--seconds", type=float, default=60.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output", type=user_path, required=True)
    return made
