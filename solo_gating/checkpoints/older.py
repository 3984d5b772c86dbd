"""Checkpoints of version 0.1.0, in which the gates had no parameter group of their own."""

from collections.abc import Container, Sequence
from typing import Any

from torch import nn


def add_gates_group(
    checkpoint: dict[str, Any],
    backbone: Sequence[nn.Parameter],
    gates: Container[nn.Parameter],
    weight_decay: float,
) -> None:
    """Divide the backbone's group in the states of optimiser and schedule, in place.

    What is remembered of each parameter stays. Nothing happens where there is a group of the gates.

    Args:
        checkpoint: a Lightning checkpoint.
        backbone: its parameters, in its order.
        gates: those of them that are the gates'.
        weight_decay: of the gates from now on.
    """
    schedules = checkpoint.get("lr_schedulers", [])
    for number, state in enumerate(checkpoint.get("optimizer_states", [])):
        groups = state["param_groups"]
        old = [group for group in groups if str(group.get("name")).startswith("backbone")]
        if not old or any(str(group.get("name")).startswith("gates") for group in groups):
            continue
        # Two groups: exclude_bias_n_norm_wd, matrices before biases and norms.
        order = sorted(backbone, key=lambda p: p.ndim <= 1) if len(old) > 1 else backbone
        indices = [index for group in old for index in group["params"]]
        of_gates = {index for index, p in zip(indices, order, strict=True) if p in gates}
        for schedule in schedules[number : number + 1]:
            for rates in schedule.values():
                if isinstance(rates, list) and len(rates) == len(groups):
                    rates[len(old) : len(old)] = rates[: len(old)]
        new = [
            {
                **group,
                "name": group["name"].replace("backbone", "gates"),
                "params": [index for index in group["params"] if index in of_gates],
                "weight_decay": weight_decay if group is old[0] else 0,
            }
            for group in old
        ]
        groups[len(old) : len(old)] = new
        for group in old:
            group["params"] = [index for index in group["params"] if index not in of_gates]
