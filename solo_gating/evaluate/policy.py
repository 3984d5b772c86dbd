"""The channel policy of a gated encoder, counted on a set of images."""

from typing import Any

from torch import Tensor

from ..backbones import TwoPathResNet
from ..errors import InputError
from ..flops import BackboneFlops, count_flops
from ..policies import BlockPolicy, Policy
from .extract import Extraction


def policy_of(
    backbone: TwoPathResNet,
    found: Extraction,
    name: str,
    kwargs: dict[str, Any],
    target_budget: float | list[float] | None,
) -> Policy:
    """Make a policy from the decisions on a set of images.

    Args:
        backbone: the gated encoder.
        found: its gated path on N images.
        name: the backbone's name in solo-learn's registry.
        kwargs: what it was built with.
        target_budget: t_d of its pre-training, a number or a range.
    """
    if found.channels is None:
        raise InputError("path: got dense, a policy is of the gated path")
    flops = count_flops(backbone, found.resolution)
    shares = flops.share(found.channels.double())
    images = len(found.channels)
    blocks = []
    for gate, active, selected in zip(
        flops.gates, found.channels.double().T, found.selected, strict=True
    ):
        on, off = int((selected == images).sum()), int((selected == 0).sum())
        blocks.append(
            BlockPolicy(
                name=gate.name,
                channels=gate.channels,
                selected=selected.tolist(),
                always_on=on,
                always_off=off,
                input_dependent=gate.channels - on - off,
                active=float(active.mean()) / gate.channels,
                active_std=float(active.std(correction=0)) / gate.channels,
            )
        )
    return Policy(
        backbone={"name": name, "kwargs": kwargs},
        resolution=list(found.resolution),
        images=images,
        threshold=backbone.threshold,
        target_budget=target_budget,
        share=float(shares.mean()),
        share_std=float(shares.std(correction=0)),
        blocks=blocks,
        classes=_classes(flops, found.channels.double(), found.targets),
        budget=backbone.budget,
    )


def _classes(flops: BackboneFlops, channels: Tensor, targets: Tensor) -> list[dict[str, Any]]:
    rows = []
    for label in targets[targets >= 0].unique().tolist():
        mine = channels[targets == label]
        rows.append(
            {
                "label": label,
                "images": len(mine),
                "share": float(flops.share(mine).mean()),
                "active": flops.channel_shares(mine.mean(dim=0)).tolist(),
            }
        )
    return rows
