"""Turn a checkpoint into a network that others can run.

    python -m solo_gating.main_export checkpoint=PATH/last.ckpt path=dense output=DIR
    python -m solo_gating.main_export checkpoint=PATH/last.ckpt policy=PATH/policy.json \\
        keep=dynamic gates=keep format=onnx output=DIR [data.val_path=PATH ...]

Every key may also be written as --key value.

The gated path becomes a physically smaller network, from a policy of main_policy, at the threshold and,
for a network that was trained for a range of budgets, at the budget of that policy:

    keep=dynamic        the channels that at least one of the policy's images selected (default)
    keep=always_on      those that all images selected
    keep=top:0.3        the most often selected ones, with which the network has 0.3 of the FLOPs
    gates=keep          gates choose among them: exactly the gated path on the policy's images, and on
                        every image that needs no removed channel
    gates=drop          all of them are computed for every image: an approximation
    multiple=8          numbers of channels are rounded up to a multiple

Formats:

    torch               dense: model.pt, a state dict for torchvision.models.resnet18 (without `fc`);
                        gated: model.pt2, which torch.export.load reads without this package, and
                        model.pt with `architecture` and `state_dict` of backbones.SlicedResNet
    onnx                model.onnx, any batch size; compared with PyTorch under ONNX Runtime, on
                        images where there are some
    openvino-via-onnx   model.xml and model.bin
    onnx-int8           model.onnx, quantised by ONNX Runtime: for each output channel a scale of its
                        weights, one for each map; gates stay in float32
    openvino-int8       model.xml and model.bin, quantised by NNCF (without it, by ONNX Runtime)
    sgx                 encoder.sgx, which solo_gating_runtime.load and deploy.load read
    cpp                 a folder that a C++17 compiler builds, without this package: the kernel's sources,
                        encoder.sgx, a C interface (kernel/gated.h), CMakeLists.txt and an example
    solo-learn          dense: args.json and last.ckpt of the method without gates (vicreg for
                        vicreg_dual), which solo-learn's scripts read without this plugin

For sgx and cpp the gated path needs no policy: the file holds the whole encoder, whose gates choose for
each image. threshold=... and budget=... set the dial that is stored; it can be turned later. Both take

    dtype               float32 (default), bfloat16 or int8, of the convolutions
    float_stem=true     keeps the first convolution of an int8 network in float32

What rounding to bfloat16 or int8 changed is measured and printed, where there are images.

With evaluate=true, or with data.train_path=..., data.val_path=... or dataset=cifar10, 1-NN
accuracy before and after is measured on the validation images. int8 is calibrated on at most 256
images, evenly spread: those of a folder (calibration=PATH), else training images of the same data;
without either it is refused. It is compared with the float network on validation images,
without these on those of the folder. export.json says what was made.
"""

import argparse
import copy
import io
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import TwoPathResNet
from ..backbones.statistics import recalibrated
from ..checkpoints.encoder import Encoder, encoder_of
from ..checks import at_least
from ..config.arguments import command_parser
from ..config.compose import check_overrides, user_path
from ..config.schema import CROP
from ..data.augmentations import normalisation
from ..errors import InputError
from ..evaluate.calibrate import Setting
from ..evaluate.evaluation import Evaluation, evaluation_of
from ..evaluate.extract import Extraction, extract
from ..evaluate.knn import knn_top1
from ..evaluate.table import figure
from ..files import make_folder, write_bytes, write_json
from ..flops import count_flops
from ..policies import Policy, read_policy
from ..process_state import process_state_kept
from ..solo_learn import METHODS
from .calibration import MOST_IMAGES, calibration_images
from .cpp import files_of
from .dense import dense_network, dense_state_dict, solo_learn_args, solo_learn_checkpoint
from .engine import DTYPES, compile
from .onnx import Runner, onnx_runner, openvino_runner, to_onnx, to_openvino
from .others_int8 import gates_of, onnx_int8, openvino_int8
from .report import Report
from .static import kept_channels, slice_encoder, static_flops

# The options that decide what overrides would, too.
_DECIDED_BY = {
    "threshold": "threshold=... alone",
    "budget": "budget=... alone",
    "crop_size": "resolution alone",
}
INT8 = ("onnx-int8", "openvino-int8")
CPP = "cpp"
OURS = (CPP, "sgx")  # of our own engine
FORMATS = ("torch", "onnx", "openvino-via-onnx", *INT8, *OURS, "solo-learn")

_DIALS = ("budget", "threshold")


@process_state_kept()
def export(options: argparse.Namespace) -> dict[str, Any]:
    """Write the files and measure what was asked for.

    Args:
        options: as parsed by `main`.

    Returns:
        What `export.json` holds.

    Raises:
        InputError: before anything is written, for what cannot be used or does not fit.
    """
    check_overrides(options.overrides, _DECIDED_BY)
    encoder = encoder_of(options.checkpoint, key="checkpoint")
    _check(options, encoder)
    _set_dial(options, encoder.backbone)
    make_folder(options.output)
    overrides = options.overrides
    size = encoder.crop_size
    if options.resolution is not None:
        size = options.resolution
        overrides = [f"crop_size={size}", *overrides]
    evaluation = None
    if options.evaluate or options.overrides:
        evaluation = evaluation_of(options.checkpoint, overrides, ("train", "val"))
    policy = None if options.policy is None else read_policy(options.policy, "policy")
    if policy is not None:
        _turn(encoder.backbone, policy)
    statistics = None if evaluation is None else evaluation.statistics
    if statistics is not None:
        with recalibrated(encoder.backbone, statistics, options.path):
            encoder = replace(encoder, backbone=copy.deepcopy(encoder.backbone))
    if options.path == "dense":
        dense = dense_network(encoder)
        net: nn.Module = dense
        report: dict[str, Any] = {"path": "dense", "flops": count_flops(dense, (size, size)).dense}
    elif policy is None:  # of our own engine the gated path as it is
        backbone: Any = encoder.backbone
        net = backbone
        report = {"path": "gated", "dense_flops": count_flops(backbone, (size, size)).dense}
        report |= {
            key: getattr(backbone, key) for key in _DIALS if getattr(backbone, key) is not None
        }
    else:
        net, report = _static(options, encoder, size, policy)
    report |= {"checkpoint": str(options.checkpoint), "resolution": [size, size]}
    if statistics is not None and evaluation is not None:
        report["recalibrate"] = evaluation.cfg.recalibrate
    images, real = _examples(evaluation, size)
    after = net
    files: dict[str, bytes] = {}
    calibration = None
    if _is_int8(options):
        given = overrides if options.calibration is None else options.calibration
        calibration = calibration_images(given, encoder.checkpoint, 3)
        report["calibration_images"] = len(calibration)
    if options.format in OURS:
        files, after = _compiled(options, encoder, net, calibration, evaluation, report)
    elif calibration is not None:
        files, after = _quantised(options, net, calibration, images if real else None, report)
    if evaluation is not None:
        if policy is not None:
            _turn(evaluation.encoder.backbone, policy)
        _set_dial(options, evaluation.encoder.backbone)
        accuracies, flops = _accuracies(evaluation, options.path, after)
        if "dense_flops" in report and flops is not None:
            report |= {"flops": flops, "flops_cut": 1 - flops / report["dense_flops"]}
        report |= accuracies
    files = files or _contents(options, encoder, net, images, real, report)
    for name, content in files.items():
        write_bytes(options.output / name, content)
    write_json(options.output / "export.json", report)
    return report | {"files": [str(options.output / name) for name in (*files, "export.json")]}


def _check(options: argparse.Namespace, encoder: Encoder) -> None:
    at_least("multiple", options.multiple, 1)
    if options.resolution is not None:
        CROP.check("resolution", options.resolution)
    if options.path is None:
        options.path = "dense" if options.policy is None else "gated"
    encoder.paths(options.path)
    if options.path == "dense" and options.policy is not None:
        raise InputError("policy: got one for the dense path, expected path=gated")
    method = encoder.args.method
    images = options.evaluate or options.overrides
    if options.path == "gated" and getattr(METHODS.get(method), "recalibrate", 0) and not images:
        raise InputError(
            f"evaluate: missing, method {method!r} has no BatchNorm statistics of narrow widths; expected "
            "evaluate=true or data.train_path=..., whose images give them"
        )
    if options.path == "gated" and options.policy is None and options.format not in OURS:
        raise InputError("policy: missing, the gated path needs main_policy's policy.json")
    _check_ours(options)
    if not _is_int8(options):
        if options.calibration is not None:
            key = "dtype" if options.format in OURS else "format"
            raise InputError(
                f"calibration: got a folder for {key}={getattr(options, key)}, expected "
                f"{' or '.join(INT8)}, or dtype=int8 with {' or '.join(OURS)}"
            )
    elif options.calibration is None and not (options.evaluate or options.overrides):
        name = options.format if options.format in INT8 else "dtype=int8"
        raise InputError(
            f"calibration: missing, {name} needs images; expected a folder, or "
            "evaluate=true for those of pre-training, or others, as with data.train_path=..."
        )
    elif options.calibration is not None and options.resolution is not None:
        raise InputError(
            f"resolution: got {options.resolution} with a folder of images, which have "
            f"pre-training's {encoder.crop_size}; expected data.train_path=... instead of calibration"
        )
    if options.path == "gated" and options.format == "solo-learn":
        raise InputError("format: got solo-learn, which has no gated path; expected path=dense")
    if (
        options.format == "solo-learn"
        and options.output.resolve() == encoder.checkpoint.resolve().parent
    ):
        raise InputError(
            "output: got the checkpoint's own folder, whose last.ckpt and args.json would be "
            "replaced; expected another"
        )


def _check_ours(options: argparse.Namespace) -> None:
    """Refuse what only our own engine's formats have, and what does not fit there."""
    if options.format not in OURS:
        for key, default in (("dtype", "float32"), ("float_stem", False)):
            if (value := getattr(options, key)) != default:
                found = value if key == "dtype" else "one"
                raise InputError(
                    f"{key}: got {found} for format={options.format}, expected format="
                    f"{' or '.join(OURS)}"
                )
    elif options.float_stem and options.dtype != "int8":
        raise InputError(f"float_stem: got one for dtype={options.dtype}, expected with dtype=int8")
    for key in _DIALS:
        value = getattr(options, key)
        if value is None:
            continue
        if options.path == "dense":
            raise InputError(f"{key}: got {value:g} for the dense path, expected path=gated")
        if options.policy is not None:
            raise InputError(f"{key}: got {value:g} with a policy, expected the policy's alone")


def _is_int8(options: argparse.Namespace) -> bool:
    return options.format in INT8 or options.dtype == "int8"


def _set_dial(options: argparse.Namespace, backbone: Any) -> None:
    for key in _DIALS:
        if (value := getattr(options, key)) is not None:
            setattr(backbone, key, value)


def _static(
    options: argparse.Namespace, encoder: Encoder, size: int, policy: Policy
) -> tuple[nn.Module, dict[str, Any]]:
    backbone: Any = encoder.backbone
    flops = count_flops(backbone, (size, size))
    kept = kept_channels(policy, flops, options.keep, options.multiple)
    net = slice_encoder(backbone, kept, options.gates == "keep")
    cost = static_flops(net, (size, size))
    return net, {
        "path": "gated",
        "policy": str(options.policy),
        "keep": options.keep,
        "gates": options.gates,
        "threshold": policy.threshold,
        "hidden": net.architecture["hidden"],
        "flops": cost,  # all kept channels computed
        "flops_cut": 1 - cost / flops.dense,
        **({} if policy.budget is None else {"budget": policy.budget}),
    }


def _turn(backbone: Any, policy: Policy) -> None:
    """Set a backbone's dial as it stood when the policy was made."""
    Setting(policy.threshold, policy.share, policy.budget).apply(backbone)


def _accuracies(
    evaluation: Evaluation, path: str, net: nn.Module
) -> tuple[dict[str, float], float | None]:
    """1-NN of the path and of the network made of it, and the path's mean FLOPs."""

    def extractions(backbone: nn.Module) -> list[Extraction]:
        ours = path if isinstance(backbone, TwoPathResNet) else None
        return [extract(backbone, evaluation.loaders[s], ours) for s in ("train", "val")]

    def accuracy(train: Extraction, val: Extraction) -> float:
        return knn_top1((train.features, train.targets), (val.features, val.targets))

    device = evaluation.fabric.device
    with evaluation.of_path(path):
        before = extractions(evaluation.encoder.backbone)
    after = accuracy(*extractions(net.to(device)))
    net.to("cpu")
    return {"knn_top1_before": accuracy(*before), "knn_top1_after": after}, before[1].flops


def _examples(evaluation: Evaluation | None, size: int) -> tuple[Tensor, bool]:
    """Some images to trace and to compare on, and whether they are real ones."""
    if evaluation is None:
        return torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)), False
    return evaluation.some("val", 64)[0], True


def _compiled(
    options: argparse.Namespace,
    encoder: Encoder,
    net: nn.Module,
    calibration: Tensor | None,
    evaluation: Evaluation | None,
    report: dict[str, Any],
) -> tuple[dict[str, bytes], nn.Module]:
    """The files of our own engine, and its encoder; what rounding changed goes into the report."""
    path = options.path if options.gates == "keep" or options.policy is None else "dense"
    fast = compile(
        net, path, dtype=options.dtype, calibration=calibration, float_stem=options.float_stem
    )
    mean, std = normalisation(encoder.args.data.dataset, encoder.args.augmentations)
    if options.format == CPP:
        files = files_of(fast, mean, std)
    else:
        files = {"encoder.sgx": fast.to_bytes()}
    report |= {
        "dtype": fast.dtype,
        "computes": fast.computes,
        "float_stem": options.float_stem,
        "bytes": len(files["encoder.sgx"]),
        "mean": list(mean),
        "std": list(std),
    }
    images, labels, kind = calibration, None, "calibration"
    if evaluation is not None:
        images, labels = evaluation.some("val", MOST_IMAGES)
        kind = "validation"
        if (labels < 0).all():
            labels = None
    if fast.dtype != "float32" and images is not None:
        report["rounding"] = asdict(fast.report(images, labels))
        report["rounding_on"] = f"{len(images)} {kind} images"
    return files, _Called(fast)


def _quantised(
    options: argparse.Namespace,
    net: nn.Module,
    calibration: Tensor,
    images: Tensor | None,
    report: dict[str, Any],
) -> tuple[dict[str, bytes], nn.Module]:
    """The files of an int8 network, and that network; figures of the comparison go into the report."""
    kind = "calibration images" if images is None else "validation images"
    if images is None:
        images = calibration[:64]
    model = to_onnx(net, images)
    if options.format == "onnx-int8":
        quantiser = "onnxruntime"
        quantised = onnx_int8(model, calibration, gates_of(net))
        files = {"model.onnx": quantised}
        run = onnx_runner(quantised)
    else:
        files, quantiser = openvino_int8(model, calibration, gates_of(net))
        run = openvino_runner(files)
    with torch.no_grad():
        expected = net(images)
    report |= {
        "quantised_by": quantiser,
        "feature_error": float((run(images) - expected).norm() / expected.norm()),
        "feature_error_on": f"{len(images)} {kind}",
    }
    return files, _Called(run)


class _Called(nn.Module):
    """A network of another runtime as `extract` takes it."""

    def __init__(self, run: Runner):
        super().__init__()
        self.run = run
        self.place = nn.Parameter(torch.zeros(0), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images.cpu()).to(images.device)


def _contents(
    options: argparse.Namespace,
    encoder: Encoder,
    net: nn.Module,
    images: Tensor,
    real: bool,
    report: dict[str, Any],
) -> dict[str, bytes]:
    """The files' names and contents; figures of their check go into the report."""
    if options.format == "solo-learn":
        args = solo_learn_args(encoder)
        write_json(options.output / "args.json", args)
        return {"last.ckpt": _saved(solo_learn_checkpoint(encoder))}
    if options.format == "torch":
        if options.path == "dense":
            return {"model.pt": _saved(dense_state_dict(encoder))}
        batch = torch.export.Dim("batch")
        program = torch.export.export(net, (images,), dynamic_shapes=({0: batch},))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        weights = {"architecture": net.architecture, "state_dict": net.state_dict()}
        return {"model.pt2": buffer.getvalue(), "model.pt": _saved(weights)}
    model = to_onnx(net, images)
    with torch.no_grad():
        expected = net(images)
    with suppress(ImportError):
        found = onnx_runner(model)(images)
        difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
        report["onnx_relative_difference"] = float(difference)
        report["onnx_checked_on"] = f"{len(images)} {'images' if real else 'random images'}"
    if options.format == "openvino-via-onnx":
        return to_openvino(model)
    return {"model.onnx": model}


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def format_export(report: dict[str, Any]) -> str:
    """What was made, as text."""
    if "flops" in report:
        lines = [f"{report['path']} path: {report['flops']:,.0f} FLOPs per image"]
    else:
        lines = [f"{report['path']} path: at most {report['dense_flops']:,} FLOPs per image"]
    if "flops_cut" in report:
        lines[0] += f", {report['flops_cut']:.1%} fewer than the dense encoder"
    if "hidden" in report:
        lines.append(f"channels inside the blocks: {', '.join(map(str, report['hidden']))}")
    if "knn_top1_before" in report:
        lines.append(
            f"1-NN accuracy: {figure(report['knn_top1_before'], '.2f')} % before, "
            f"{figure(report['knn_top1_after'], '.2f')} % after"
        )
    if "onnx_relative_difference" in report:
        lines.append(
            f"ONNX Runtime and PyTorch differ by {report['onnx_relative_difference']:.1e} of the "
            f"largest feature, on {report['onnx_checked_on']}"
        )
    if "feature_error" in report:
        lines.append(
            f"int8 by {report['quantised_by']}, calibrated on {report['calibration_images']} "
            f"images: features are {report['feature_error']:.2%} off, on {report['feature_error_on']}"
        )
    if "dtype" in report:
        lines.append(_of_our_engine(report))
    if "rounding" in report:
        lines.append(f"what rounding changed, on {report['rounding_on']}:")
        lines.append(str(Report.of(report["rounding"])))
    return "\n".join([*lines, *report["files"]])


def _of_our_engine(report: dict[str, Any]) -> str:
    parts = [report["dtype"]]
    if report["computes"] != report["dtype"]:
        parts.append(f"which is stored, and computed in {report['computes']} here")
    if "calibration_images" in report:
        parts.append(f"calibrated on {report['calibration_images']} images")
    if report["float_stem"]:
        parts.append("the first convolution in float32")
    return ", ".join([*parts, f"encoder.sgx has {report['bytes']:,} bytes"])


def parser() -> argparse.ArgumentParser:
    """What the command understands."""
    made = command_parser("main_export", __doc__)
    made.add_argument("--checkpoint", type=user_path, required=True)
    made.add_argument("--path", choices=("dense", "gated"))
    made.add_argument("--policy", type=user_path)
    made.add_argument("--keep", default="dynamic")
    made.add_argument("--gates", choices=("keep", "drop"), default="keep")
    made.add_argument("--multiple", type=int, default=8)
    made.add_argument("--format", choices=FORMATS, default="torch")
    made.add_argument(
        "--dtype", choices=DTYPES, default="float32", help=f"{' and '.join(OURS)} only"
    )
    made.add_argument("--float_stem", action="store_true", help="dtype=int8 only")
    made.add_argument("--threshold", type=float, help="of the gates, until another one is set")
    made.add_argument("--budget", type=float, help="that the gates are told until then")
    made.add_argument("--resolution", type=int, help="default: pre-training's crop size")
    made.add_argument("--calibration", type=user_path, help="a folder of images, int8 only")
    made.add_argument("--output", type=user_path, required=True)
    made.add_argument("--evaluate", action="store_true")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    return made
