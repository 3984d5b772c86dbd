"""One case of the benchmark: which engines take part, checks of their features, rows of figures."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...deploy import CompiledEncoder, load
from ...deploy import compile as compile_encoder
from ...deploy.engine.encoder import PYTORCH
from ...errors import InputError
from ...evaluate.calibrate import threshold_for
from ..machine import torch_threads
from ..timing import Call, interleaved, is_noisy, paired_ratio, quickest
from .cases import GatedCase, Network, density_of
from .engines import DENSE, OURS, RUNTIMES, STATIC, Conditions, UnavailableError

# Of the largest feature, in float32.
TOLERANCE = 1e-3
# Of the features' norm, where the same channels are computed: twice what rounding does to a random
# ResNet-50, the worst that was seen, and less than what any mistake would.
ROUNDED = {"bfloat16": 0.2, "int8": 0.4}
# One image in so many may have a gate's logit within rounding of its threshold.
_RARE = 50
# How near the channels computed come to the share that was asked for.
_NEAR = 2e-4


@dataclass(frozen=True)
class Contender:
    """An engine that takes part, ready to be called.

    Attributes:
        engine: its name in the rows.
        dtype: one of `engines.DTYPES`.
        runtime: what it runs on: a package's name, or the instruction set of our kernel.
        call: computes the features of the batch.
        share: its FLOPs divided by the dense encoder's.
        asked: the share of the channels that was wanted; None for the encoder's own threshold.
        density: the share of the channels that it computes.
        baseline: whether it is one of the dense engines that others are compared with.
        more: figures for its row.
    """

    engine: str
    dtype: str
    runtime: str
    call: Call
    share: float = 1.0
    asked: float | None = 1.0
    density: float = 1.0
    baseline: bool = False
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What is timed together.

    Attributes:
        dense: the dense encoder and the batch.
        gated: the gated encoder on this batch, at each density.
        others: images of the kind that a trained encoder is for, N × 3 × H × W, to say what rounding does
            to it; None for a random one, of which that says nothing.
    """

    dense: Network
    gated: tuple[GatedCase, ...]
    others: Tensor | None = None


def measure(
    case: Case,
    engines: tuple[str, ...],
    dtypes: tuple[str, ...],
    conditions: Conditions,
    seconds: float,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Time all engines on a case.

    Args:
        case: the encoders and the batch.
        engines: of `engines.ENGINES`.
        dtypes: of `engines.DTYPES`, float32 among them.
        conditions: threads and clock.
        seconds: for all engines together.
        say: gets a sentence for every engine that is left out.

    Returns:
        The rows, in the order of the engines.

    Raises:
        InputError: if an engine's features are wrong, or there is no baseline.
    """
    with torch_threads(conditions.threads):
        contenders = [*_dense(case, engines, dtypes, conditions, say)]
        if not any(contender.dtype == "float32" for contender in contenders):
            names = ", ".join(dict.fromkeys(name for name, _ in DENSE))
            raise InputError(
                f"engines: none of {names} can be run in float32, expected at least one to "
                "compare with"
            )
        others = list(contenders)
        if OURS in engines:
            contenders += _ours(case, dtypes, conditions, say)
        if STATIC in engines:
            contenders += _static(case, conditions, others)
        calls = {str(number): c.call for number, c in enumerate(contenders)}
        times = interleaved(calls, seconds, clock=conditions.clock)
    images = case.dense.images
    key = {
        "batch": len(images),
        "resolution": images.shape[-1],
        "threads": conditions.threads,
    }
    return [key | row for row in rows(contenders, list(times.values()))]


def rows(contenders: list[Contender], times: list[list[float]]) -> list[dict[str, Any]]:
    """The figures of each engine.

    The baseline of a row is the dense engine of its precision with the lowest median, or, where there
    is none, that in float32.

    Args:
        contenders: the engines.
        times: seconds per call in each round, for each engine.
    """
    medians = [float(np.median(seconds)) for seconds in times]

    def fastest(dtype: str) -> int | None:
        dense = [i for i, c in enumerate(contenders) if c.baseline and c.dtype == dtype]
        return min(dense, key=lambda index: medians[index], default=None)

    plain = cast(int, fastest("float32"))
    result = []
    for contender, own, median in zip(contenders, times, medians, strict=True):
        same = fastest(contender.dtype)
        best = plain if same is None else same
        speedup, ceiling = paired_ratio(times[best], own), 1 / contender.share
        result.append(
            {
                "engine": contender.engine,
                "dtype": contender.dtype,
                "runtime": contender.runtime,
                "density": contender.asked,
                "realised_density": contender.density,
                "milliseconds": 1000 * median,
                "baseline": contenders[best].engine,
                "baseline_dtype": contenders[best].dtype,
                "baseline_milliseconds": 1000 * medians[best],
                "speedup": speedup,
                "speedup_over_float32": paired_ratio(times[plain], own),
                "flops_cut": 1 - contender.share,
                "ceiling": ceiling,
                "efficiency": speedup / ceiling,
                "rounds": len(own),
                "noisy": is_noisy(own, times[best]),
                **contender.more,
            }
        )
    return result


def _dense(
    case: Case,
    engines: tuple[str, ...],
    dtypes: tuple[str, ...],
    conditions: Conditions,
    say: Callable[[str], None],
) -> Iterator[Contender]:
    """The others' engines on the dense encoder, as far as they can be had."""
    for (name, dtype), make in DENSE.items():
        if name not in engines or dtype not in dtypes:
            continue
        try:
            call = make(case.dense, conditions)
        except UnavailableError as error:
            say(f"{name} in {dtype} is left out: {error}")
            continue
        more = _checked(name, dtype, call(), case.dense.features)
        yield Contender(name, dtype, name, call, baseline=True, more=more)


def _ours(
    case: Case,
    dtypes: tuple[str, ...],
    conditions: Conditions,
    say: Callable[[str], None],
) -> Iterator[Contender]:
    """Our engine: all channels, and at each density each image's own."""
    images, threads = case.dense.images, conditions.threads
    calibration = case.dense.model.calibration
    possible = []
    for dtype in dtypes:
        try:
            dense = _compiled(case.gated[0].backbone, "dense", dtype, threads, calibration)
        except UnavailableError as error:
            say(f"{OURS} in {dtype} is left out: {error}")
            continue
        possible.append(dtype)
        if dense.computes != dtype:
            continue
        imitate = partial(_imitated, dense, images)
        more = _checked("dense", dtype, dense(images), case.dense.features, imitate)
        call = partial(dense, images)
        yield Contender("dense", dtype, dense.engine, call, more=more)
    for gated in case.gated:
        for dtype in possible:
            engine = _compiled(gated.backbone, "gated", dtype, threads, gated.calibration)
            if dtype == "int8" and case.others is not None:
                say(str(engine.report(case.others)))
            yield _dynamic(gated, engine)


def _dynamic(gated: GatedCase, engine: CompiledEncoder) -> Contender:
    dtype = engine.dtype
    features, masks = engine.features_and_masks(gated.images)
    more: dict[str, Any] = {}
    if dtype == "float32":
        check("dynamic", features, gated.features, rare=True)
    else:
        flipped = torch.cat(masks, dim=1) != torch.cat(gated.masks, dim=1).bool()
        more["flipped_masks"] = float(flipped.float().mean())
        if gated.asked is not None and gated.dial == "threshold":
            more["threshold"] = _turn(engine, gated.images, gated.asked)
            features, masks = engine.features_and_masks(gated.images)
        imitate = partial(_imitated, engine, gated.images)
        more |= _checked("dynamic", dtype, features, gated.features_with(masks), imitate)
    return Contender(
        "dynamic",
        dtype,
        engine.engine,
        partial(engine, gated.images),
        gated.share(masks),
        gated.asked,
        density_of(masks),
        more=more,
    )


def _turn(engine: CompiledEncoder, images: Tensor, density: float) -> float:
    """Set the threshold at which an engine's own masks compute a share of the channels.

    Rounding flips decisions, of random gates, which decide on noise, many: those would compute
    another share than was asked for.
    """

    def share() -> float:
        return density_of(engine.features_and_masks(images)[1])

    def distance(threshold: float) -> float:
        engine.threshold = threshold
        return abs(share() - density)

    best = threshold_for(cast(Any, engine), share, density, _NEAR).threshold
    if distance(best) > _NEAR:
        # A flip in one block makes others in later ones: the share does not rise and fall evenly.
        best = min((best + step / 200 for step in range(-10, 11)), key=distance)
    engine.threshold = best
    return best


def _static(case: Case, conditions: Conditions, others: list[Contender]) -> Iterator[Contender]:
    """The smaller networks, on our engine and on the fastest of the others."""
    fastest = {}
    for dtype in ("float32", "int8"):
        runtimes = {c.engine: c.call for c in others if c.engine in RUNTIMES and c.dtype == dtype}
        if runtimes:
            fastest[dtype] = quickest(runtimes, conditions.clock)
    for gated in case.gated:
        yield from _on_static(gated, fastest, conditions)


def _on_static(
    gated: GatedCase, runtimes: dict[str, str], conditions: Conditions
) -> Iterator[Contender]:
    module = gated.static.model.module
    sliced = _compiled(module, "gated", "float32", conditions.threads, gated.calibration)
    features, masks = sliced.features_and_masks(gated.images)
    check("dynamic on static", features, gated.features, rare=True)
    yield Contender(
        "dynamic on static",
        "float32",
        sliced.engine,
        partial(sliced, gated.images),
        gated.share(masks),
        gated.asked,
        sum(int(mask.sum()) for mask in masks) / gated.number_of_decisions,
    )
    for name, dtype, network in (
        ("static", "float32", gated.static),
        ("static without gates", "float32", gated.static_without_gates),
        ("static without gates", "int8", gated.static_without_gates),
    ):
        if dtype not in runtimes:
            continue
        call = DENSE[runtimes[dtype], dtype](network, conditions)
        if name == "static":
            check(name, call(), gated.features, rare=True)
            more = {}
        else:
            more = _checked(name, dtype, call(), network.features)
        yield Contender(
            name,
            dtype,
            runtimes[dtype],
            call,
            gated.static_share(network),
            gated.asked,
            gated.static_density(network),
            more=more,
        )


def _compiled(
    backbone: Any, path: str, dtype: str, threads: int, calibration: Tensor
) -> CompiledEncoder:
    images = calibration if dtype == "int8" else None
    try:
        engine = compile_encoder(backbone, path, dtype=dtype, calibration=images)
    except InputError as error:
        if dtype == "int8" and str(error).startswith("calibration: "):  # too few images
            raise UnavailableError(str(error)) from error
        raise
    if dtype == "int8" and engine.engine == PYTORCH:
        raise UnavailableError("its kernel cannot be had here, and PyTorch only imitates it")
    engine.threads = threads
    return engine


def _checked(
    name: str,
    dtype: str,
    found: Any,
    expected: Tensor,
    imitate: Callable[[], Tensor] | None = None,
) -> dict[str, float]:
    """What a row says of an engine's features, once they are near enough to PyTorch's in float32.

    Random deep networks may make anything of a rounding. There our own engine in int8 is right if the
    first image's features are those that PyTorch has from the same integers, bit for bit.
    """
    if dtype == "float32":
        check(name, found, expected)
        return {}
    floats = _floats(found)
    relative = float((floats - expected).norm() / expected.norm().clamp_min(1e-12))
    is_near = relative <= ROUNDED[dtype]
    if not is_near and dtype == "int8" and imitate is not None:
        is_near = torch.equal(floats[:1], imitate())
    if not is_near:
        raise _wrong(f"{name} in {dtype}", f"by {relative:.1%} of their norm")
    return {"feature_difference": relative}


def _imitated(engine: CompiledEncoder, images: Tensor) -> Tensor:
    """Features of the first image by PyTorch, from the engine's integers; takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "engine.sgx"
        engine.save(file)
        return load(file, engine=PYTORCH)(images[:1])


def difference(found: Any, expected: Tensor) -> float:
    """The largest difference of features, B × C, divided by the largest feature."""
    return float(_differences(found, expected).max())


def check(name: str, found: Any, expected: Tensor, rare: bool = False) -> None:
    """Refuse an engine that computes something else than PyTorch.

    Args:
        name: of the engine.
        found: its features, B × C.
        expected: PyTorch's.
        rare: whether gates decide, so that now and then another one's rounding may flip a channel.

    Raises:
        InputError: if more than `TOLERANCE` of the largest feature is between them.
    """
    wrong = ~(_differences(found, expected) <= TOLERANCE)
    if int(wrong.sum()) > (len(expected) // _RARE if rare else 0):
        raise _wrong(name, f"by {difference(found, expected):.1e} of the largest")


def _wrong(name: str, how_far: str) -> InputError:
    return InputError(
        f"engines: {name} gives other features than PyTorch ({how_far}), so its time says nothing; "
        "--engines leaves it out"
    )


def _floats(found: Any) -> Tensor:
    return found.float() if isinstance(found, Tensor) else torch.as_tensor(np.array(found))


def _differences(found: Any, expected: Tensor) -> Tensor:
    """For each image, divided by the largest feature of all."""
    return (_floats(found) - expected).abs().amax(1) / expected.abs().max().clamp_min(1e-12)
