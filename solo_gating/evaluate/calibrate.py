"""The dial: makes the gated path use a given share of the FLOPs.

What is turned, the gates say (`Gate.dial`): a threshold on their logits, or the budget. Where gates
with a threshold can be told a budget, they are told the share first, and the threshold corrects what
is left.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbones import TwoPathResNet
from ..errors import InputError
from ..flops import BackboneFlops, count_flops, selected_channels

_LARGEST = 1e6
_SLACK = 0.01  # whole channels and some hundred images meet no share exactly


@dataclass(frozen=True)
class Setting:
    """A position of the dial, and the share of the FLOPs that it gives.

    Attributes:
        threshold: of the logits.
        share: F^R / F^O.
        budget: that the gates are told; None for a network that was trained for no range.
    """

    threshold: float
    share: float
    budget: float | None = None

    def apply(self, backbone: TwoPathResNet) -> None:
        """Turn a backbone's dial to this position."""
        backbone.threshold = self.threshold
        backbone.budget = self.budget


def calibrate(
    backbone: TwoPathResNet,
    images: Tensor,
    share: float,
    budget: float | None = None,
    tolerance: float = 1e-4,
) -> Setting:
    """Find the position at which the gated path uses a share of the dense FLOPs.

    The threshold, or the budget of gates without one, by bisection, since a gate sees what the gates
    before it let through. The backbone's own position is put back afterwards.

    Args:
        backbone: a gated encoder; evaluated in evaluation mode.
        images: unlabelled, N × 3 × H × W; some hundred will do.
        share: F^R / F^O to reach, gates included, in (0, 1].
        budget: of a network that was trained for a range; None for the share itself, or the end
            of the range that is nearest to it.
        tolerance: how far the share may stay off; with few images and channels it cannot always
            be met, and the nearest that was found is returned.

    Raises:
        InputError: for a share that no threshold gives, a budget outside of the range, or gates that
            have no dial.
    """
    kind = backbone.gates[0]
    if kind.dial is None:
        raise InputError(
            f"calibrate: got {share}, gates of kind {kind.kind!r} have nothing to turn"
        )
    flops = count_flops(backbone, (images.shape[-2], images.shape[-1]))
    lowest = flops.lowest_share
    if not lowest <= share <= 1:
        raise InputError(
            f"calibrate: got {share}, expected shares from {lowest:.4f} (stem, shortcuts and "
            "gates alone) to 1"
        )

    before = current(backbone)
    try:
        if kind.dial == "budget":
            return _budget_for(backbone, images, flops, share, tolerance)
        if budget is None and backbone.budget_range is not None:
            low, high = backbone.budget_range
            budget = min(max(share, low), high)
        if budget is not None:
            backbone.budget = budget
        return threshold_for(
            backbone, lambda: _measured_share(backbone, images, flops), share, tolerance
        )
    finally:
        before.apply(backbone)


def _budget_for(
    backbone: TwoPathResNet, images: Tensor, flops: BackboneFlops, share: float, tolerance: float
) -> Setting:
    """The budget at which gates that only know budgets use a share.

    Raises:
        InputError: for a share beyond those of the range's ends.
    """
    low, high = backbone.budget_range  # type: ignore[misc]
    fewer, more = (_at_budget(backbone, images, flops, end) for end in (low, high))
    if not fewer.share - _SLACK <= share <= more.share + _SLACK:
        raise InputError(
            f"calibrate: got {share}, expected shares from {fewer.share:.4f} to {more.share:.4f}: those "
            f"of budgets from {low:g} to {high:g}, for which the network was trained"
        )
    best = min((fewer, more), key=lambda s: abs(s.share - share))
    while abs(best.share - share) > tolerance and more.budget - fewer.budget > 1e-4:  # type: ignore[operator]
        middle = (fewer.budget + more.budget) / 2  # type: ignore[operator]
        setting = _at_budget(backbone, images, flops, middle)
        best = min((best, setting), key=lambda s: abs(s.share - share))
        fewer, more = (setting, more) if setting.share < share else (fewer, setting)
    return best


def _at_budget(
    backbone: TwoPathResNet, images: Tensor, flops: BackboneFlops, budget: float
) -> Setting:
    """The backbone's position with a budget, which it keeps."""
    backbone.budget = budget
    return Setting(backbone.threshold, _measured_share(backbone, images, flops), budget)


def threshold_for(
    backbone: TwoPathResNet, measure: Callable[[], float], share: float, tolerance: float = 1e-4
) -> Setting:
    """Find the threshold at which something that falls with it has a value, by bisection.

    The backbone's own threshold is put back afterwards.

    Args:
        backbone: a gated encoder.
        measure: gives the share at the backbone's threshold of the moment.
        share: to reach.
        tolerance: how far it may stay off; if it cannot be met, the nearest that was found is
            returned.
    """

    def at(threshold: float) -> Setting:
        backbone.threshold = threshold
        return Setting(threshold, measure(), backbone.budget)

    before = backbone.threshold
    try:
        fewer, more = at(1.0), at(-1.0)
        while fewer.share > share and fewer.threshold < _LARGEST:
            fewer = at(2 * fewer.threshold)
        while more.share < share and more.threshold > -_LARGEST:
            more = at(2 * more.threshold)
        best = min((fewer, more, at(0.0)), key=lambda s: abs(s.share - share))
        while abs(best.share - share) > tolerance:
            middle = (fewer.threshold + more.threshold) / 2
            if math.isclose(fewer.threshold, more.threshold, rel_tol=1e-6, abs_tol=1e-7):
                break
            setting = at(middle)
            best = min((best, setting), key=lambda s: abs(s.share - share))
            fewer, more = (setting, more) if setting.share < share else (fewer, setting)
        return best
    finally:
        backbone.threshold = before


def current(backbone: TwoPathResNet, share: float = math.nan) -> Setting:
    """The position that a backbone's dial has.

    Args:
        backbone: a gated encoder.
        share: that it is known to give.
    """
    return Setting(backbone.threshold, share, backbone.budget)


def lowest_share(backbone: TwoPathResNet, resolution: tuple[int, int]) -> float:
    """F^R / F^O without a single channel: what stem, shortcuts and gates cost.

    Args:
        backbone: a gated encoder.
        resolution: height and width of the images.
    """
    return count_flops(backbone, resolution).lowest_share


def reachable_shares(backbone: TwoPathResNet, images: Tensor) -> tuple[float, float]:
    """The shares of the FLOPs that the dial can be turned to, F^R / F^O, from the least to the most.

    Args:
        backbone: a gated encoder; its dial is put back afterwards.
        images: as in `calibrate`.
    """
    flops = count_flops(backbone, (images.shape[-2], images.shape[-1]))
    if backbone.gates[0].dial != "budget":
        return flops.lowest_share, 1.0
    before = current(backbone)
    low, high = backbone.budget_range  # type: ignore[misc]
    try:
        fewer, more = (_at_budget(backbone, images, flops, end) for end in (low, high))
    finally:
        before.apply(backbone)
    return fewer.share - _SLACK, more.share + _SLACK


def mean_share(backbone: TwoPathResNet, images: Tensor) -> float:
    """F^R / F^O of the gated path on images, in evaluation mode, as the backbone's dial stands.

    Args:
        backbone: a gated encoder; its mode is put back afterwards.
        images: N × 3 × H × W.
    """
    flops = count_flops(backbone, (images.shape[-2], images.shape[-1]))
    return _measured_share(backbone, images, flops)


@torch.no_grad()
def _measured_share(backbone: TwoPathResNet, images: Tensor, flops: BackboneFlops) -> float:
    weight = next(backbone.parameters())
    was_training = backbone.training
    backbone.eval()
    try:
        channels = []
        with backbone.path("gated") as passes:
            for batch in images.split(128):
                backbone(batch.to(weight.device, weight.dtype))
                channels.append(selected_channels(passes[-1].masks).double().cpu())
    finally:
        backbone.train(was_training)
    return float(flops.share(torch.cat(channels)).mean())


def sweep(
    backbone: TwoPathResNet,
    images: Tensor,
    shares: Iterable[float],
    evaluate: Callable[[], dict[str, float]],
    budget: float | None = None,
) -> list[dict[str, float]]:
    """Evaluate the gated path at several positions of the dial, and at the one it has.

    Args:
        backbone: a gated encoder; its position is put back afterwards.
        images: to calibrate on, as in `calibrate`.
        shares: of the FLOPs.
        evaluate: gives figures of the backbone as it is.
        budget: as in `calibrate`.

    Returns:
        For each position, in order of the shares from low to high, what `evaluate` gives, with
        `threshold`, `calibrated_share`, `asked` (None for the position that was there before), and
        for a network that was trained for a range `budget`.
    """
    before = current(backbone, mean_share(backbone, images))
    settings: list[tuple[float | None, Setting]] = [(None, before)]
    settings += [(share, calibrate(backbone, images, share, budget)) for share in shares]
    points = []
    try:
        for asked, setting in sorted(settings, key=lambda s: (s[1].share, -s[1].threshold)):
            setting.apply(backbone)
            point: dict[str, Any] = {
                "asked": asked,
                "threshold": setting.threshold,
                "calibrated_share": setting.share,
            }
            if setting.budget is not None:
                point["budget"] = setting.budget
            points.append(point | evaluate())
    finally:
        before.apply(backbone)
    return points
