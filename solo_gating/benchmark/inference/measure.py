"""One case of the benchmark: which engines take part, checks of their features, rows of figures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...deploy import CompiledEncoder
from ...deploy import compile as compile_encoder
from ...errors import InputError
from ..machine import torch_threads
from ..timing import Call, interleaved, is_noisy, paired_ratio, quickest
from .cases import GatedCase, Network
from .engines import (
    DENSE,
    OURS,
    STATIC,
    UnavailableError,
    openvino_bfloat16,
)

# Of the largest feature, in float32.
TOLERANCE = 1e-3
# One image in so many may have a gate's logit within rounding of its threshold.
_RARE = 50


@dataclass(frozen=True)
class Contender:
    """An engine that takes part, ready to be called.

    Attributes:
        engine: its name in the rows.
        dtype: "float32" or "bfloat16".
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
        threads: for every engine.
    """

    dense: Network
    gated: tuple[GatedCase, ...]
    threads: int

    @property
    def key(self) -> dict[str, int]:
        """What distinguishes its rows from those of other cases."""
        images = self.dense.images
        return {"batch": len(images), "resolution": images.shape[-1], "threads": self.threads}


def measure(
    case: Case, engines: tuple[str, ...], seconds: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time all engines on a case.

    Args:
        case: the encoders and the batch.
        engines: of `engines.ENGINES`.
        seconds: for all engines together.
        say: gets a sentence for every engine that is left out.

    Returns:
        The rows, in the order of the engines.

    Raises:
        InputError: if an engine's features are wrong, or there is no baseline.
    """
    with torch_threads(case.threads):
        contenders = [*_dense(case, engines, say)]
        if not contenders:
            raise InputError(
                f"engines: none of {', '.join(DENSE)} can be run, expected at least one to "
                "compare with"
            )
        if OURS in engines:
            contenders += _ours(case, contenders)
        calls = {str(number): c.call for number, c in enumerate(contenders)}
        times = interleaved(calls, seconds)
    return [case.key | row for row in rows(contenders, list(times.values()))]


def rows(contenders: list[Contender], times: list[list[float]]) -> list[dict[str, Any]]:
    """The figures of each engine.

    The baseline of a float32 row is the dense engine in float32 with the lowest median; of a
    bfloat16 row, the one of any precision.

    Args:
        contenders: the engines.
        times: seconds per call in each round, for each engine.
    """
    medians = [float(np.median(seconds)) for seconds in times]
    result = []
    for contender, own, median in zip(contenders, times, medians, strict=True):
        candidates = [
            index
            for index, other in enumerate(contenders)
            if other.baseline and other.dtype in ("float32", contender.dtype)
        ]
        best = min(candidates, key=lambda index: medians[index])
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
                "flops_cut": 1 - contender.share,
                "ceiling": ceiling,
                "efficiency": speedup / ceiling,
                "rounds": len(own),
                "noisy": is_noisy(own, times[best]),
                **contender.more,
            }
        )
    return result


def _dense(case: Case, engines: tuple[str, ...], say: Callable[[str], None]) -> Iterator[Contender]:
    """The others' engines on the dense encoder, as far as they can be had."""
    for name in engines:
        if name == OURS:
            continue
        try:
            call = DENSE[name](case.dense, case.threads)
        except UnavailableError as error:
            say(f"{name} is left out: {error}")
            continue
        check(name, call(), case.dense.features)
        yield Contender(name, "float32", name, call, baseline=True)
    if "openvino" in engines:
        try:
            call = openvino_bfloat16(case.dense, case.threads)
        except UnavailableError:
            return  # said above, or the CPU has none
        more = {"feature_difference": difference(call(), case.dense.features)}
        yield Contender("openvino", "bfloat16", "openvino", call, baseline=True, more=more)


def _ours(case: Case, others: list[Contender]) -> Iterator[Contender]:
    images, threads = case.dense.images, case.threads
    runtimes = {c.engine: c.call for c in others if c.engine in STATIC and c.dtype == "float32"}
    fastest = quickest(runtimes) if runtimes else None
    dense = _compiled(case.gated[0].backbone, "dense", "float32", threads)
    check("dense", dense(images), case.dense.features)
    yield Contender("dense", "float32", dense.engine, lambda: dense(images))
    for gated in case.gated:
        for dtype in ("float32", "bfloat16"):
            yield _dynamic(gated, dtype, threads)
        sliced = _compiled(gated.static.module, "gated", "float32", threads)
        check("dynamic on static", sliced(images), gated.features, rare=True)
        yield Contender(
            "dynamic on static",
            "float32",
            sliced.engine,
            lambda sliced=sliced: sliced(images),  # type: ignore[misc]
            gated.share,
            gated.asked,
            gated.density,
        )
        if fastest is None:
            continue
        for name, network in (
            ("static", gated.static),
            ("static without gates", gated.static_without_gates),
        ):
            call = DENSE[fastest](network, threads)
            exact = network is gated.static
            check(name, call(), gated.features if exact else network.features, rare=exact)
            share, density = gated.static_share(network), gated.static_density(network)
            yield Contender(name, "float32", fastest, call, share, gated.asked, density)


def _dynamic(gated: GatedCase, dtype: str, threads: int) -> Contender:
    engine = _compiled(gated.backbone, "gated", dtype, threads)
    features, masks = engine.features_and_masks(gated.images)
    more: dict[str, Any] = {}
    if dtype == "float32":
        check("dynamic", features, gated.features, rare=True)
    else:
        flipped = torch.cat(masks, dim=1) != torch.cat(gated.masks, dim=1).bool()
        more["feature_difference"] = difference(features, gated.features)
        more["flipped_masks"] = float(flipped.float().mean())
    return Contender(
        "dynamic",
        dtype,
        engine.engine,
        lambda: engine(gated.images),
        gated.share,
        gated.asked,
        gated.density,
        more=more,
    )


def _compiled(backbone: Any, path: str, dtype: str, threads: int) -> CompiledEncoder:
    engine = compile_encoder(backbone, path, dtype=dtype)
    engine.threads = threads
    return engine


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
        raise InputError(
            f"engines: {name} gives other features than PyTorch (by "
            f"{difference(found, expected):.1e} of the largest), so its time says nothing; "
            "--engines leaves it out"
        )


def _differences(found: Any, expected: Tensor) -> Tensor:
    """For each image, divided by the largest feature of all."""
    found = torch.as_tensor(np.array(found))
    return (found - expected).abs().amax(1) / expected.abs().max().clamp_min(1e-12)
