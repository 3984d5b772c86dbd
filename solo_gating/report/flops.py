"""FLOPs and parameters of an encoder, per block and in total, dense and gated.

    python -m solo_gating.main_flops --config-name vicreg_dual_cifar100 [key=value ...]
    python -m solo_gating.main_flops checkpoint=PATH/last.ckpt [key=value ...]

FLOPs are multiply-accumulates of convolutions for one image of the first view's crop size; BatchNorm,
ReLU, pooling and the classifier are not counted, the gates are. Without a checkpoint the gated path
is shown at gating.target_budget, with the same share of channels in every block; if that is a range, at
its middle or at flops.budget; of cgnet, cdg and scdg gates at the target of τ. With a checkpoint it is measured on the first flops.images=1000 validation
images, if there are any (data.val_path); the config is then, unless one is named, the args.json beside
it. Writes metrics.json into flops.output (default: outputs/flops/<name>).
"""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Subset

from .. import InputError
from ..backbones import ResNet, TwoPathResNet
from ..budgets import checked_budget, is_range, middle
from ..checkpoints.reading import check_architecture, read_checkpoint, weights_of
from ..config.pretraining import prepare_config
from ..config.schema import own_copy
from ..data import evaluation_loader
from ..evaluate.extract import extract
from ..files import make_folder, write_json
from ..flops import BackboneFlops, count_flops, count_parameters
from ..gates.shares import number_of_channels
from ..process_state import process_state_kept
from ..terminal import say
from ..texts import aligned, published_count
from ..training.model import build_method


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
        if cfg.flops.checkpoint is None or cfg.data.val_path is None:
            budget = cfg.gating.target_budget
            if backbone.budget is not None:
                budget = backbone.budget
            elif is_range(budget):
                budget = middle(budget)
            source = f"at the target budget {budget:g}"
            expected = getattr(backbone.gates[0], "expected_share", None)
            if expected is not None:
                channels = expected * flops.all_channels[None].double()
                source = "if the gates get to what they are pulled towards"
            elif backbone.gates[0].dial == "budget":  # a budget is then a share of the channels
                numbers = [number_of_channels(budget, gate.channels) for gate in flops.gates]
                channels = torch.tensor([numbers], dtype=torch.float64)
            else:
                channels = channels_at(flops, budget)
        else:
            loader = _first_images(cfg)
            channels = extract(backbone, loader, "gated").channels.double()  # type: ignore[union-attr]
            source = f"measured on {len(loader.dataset)} images"  # type: ignore[arg-type]
            if backbone.budget is not None:
                source += f" at the budget {backbone.budget:g}"
    metrics = summarise(backbone, flops, channels)
    if getattr(backbone, "budget", None) is not None:
        metrics["budget"] = backbone.budget
    metrics["resolution"] = [size, size]
    write_json(folder / "metrics.json", metrics)
    say(format_report(metrics, source))
    say(str(folder / "metrics.json"))
    return metrics


def channels_at(flops: BackboneFlops, budget: float) -> Tensor:
    """Channels of each gate, the same share of all, with which F^R / F^O is the budget.

    Args:
        flops: of the backbone.
        budget: t_d, in (0, 1].

    Returns:
        float64, 1 × L; between none and all channels, where the budget cannot be met exactly.
    """
    full = flops.all_channels[None].double()
    least, most = 0.0, 1.0
    if float(flops.share(full)) <= budget:
        return full
    for _ in range(60):  # to the last bit of a float64
        middle_share = (least + most) / 2
        if float(flops.share(middle_share * full)) > budget:
            most = middle_share
        else:
            least = middle_share
    return least * full


def summarise(backbone: ResNet, flops: BackboneFlops, channels: Tensor | None) -> dict[str, Any]:
    """All figures in one dictionary.

    Args:
        backbone: the encoder.
        flops: its FLOPs.
        channels: N × L, selected channels of some images for each gate; None without gates.
    """
    own = backbone.gated_only
    gates = list(getattr(backbone, "gates", [])) if channels is not None else []
    gate_parameters = sum(count_parameters(gate) for gate in gates)
    separate = sum(count_parameters(module) for module in own if isinstance(module, _BatchNorm))
    metrics: dict[str, Any] = {
        "parameters": {
            "dense": count_parameters(backbone) - gate_parameters - separate,
            "gates": gate_parameters,
            "gated_batchnorms": separate,
        },
        "flops": {"dense": flops.dense, "stem": flops.parts["stem"].dense},
        "blocks": [],
    }
    if channels is not None:
        metrics["flops"].update(
            gates=flops.decisions,
            gated=float(flops.gated(channels).mean()),
            share=float(flops.share(channels).mean()),
        )
        if not gates[0].only_masks:
            metrics["gate"] = gates[0].kind
            metrics["flops"].update(flops.as_published(channels))
    for name, part in flops.parts.items():
        if name == "stem":
            continue
        inside = [index for index, gate in enumerate(flops.gates) if gate.part == name]
        figures: dict[str, Any] = {
            "name": name,
            "channels": sum(flops.gates[index].channels for index in inside),
            "dense": part.dense,
        }
        if channels is not None:
            figures.update(
                active=float(channels[:, inside].sum(1).mean()),
                gate=part.decisions,
                gated=float(part.gated(channels).mean()),
                gate_parameters=sum(count_parameters(gates[index]) for index in inside),
            )
        metrics["blocks"].append(figures)
    return metrics


def format_report(metrics: dict[str, Any], source: str) -> str:
    """The figures as text; `source` says where the gated path's come from."""
    flops = metrics["flops"]
    gated = "gated" in flops
    rows = [["block", "channels", "dense FLOPs"], ["stem", "", f"{flops['stem']:,}"]]
    rows += [[b["name"], str(b["channels"]), f"{b['dense']:,}"] for b in metrics["blocks"]]
    rows.append(["total", "", f"{flops['dense']:,}"])
    if gated:
        rows[0] += ["active", "gated FLOPs", "share", "gate"]
        for row, block in zip(rows[2:], metrics["blocks"], strict=False):
            share = block["gated"] / block["dense"]
            row += [f"{block['active']:.1f}", f"{block['gated']:,.0f}", f"{share:.1%}"]
            row.append(f"{block['gate']:,}")
        rows[-1] += ["", f"{flops['gated']:,.0f}", f"{flops['share']:.1%}", f"{flops['gates']:,}"]
    lines = aligned(rows)
    parameters = metrics["parameters"]
    lines.append(f"\nparameters: {parameters['dense']:,} dense")
    if gated:
        share = parameters["gates"] / (parameters["dense"] + parameters["gates"])
        lines[-1] += (
            f", {parameters['gates']:,} gates ({share:.2%} of both), "
            f"{parameters['gated_batchnorms']:,} in the gated path's own BatchNorms"
        )
        lines.append(f"gated path: {source}")
        if "gated_share" in flops:
            lines.append(published_count(metrics["gate"], flops))
    return "\n".join(lines)


def _backbone(cfg: DictConfig) -> ResNet:
    model = build_method(cfg)
    if not isinstance(model.backbone, ResNet):
        raise InputError(
            f"backbone.name: got {cfg.backbone.name!r}, main_flops counts solo-gating's own "
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
