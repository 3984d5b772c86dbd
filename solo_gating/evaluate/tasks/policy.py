"""Which channels a gated encoder uses on a set of images, and the dial for its FLOPs.

    python -m solo_gating.main_policy checkpoint=PATH/last.ckpt [key=value ...]

    --calibrate 0.3     find the threshold at which the gated path uses 0.3 of the dense FLOPs, on
                        calibration_images=512 training images (no labels), and use it; evaluations
                        take it as threshold=... A network that was trained for a range of budgets
                        is told 0.3 first (budget=...), and the threshold corrects what is left
    --sweep             also 1-NN accuracy against FLOPs, at every share of shares=[0.05,...,1.0]
    beside=[RUN_DIR]    with --sweep: also sweeps.png, this curve beside those, and beside the networks
                        without gates, whose metrics.json are below the folders
    budget=0.3          that the gates are told, of a network trained for a range; --calibrate and
                        --sweep then turn the threshold only
    recalibrate=2048    BatchNorm statistics of each position, as for main_knn
    dataset=cifar10     other images than the checkpoint's, from data.train_path, data.val_path

On the validation images: writes policy.json (a file that other commands read; its schema is in
solo_gating/policies.py), policy.csv, policy.png and metrics.json, and for a sweep sweep.csv
and sweep.png, into a folder beside the checkpoint (output=...).
"""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ...backbones import TwoPathResNet
from ...checks import is_number, is_share, require
from ...config.schema import EVALUATIONS, own_copy
from ...errors import InputError
from ...files import write_bytes, write_csv, write_json
from ...flops import count_flops
from ...plots.policy import draw_policy
from ...plots.sweep import draw_sweep
from ...plots.sweeps import draw_sweeps
from ...policies import Policy
from ...process_state import process_state_kept
from ...report.records import read_records
from ...texts import aligned, published_count
from ...training.checkpoints import plain
from ..calibrate import calibrate, reachable_shares, sweep
from ..evaluation import Evaluation, flops_row, prepare_evaluation
from ..knn import knn_top1
from ..policy import policy_of

_SETTINGS = ("calibrate", "calibration_images")


@process_state_kept()
def evaluate_policy(cfg: DictConfig) -> dict[str, Any]:
    """Count, draw and write the policy; calibrate and sweep on demand.

    Args:
        cfg: a policy config; left as it is.

    Returns:
        What `metrics.json` holds.

    Raises:
        InputError: before any long work, for a config, checkpoint or data that cannot be used.
    """
    cfg = own_copy(cfg, EVALUATIONS["policy"])
    require("path", cfg.path, lambda v: v == "gated", "gated")
    require(
        "calibrate", cfg.calibrate, lambda v: v is None or is_share(v), "a number in (0, 1] or null"
    )
    if cfg.calibrate is not None and cfg.threshold != 0:
        raise InputError(
            f"threshold: got {cfg.threshold} with calibrate={cfg.calibrate}, which finds it; "
            "expected one of them"
        )
    shares: Any = plain(cfg)["shares"]
    require(
        "shares",
        shares,
        lambda v: isinstance(v, list) and v and all(is_share(share) for share in v),
        "a list of numbers in (0, 1]",
    )
    beside = _beside(cfg)
    turned = cfg.sweep or cfg.calibrate is not None
    evaluation = prepare_evaluation(
        cfg, "policy", _SETTINGS, ("train", "val") if turned else ("val",)
    )
    encoder = evaluation.encoder
    backbone: Any = encoder.backbone
    if cfg.calibrate is not None and cfg.budget is not None and backbone.gates[0].dial == "budget":
        raise InputError(
            f"budget: got {cfg.budget} with calibrate={cfg.calibrate}, which finds it; expected one of "
            "them"
        )
    images = torch.empty(0)
    if turned:
        images, _ = evaluation.some("train", cfg.calibration_images)
    row: dict[str, Any] = {}
    if cfg.calibrate is not None:
        setting = calibrate(backbone, images, cfg.calibrate, cfg.budget)
        setting.apply(backbone)
        row["calibrated_share"] = setting.share
        evaluation.say(
            f"{_position(backbone)} gives {setting.share:.4f} of the dense FLOPs on "
            f"{len(images)} training images"
        )
    with evaluation.of_path("gated"):
        found = evaluation.extract("val", "gated")
    policy = policy_of(
        backbone,
        found,
        encoder.args.backbone.name,
        OmegaConf.to_container(encoder.args.backbone.kwargs, resolve=True),  # type: ignore[arg-type]
        evaluation.encoder.description()["target_budget"],
    )
    row |= flops_row(found, evaluation.encoder)
    row |= {"threshold": policy.threshold, "share": policy.share, "share_std": policy.share_std}
    if policy.budget is not None:
        row["budget"] = policy.budget
    _write_policy(evaluation, policy)
    evaluation.say(format_policy(policy))
    kind = backbone.gates[0]
    if not kind.only_masks:
        published = count_flops(backbone, found.resolution).as_published(found.channels)  # type: ignore[arg-type]
        row |= published
        evaluation.say(f"{published_count(kind.kind, published)}\n")
    rows = {"gated": row}
    if cfg.sweep:
        rows["dense"], row["sweep"] = _sweep(evaluation, images, shares, policy.target_budget)
    elif "sweep" in (earlier := evaluation.earlier().get("gated", {})):
        row["sweep"] = earlier["sweep"]  # of the same settings
    written = evaluation.write(rows, len(images))
    if beside and evaluation.fabric.is_global_zero:
        _draw_beside(evaluation.folder, beside)
    return written


def _beside(cfg: DictConfig) -> list[Path]:
    """The folders of rivals, which have something to be drawn."""
    given: Any = plain(cfg)["beside"]
    require(
        "beside",
        given,
        lambda v: isinstance(v, list) and all(isinstance(folder, str) for folder in v),
        "a list of folders with metrics.json files",
    )
    if given and not cfg.sweep:
        raise InputError(f"beside: got {given} with sweep=false, expected sweep=true")
    folders = [Path(folder).expanduser() for folder in given]
    if folders:
        read_records(folders, "beside")
    return folders


def _draw_beside(folder: Path, beside: list[Path]) -> None:
    found = read_records([folder, *beside], "beside")
    png = draw_sweeps(found.sweeps, found.records)
    if png is not None:
        write_bytes(folder / "sweeps.png", png)


def _position(backbone: TwoPathResNet) -> str:
    """How the dial stands, as config overrides."""
    position = f"threshold={backbone.threshold:.6g}"
    return position if backbone.budget is None else f"budget={backbone.budget:g} {position}"


def _write_policy(evaluation: Evaluation, policy: Policy) -> None:
    if not evaluation.fabric.is_global_zero:
        return
    folder = evaluation.folder
    write_json(folder / "policy.json", policy.to_json())
    columns = (
        "name",
        "channels",
        "always_on",
        "input_dependent",
        "always_off",
        "active",
        "active_std",
    )
    write_csv(
        folder / "policy.csv",
        [{key: getattr(block, key) for key in columns} for block in policy.blocks],
    )
    title = f"Channels of {evaluation.encoder.args.get('name')} on {policy.images:,} images, "
    title += f"{policy.share:.1%} of the FLOPs"
    if policy.budget is not None:
        title += f" (budget {policy.budget:.0%})"
    elif is_number(policy.target_budget):
        title += f" (target budget {policy.target_budget:.0%})"
    draw_policy(policy, folder / "policy.png", title)


def _sweep(
    evaluation: Evaluation,
    images: Tensor,
    shares: list[float],
    target_budget: float | list[float] | None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The dense path's figures, and those of each position."""
    backbone: Any = evaluation.encoder.backbone

    def accuracy(path: str) -> dict[str, float]:
        with evaluation.of_path(path):
            train = evaluation.extract_labelled("train", path)
            val = evaluation.extract_labelled("val", path)
        figures = {
            "knn_top1": knn_top1((train.features, train.targets), (val.features, val.targets))
        }
        row = flops_row(val, evaluation.encoder)
        if path == "dense":
            figures |= row
        else:
            figures |= {"share": 1 - row["flops_cut"], "flops": row["flops"]}
            evaluation.say(
                f"{figures['share']:>7.1%} of the FLOPs: 1-NN {figures['knn_top1']:.2f} % "
                f"({_position(backbone)})"
            )
        return figures

    least, most = reachable_shares(backbone, images)
    possible = [share for share in shares if least <= share <= most]
    if len(possible) < len(shares):
        evaluation.say(
            f"shares below {least:.1%} or above {most:.1%} are left out: the dial does not reach them"
        )
    dense = accuracy("dense")
    evaluation.say(f"dense path: 1-NN {dense['knn_top1']:.2f} %")
    points = sweep(backbone, images, possible, lambda: accuracy("gated"), evaluation.cfg.budget)
    if evaluation.fabric.is_global_zero:
        write_csv(evaluation.folder / "sweep.csv", points)
        draw_sweep(
            points,
            dense["knn_top1"],
            target_budget,
            evaluation.folder / "sweep.png",
            f"{evaluation.encoder.args.get('name')}, one checkpoint",
            backbone.gates[0].dial,
        )
    return dense, points


def format_policy(policy: Policy) -> str:
    """The policy as text, a line for each block."""
    rows = [["block", "channels", "always on", "depends", "always off", "used by an image"]]
    for block in policy.blocks:
        counts = (block.channels, block.always_on, block.input_dependent, block.always_off)
        used = f"{block.active:.1%} ± {block.active_std:.1%}"
        rows.append([block.name, *map(str, counts), used])
    total = (
        f"{policy.share:.2%} ± {policy.share_std:.2%} of the dense FLOPs on {policy.images:,} "
        f"images (threshold {policy.threshold:.6g})"
    )
    return "\n".join(["", *aligned(rows), "", total, ""])
