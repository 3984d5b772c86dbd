"""FLOPs and parameters of an encoder, per block and in total, dense and gated.

    python -m solo_gating.main_flops --config-name vicreg_dual_cifar100 [key=value ...]

FLOPs are multiply-accumulates of convolutions for one image of the first view's crop size; BatchNorm,
ReLU, pooling and the classifier are not counted, the gates are. Without a checkpoint the gated path
is shown at gating.target_budget, with the same share of channels in every block; if that is a range, at
its middle or at flops.budget. With

    flops.checkpoint=trained_models/vicreg_dual/<run>/last.ckpt   flops.images=1000

it is measured on the first validation images (data.val_path). Writes metrics.json into
flops.output (default: outputs/flops/<name>).
"""

if not __package__:  # started as a file
    import as_module  # noqa: F401

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from . import InputError
from .backbones import ResNet, TwoPathResNet
from .budgets import checked_budget, is_range, middle
from .cli import run
from .config import prepare_config
from .data import evaluation_loader
from .evaluate.features import extract
from .files import make_folder, write_json
from .flops import BackboneFlops, count_flops, count_parameters
from .process_state import process_state_kept
from .reading import check_architecture, read_checkpoint, weights_of
from .schema import own_copy
from .training.model import build_method


@process_state_kept()
def report_flops(cfg: DictConfig) -> dict[str, Any]:
    """Count, print and write; what `metrics.json` then holds is returned.

    Args:
        cfg: a pre-training config; left as it is.

    Raises:
        InputError: for a config, checkpoint or data that cannot be used.
    """
    cfg = prepare_config(own_copy(cfg))
    folder = Path(cfg.flops.output or f"outputs/flops/{cfg.name}")
    make_folder(folder)
    backbone = _backbone(cfg)
    if cfg.flops.budget is not None:
        checked_budget(cfg.flops.budget, getattr(backbone, "budget_range", None), "flops.budget")
        backbone.budget = cfg.flops.budget
    size = cfg.augmentations[0].crop_size
    flops = count_flops(backbone, (size, size))
    channels, source = None, ""
    if isinstance(backbone, TwoPathResNet):
        if cfg.flops.checkpoint is None:
            budget = cfg.gating.target_budget
            if backbone.budget is not None:
                budget = backbone.budget
            elif is_range(budget):
                budget = middle(budget)
            channels, source = channels_at(flops, budget), f"at the target budget {budget:g}"
        else:
            loader = _first_images(cfg)
            counted = extract(backbone, loader, "gated").channels
            channels = counted.double().mean(dim=0)  # type: ignore[union-attr]
            source = f"measured on {len(loader.dataset)} images"  # type: ignore[arg-type]
            if backbone.budget is not None:
                source += f" at the budget {backbone.budget:g}"
    metrics = summarise(backbone, flops, channels)
    if getattr(backbone, "budget", None) is not None:
        metrics["budget"] = backbone.budget
    metrics["resolution"] = [size, size]
    write_json(folder / "metrics.json", metrics)
    print(format_report(metrics, source))
    print(folder / "metrics.json")
    return metrics


def channels_at(flops: BackboneFlops, budget: float) -> Tensor:
    """Channels per block, the same share in each, with which F^R / F^O is the budget.

    Args:
        flops: of the backbone.
        budget: t_d, in (0, 1].

    Returns:
        float64, length L; between none and all channels, where the budget cannot be met exactly.
    """
    full = torch.tensor([block.channels for block in flops.blocks], dtype=torch.float64)
    gated_part = float(flops.gated(full)) - flops.fixed
    return full * min(1.0, max(0.0, (budget * flops.dense - flops.fixed) / gated_part))


def summarise(backbone: ResNet, flops: BackboneFlops, channels: Tensor | None) -> dict[str, Any]:
    """All figures in one dictionary.

    Args:
        backbone: the encoder.
        flops: its FLOPs.
        channels: mean number of selected channels of each block; None without gates.
    """
    modules = dict(backbone.named_modules())
    gates = [block.gate for block in backbone.gated_blocks] if channels is not None else []
    gate_parameters = sum(count_parameters(gate) for gate in gates)
    separate = sum(
        count_parameters(module)
        for name, module in modules.items()
        if name.endswith(("gated_bn1", "gated_bn2"))
    )
    total = count_parameters(backbone)
    metrics: dict[str, Any] = {
        "parameters": {
            "dense": total - gate_parameters - separate,
            "gates": gate_parameters,
            "gated_batchnorms": separate,
        },
        "flops": {"dense": flops.dense, "stem": flops.stem},
        "blocks": [],
    }
    if channels is not None:
        metrics["flops"].update(
            gates=flops.gates,
            gated=float(flops.gated(channels)),
            share=float(flops.share(channels)),
        )
    for index, block in enumerate(flops.blocks):
        figures: dict[str, Any] = {
            "name": block.name,
            "channels": block.channels,
            "dense": block.dense,
        }
        if channels is not None:
            active = float(channels[index])
            figures.update(
                active=active,
                gate=block.gate,
                gated=active * block.per_channel + block.shortcut + block.gate,
                gate_parameters=count_parameters(gates[index]),
            )
        metrics["blocks"].append(figures)
    return metrics


def format_report(metrics: dict[str, Any], source: str) -> str:
    """The figures as text; `source` says where the gated path's come from."""
    gated = "gated" in metrics["flops"]
    heading = f"{'block':<10} {'channels':>9} {'dense FLOPs':>14}"
    if gated:
        heading += f" {'active':>8} {'gated FLOPs':>14} {'share':>7} {'gate':>8}"
    lines = [heading, f"{'stem':<10} {'':>9} {metrics['flops']['stem']:>14,}"]
    for block in metrics["blocks"]:
        line = f"{block['name']:<10} {block['channels']:>9} {block['dense']:>14,}"
        if gated:
            share = block["gated"] / block["dense"]
            line += f" {block['active']:>8.1f} {block['gated']:>14,.0f} {share:>7.1%} {block['gate']:>8,}"
        lines.append(line)
    total = f"{'total':<10} {'':>9} {metrics['flops']['dense']:>14,}"
    if gated:
        flops = metrics["flops"]
        total += f" {'':>8} {flops['gated']:>14,.0f} {flops['share']:>7.1%} {flops['gates']:>8,}"
    lines.append(total)
    parameters = metrics["parameters"]
    lines.append(f"\nparameters: {parameters['dense']:,} dense")
    if gated:
        share = parameters["gates"] / (parameters["dense"] + parameters["gates"])
        lines[-1] += (
            f", {parameters['gates']:,} gates ({share:.2%} of both), "
            f"{parameters['gated_batchnorms']:,} in the gated path's own BatchNorms"
        )
        lines.append(f"gated path: {source}")
    return "\n".join(lines)


def _backbone(cfg: DictConfig) -> ResNet:
    model = build_method(cfg)
    if not isinstance(model.backbone, ResNet):
        raise InputError(
            f"backbone.name: found {cfg.backbone.name!r}, main_flops counts solo-gating's own "
            "backbones (resnet18_plain is torchvision's resnet18)"
        )
    if cfg.flops.checkpoint is not None:
        content = read_checkpoint(cfg.flops.checkpoint, "flops.checkpoint")
        parts = ("backbone",)  # a projector of another size changes no figure
        check_architecture(model, content, cfg.flops.checkpoint, parts)
        model.load_state_dict(weights_of(content["state_dict"], parts), strict=False)
    return model.backbone


def _first_images(cfg: DictConfig) -> DataLoader:
    loader = evaluation_loader(cfg, "val")
    number = min(cfg.flops.images, len(loader.dataset))  # type: ignore[arg-type]
    return DataLoader(Subset(loader.dataset, range(number)), batch_size=cfg.optimizer.batch_size)


def main() -> None:
    """Entry point."""
    run(report_flops)


if __name__ == "__main__":
    main()
