"""How long the parts of a gated step take that a dense step has not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...backbones import ForwardPass, TwoPathResNet, convolutions
from ...backbones.masking import apply_mask
from ...gates import BaseGate
from ..machine import median_seconds
from .step import TrainingStep

_ROUNDS = 5


def part_milliseconds(step: TrainingStep) -> dict[str, float]:
    """Milliseconds of each part alone, forward and backward, on tensors of the step's own shapes.

    Medians of a few calls. Together they explain what a gated step takes more than a dense one, up
    to what changes by itself when tensors are no longer in the caches.

    Args:
        step: of any method; one without gates has the optimiser only, as one with gates that do more
            than masking, whose parts cannot be told apart.

    Returns:
        "gates" (all of them, for all gated views), "masks" (their multiplication), "losses" (budget
        and bound) and "optimizer".
    """
    step()
    times = {"optimizer": _milliseconds(step.optimizer.step, step.device)}
    backbone = step.model.backbone
    if not isinstance(backbone, TwoPathResNet) or not backbone.gates[0].only_masks:
        return times
    views = step.model.gating.views.count("gated") + step.model.regresses  # a third pass is gated
    shapes = _shapes(backbone, step.batch[1][0])
    told = backbone.budget_told
    gates = _milliseconds(lambda: _run_gates(shapes, told), step.device)
    masks = _milliseconds(lambda: _run_masks(shapes), step.device)
    passes = [_random_pass(shapes, step.batch[1][0]) for _ in range(views)]

    def losses() -> None:
        budget, told = step.model.budget_of_step(0, step.batch[-1])
        step.model.gate_losses(passes, 0, budget, told).backward()

    return {
        "gates": views * gates,
        "masks": views * masks,
        "losses": _milliseconds(losses, step.device),
        **times,
    }


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    return 1000 * median_seconds(call, device, _ROUNDS)


Shapes = list[tuple[BaseGate, Tensor, Tensor]]


def _shapes(backbone: TwoPathResNet, images: Tensor) -> Shapes:
    """For each gate a random input, and a random map that it masks, as its step has them."""
    found: dict[Any, Tensor] = {}
    hooks = []
    pairs = []
    for block in backbone.gated_blocks:
        for gate, (_, conv, _) in zip(block.gates, convolutions(block)[1:], strict=True):
            pairs.append((gate, conv))
            for module in (gate, conv):
                hook = module.register_forward_pre_hook(
                    lambda m, args: found.update({m: torch.rand_like(args[0])})
                )
                hooks.append(hook)
    with torch.no_grad():
        backbone.forward_gated(images, backbone.budget_told)
    for hook in hooks:
        hook.remove()
    return [
        (gate, found[gate].requires_grad_(), found[conv].requires_grad_()) for gate, conv in pairs
    ]


def _run_gates(shapes: Shapes, budget: Tensor | None) -> None:
    for gate, x, _ in shapes:
        mask = gate(x, budget)
        if mask.requires_grad:
            mask.sum().backward()
        x.grad = None


def _run_masks(shapes: Shapes) -> None:
    for _, _, hidden in shapes:
        mask = torch.ones(hidden.shape[:2], device=hidden.device, requires_grad=True)
        apply_mask(hidden, mask).backward(hidden.detach())
        hidden.grad = None


def _random_pass(shapes: Shapes, images: Tensor) -> ForwardPass:
    masks = tuple(
        torch.rand(hidden.shape[:2], device=hidden.device).requires_grad_() for *_, hidden in shapes
    )
    height, width = images.shape[-2:]
    return ForwardPass("gated", (height, width), images.new_zeros(0), masks)
