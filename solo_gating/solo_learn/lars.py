"""LARS for both lines, without waiting for the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with layer-wise adaptive rates (You et al., arXiv:1708.03888), as solo-learn's modern line.

    The rule and the state dict are those of `solo/utils/lars.py`. That one branches on the norms of
    every parameter and its gradient, some 120 times a step, and each time waits for a GPU; this one
    computes all norms at once and selects on the device. (1.0.2's `LARSWrapper` scales the gradients
    and then calls the closure, in which Lightning computes new ones: it is plain SGD, but with
    precision 16-mixed, where Lightning calls the closure first.)

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: 0 for none.
        dampening: of the momentum.
        weight_decay: added to the gradient before it is scaled; it has no effect on what is not.
        nesterov: look ahead along the momentum.
        eta: trust coefficient.
        eps: for the division.
        clip_lr: never scale a gradient up.
        exclude_bias_n_norm: leave one-dimensional parameters unscaled, without weight decay.

    Raises:
        ValueError: for a negative rate, momentum or decay, or Nesterov's without momentum.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        eta: float = 1e-3,
        eps: float = 1e-8,
        clip_lr: bool = False,
        exclude_bias_n_norm: bool = False,
    ):
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"LARS, {name}: got {value!r}, expected a number ≥ 0")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("LARS: nesterov needs a momentum > 0 and no dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eta": eta,
            "eps": eps,
            "clip_lr": clip_lr,
            "exclude_bias_n_norm": exclude_bias_n_norm,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a run from before these were in its checkpoint
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                torch._foreach_add_(
                    parameters, self._with_momentum(parameters, group), alpha=-group["lr"]
                )
        return loss

    def _with_momentum(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        steps = _scaled_gradients(parameters, group)
        if group["momentum"] == 0:
            return steps
        seen = [index for index, p in enumerate(parameters) if self.state[p]]
        if seen:
            buffers = [self.state[parameters[index]]["momentum_buffer"] for index in seen]
            torch._foreach_mul_(buffers, group["momentum"])
            added = [steps[index] for index in seen]
            torch._foreach_add_(buffers, added, alpha=1 - group["dampening"])
        for p, step in zip(parameters, steps, strict=True):
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = step.clone()
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        if group["nesterov"]:
            return list(torch._foreach_add(steps, buffers, alpha=group["momentum"]))
        return buffers


def _scaled_gradients(parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """(gradient + decay · weight) · rate, or the gradient itself where it is not to be scaled."""
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    chosen = [
        index
        for index, p in enumerate(parameters)
        if p.ndim != 1 or not group["exclude_bias_n_norm"]
    ]
    if not chosen:
        return gradients
    weights = [parameters[index] for index in chosen]
    of_weights = torch.stack(torch._foreach_norm(weights))
    of_gradients = torch.stack(torch._foreach_norm([gradients[index] for index in chosen]))
    rates = of_weights / (of_gradients + of_weights * group["weight_decay"] + group["eps"])
    rates = rates * group["eta"]
    if group["clip_lr"]:
        rates = (rates / group["lr"]).clamp(max=1) if group["lr"] else torch.ones_like(rates)
    # Without weights the gradient stays as it is; without a gradient nothing moves, nor decays.
    rates = torch.where(of_weights == 0, 1.0, rates).masked_fill(of_gradients == 0, 0.0)
    decayed = torch._foreach_add(
        [gradients[index] for index in chosen], weights, alpha=group["weight_decay"]
    )
    torch._foreach_mul_(decayed, list(rates.unbind()))
    for index, scaled in zip(chosen, decayed, strict=True):
        gradients[index] = scaled
    return gradients
