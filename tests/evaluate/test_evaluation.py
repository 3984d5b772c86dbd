"""Frozen encoders: from a checkpoint to features, decisions, FLOPs and a folder for results."""

import json
import math
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from solo_gating import (
    BaseMethod,
    InputError,
    main_flops,
    main_knn,
    main_linear,
    main_policy,
    main_pretrain,
    main_umap,
)
from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.evaluate import evaluation
from solo_gating.evaluate.evaluation import prepare_evaluation
from solo_gating.evaluate.extract import extract
from solo_gating.gates import ChannelGate
from solo_gating.main_knn import evaluate_knn

from ..support.encoders import (
    VAL,
    assert_refused,
    digit_tensors,
    digits,
    evaluation_config,
    flops_by_hand,
    loader,
    nothing_twice,
    run_config,
    save_run,
    tiny_backbone,
    write_arrays,
)
from ..support.helpers import explanation_of, fixed_noise, randomise_norms


@pytest.mark.parametrize("path", ["dense", "gated"])
@pytest.mark.parametrize("head", ["backbone", "projector"])
def test_a_checkpoint_gives_the_features_of_the_trained_model(path, head, trained):
    encoder = encoder_of(trained.checkpoint, head)
    images, _ = digit_tensors(VAL)
    model = trained.model
    with torch.no_grad(), model.backbone.path(path), encoder.backbone.path(path):
        expected = model.backbone(images)
        found = encoder.head(encoder.backbone(images))
        if head == "projector":
            expected = model.projector(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01
    for module in (encoder.backbone, *([encoder.head] if head == "projector" else [])):
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_checkpoint_says_where_it_comes_from(trained):
    encoder = encoder_of(trained.checkpoint)
    assert encoder.trained_paths == encoder.paths("both") == ("dense", "gated")
    assert encoder.paths("gated") == ("gated",)
    description = encoder.description()
    expected = {
        "name": "tiny",
        "method": "vicreg_dual",
        "dataset": "custom",
        "backbone": "resnet18_gated",
        "width": 4,
        "epochs": 1,
        "target_budget": 0.5,
        "seed": 0,
        "checkpoint": str(trained.checkpoint),
    }
    assert {key: description[key] for key in expected} == expected
    assert description["method_kwargs"]["proj_output_dim"] == 16


@pytest.mark.parametrize("method", ["vicreg_gated", "vicreg"])
def test_only_the_paths_that_were_trained_are_both(method, tmp_path):
    run = save_run(run_config(tmp_path, method), tmp_path)
    encoder = encoder_of(run.checkpoint)
    assert encoder.paths("both") == (("gated",) if method == "vicreg_gated" else ("dense",))
    assert encoder.paths("dense") == ("dense",)


def macs_by_hooks(net, images):
    """Output elements times inputs of each, over all convolutions; for one image."""
    counted = []

    def count(conv, inputs, output):
        counted.append(output[0].numel() * conv.weight[0].numel())

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d)]
    net(images[:1])
    for hook in hooks:
        hook.remove()
    return sum(counted)


@pytest.mark.parametrize("dataset", ["custom", "cifar10"])
def test_a_run_of_solo_learn_s_resnet18_is_torchvision_s_with_known_flops(dataset, tmp_path):
    cfg = run_config(tmp_path, "vicreg", data={"dataset": dataset})
    cfg.backbone = {"name": "resnet18", "kwargs": {}}
    run = save_run(cfg, tmp_path)
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    if dataset == "cifar10":  # solo-learn's stem
        theirs.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=2, bias=False)
        theirs.maxpool = nn.Identity()
    randomise_norms(run.model.backbone)
    theirs.load_state_dict(run.model.backbone.state_dict())
    torch.save({"state_dict": run.model.state_dict(), "epoch": 0}, run.checkpoint)

    images, _ = digit_tensors(slice(3))
    encoder = encoder_of(run.checkpoint)
    found = extract(encoder.backbone, loader(images), "dense")
    with torch.no_grad():
        torch.testing.assert_close(found.features, theirs.eval()(images))
        assert found.flops == macs_by_hooks(theirs, images)
    assert found.channels is None
    assert encoder.paths("both") == ("dense",)


def test_a_plain_network_s_flops_are_known(plain):
    found = extract(encoder_of(plain.checkpoint).backbone, loader(digit_tensors(VAL)[0]))
    assert found.flops == flops_by_hand(None)
    assert (found.channels, found.selected) == (None, ())


def changed_args(change):
    def write(folder):
        args = json.loads((folder / "args.json").read_text())
        change(args)
        (folder / "args.json").write_text(json.dumps(args))

    return write


def truncated(folder):
    file = folder / "last.ckpt"
    file.write_bytes(file.read_bytes()[:-3000])


KEY = "checkpoint: "
BAD_RUNS = {
    "no file": (lambda f: (f / "last.ckpt").unlink(), [KEY, "last.ckpt", "is not a file"]),
    "truncated": (truncated, [KEY, "cannot read", "last.ckpt"]),
    "not a checkpoint": (lambda f: (f / "last.ckpt").write_text("{}"), [KEY, "cannot read"]),
    "no args.json": (lambda f: (f / "args.json").unlink(), [KEY, "no args.json beside"]),
    "damaged args.json": (
        lambda f: (f / "args.json").write_text('{"method": '),
        [KEY, "cannot read", "args.json"],
    ),
    "a list": (lambda f: (f / "args.json").write_text("[]"), [KEY, "no JSON object"]),
    "null": (lambda f: (f / "args.json").write_text("null"), [KEY, "no JSON object"]),
    "no backbone": (
        changed_args(lambda args: args.pop("backbone")),
        [KEY, "lacks backbone.name"],
    ),
    "no backbone.name": (
        changed_args(lambda args: args["backbone"].pop("name")),
        [KEY, "lacks backbone.name", "solo-learn's args.json"],
    ),
    "unknown backbone": (
        changed_args(lambda args: args["backbone"].update(name="resnet19")),
        [KEY, "'resnet19'", "is not known", "resnet18_gated"],
    ),
    "no validation images": (
        changed_args(lambda args: args["data"].update(val_path=None)),
        ["data.val_path: missing"],
    ),
    "another width": (
        changed_args(lambda args: args["backbone"]["kwargs"].update(width=5)),
        ["another architecture", "conv1.weight is (4, 3, 3, 3) there and (5, 3, 3, 3)"],
    ),
}


@pytest.mark.parametrize("kind", BAD_RUNS)
def test_a_run_that_cannot_be_used_is_refused_in_one_sentence(kind, dual, tmp_path):
    change, parts = BAD_RUNS[kind]
    folder = tmp_path / "run"
    shutil.copytree(dual.folder, folder)
    change(folder)
    cfg = evaluation_config("knn", folder / "last.ckpt")
    assert_refused(lambda: evaluate_knn(cfg), *parts)
    assert not (folder / "evaluation").exists()


@pytest.mark.parametrize(
    ("run", "overrides", "parts"),
    [
        ("dual", ["path=gate"], ["path: got 'gate'", "dense, gated and both"]),
        ("plain", ["path=gated"], ["path: got gated", "resnet18_plain", "no gates"]),
        ("dual", ["features=head"], ["features: got 'head'", "backbone, projector"]),
        ("plain", ["threshold=0.3"], ["threshold: got 0.3", "no gates", "expected 0"]),
        ("dual", ["threshold=high"], ["threshold: got 'high'", "a number"]),
        ("dual", ["batch_size=0"], ["batch_size: got 0", "an integer ≥ 1"]),
        ("dual", ["crop_size=0"], ["crop_size: got 0", "an integer from 1 to 4096"]),
        ("dual", ["devices=0"], ["devices: got 0", "an integer ≥ 1"]),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(run, overrides, parts, request):
    checkpoint = request.getfixturevalue(run).checkpoint
    assert_refused(lambda: evaluate_knn(evaluation_config("knn", checkpoint, *overrides)), *parts)


@pytest.mark.parametrize("kind", ["no optimizer", "unknown argument", "a number"])
def test_an_args_json_that_fits_no_network_is_refused(kind, dual, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(dual.folder, folder)
    if kind == "a number":
        (folder / "args.json").write_text("5")
    else:
        changed_args(
            lambda args: (
                args.pop("optimizer")
                if kind == "no optimizer"
                else args["backbone"]["kwargs"].update(depth=3)
            )
        )(folder)
    assert_refused(lambda: encoder_of(folder / "last.ckpt"), "args.json")


# The threshold of the gates' logits


@pytest.mark.parametrize("threshold", [-0.7, 0.0, 0.4])
def test_a_channel_is_on_from_the_threshold_on(threshold):
    gate = ChannelGate(6, 9, reduction=2).double().eval()
    randomise_norms(gate)
    gate.threshold = threshold
    x = torch.randn(32, 6, 4, 4, dtype=torch.float64)
    logits = gate.logits(x)
    assert torch.equal(gate(x), (logits >= threshold).double())
    assert 0.1 < gate(x).mean() < 0.9
    gate.threshold = logits[3, 5].item()  # at least means: also at
    assert gate(x)[3, 5] == 1


@pytest.mark.parametrize("name", ["resnet18_gated", "resnet18_two_encoders"])
@pytest.mark.parametrize("threshold", [-1.5, 0.6])
def test_every_gate_of_a_network_has_the_threshold(name, threshold):
    backbone, (images, _) = tiny_backbone(name), digit_tensors(VAL)
    inputs = []
    hooks = [
        block.gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for block in backbone.gated_blocks
    ]
    backbone.threshold = threshold
    with torch.no_grad(), backbone.path("gated") as passes:
        backbone(images)
        masks = passes[-1].masks
        for hook in hooks:
            hook.remove()
        for block, x, mask in zip(backbone.gated_blocks, inputs, masks, strict=True):
            logits = block.gate.logits(x)
            assert torch.equal(mask, (logits >= threshold).float())
    shares = [mask.mean().item() for mask in masks]
    assert any(0 < share < 1 for share in shares)
    assert np.mean(shares) < 0.45 if threshold > 0 else np.mean(shares) > 0.55


@pytest.mark.parametrize("name", ["resnet18_gated", "resnet18_two_encoders"])
def test_an_infinite_threshold_turns_every_channel_off_or_on(name):
    backbone, (images, _) = tiny_backbone(name), digit_tensors(VAL)
    for threshold, share in ((math.inf, 0), (-math.inf, 1)):
        backbone.threshold = threshold
        with torch.no_grad(), backbone.path("gated") as passes:
            assert torch.isfinite(backbone(images)).all()
        assert {mask.mean().item() for mask in passes[-1].masks} == {share}


def test_in_training_the_threshold_has_no_effect():
    backbone, (images, _) = tiny_backbone().train(), digit_tensors(VAL)
    masks = []
    for threshold in (0.0, 3.0):
        backbone.threshold = threshold
        with torch.no_grad(), fixed_noise(), backbone.path("gated") as passes:
            backbone(images)
        masks.append(passes[-1].masks)
    for one, other in zip(*masks, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["resnet18_gated", "resnet18_two_encoders"])
def test_the_threshold_is_an_argument_and_a_property(name):
    backbone = BaseMethod._BACKBONES[name]("x", width=4, threshold=0.4)
    assert backbone.threshold == 0.4
    assert {block.gate.threshold for block in backbone.gated_blocks} == {0.4}
    backbone.threshold = -2
    assert backbone.threshold == -2
    assert {block.gate.threshold for block in backbone.gated_blocks} == {-2}


def test_no_checkpoint_holds_a_threshold():
    backbone = tiny_backbone()
    assert backbone.threshold == 0
    backbone.threshold = 0.4
    state = backbone.state_dict()
    assert not [name for name in state if "threshold" in name]
    other = BaseMethod._BACKBONES["resnet18_gated"]("x", width=4, stem="cifar", threshold=-1.0)
    other.fc = nn.Identity()
    other.load_state_dict(state)
    assert other.threshold == -1.0


@pytest.mark.parametrize("name", ["resnet18_gated", "resnet18_two_encoders"])
def test_a_threshold_that_is_no_number_is_refused(name):
    backbone = tiny_backbone(name)

    def turn(value):
        backbone.threshold = value

    for value in (math.nan, True, "0.4", None, [0.4]):
        assert_refused(lambda v=value: turn(v), f"threshold: got {value!r}", "a number")
    assert backbone.threshold == 0
    with pytest.raises(InputError, match="threshold: got nan"):
        BaseMethod._BACKBONES[name]("x", width=4, threshold=math.nan)


def test_an_evaluation_sets_the_threshold(dual):
    cfg = evaluation_config("knn", dual.checkpoint, "threshold=0.3")
    prepared = prepare_evaluation(cfg, "knn", (), ("val",))
    assert prepared.encoder.backbone.threshold == 0.3
    found = prepared.extract("val", "gated")
    dual.model.backbone.threshold = 0.3
    expected = extract(dual.model.backbone, prepared.loaders["val"], "gated")
    dual.model.backbone.threshold = 0.0
    assert torch.equal(found.channels, expected.channels)
    default = extract(dual.model.backbone, prepared.loaders["val"], "gated")
    assert found.flops < default.flops


# Features, decisions and FLOPs of a set of images


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18_gated", {}),
        ("resnet18_gated", {"separate_bn": False}),
        ("resnet18_two_encoders", {}),
    ],
)
def test_figures_are_those_of_each_image_whatever_the_batch(name, kwargs):
    backbone = tiny_backbone(name, **kwargs)
    images, targets = digit_tensors(VAL)
    features, channels, costs, selected = [], [], [], [0] * 8
    with torch.no_grad(), backbone.path("gated") as passes:
        for image in images:
            features.append(backbone(image[None])[0])
            masks = [mask[0] for mask in passes[-1].masks]
            channels.append([int(mask.sum()) for mask in masks])
            costs.append(flops_by_hand(channels[-1]))
            selected = [s + mask.long() for s, mask in zip(selected, masks, strict=True)]
    assert len(set(costs)) > 5  # the images do differ
    for batch_size in (1, 7, len(images)):
        found = extract(backbone, loader(images, targets, batch_size), "gated")
        torch.testing.assert_close(found.features, torch.stack(features), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.targets, targets)
        assert found.channels.tolist() == channels
        assert [s.tolist() for s in found.selected] == [s.tolist() for s in selected]
        assert found.flops == pytest.approx(np.mean(costs), rel=1e-12)
        assert found.resolution == (16, 16)


def test_the_dense_path_has_the_dense_figures():
    backbone, (images, _) = tiny_backbone(), digit_tensors(VAL)
    found = extract(backbone, loader(images), "dense")
    with torch.no_grad():
        torch.testing.assert_close(found.features, backbone(images), rtol=1e-4, atol=1e-5)
    assert found.flops == flops_by_hand(None)
    assert (found.channels, found.selected) == (None, ())


def test_without_a_path_the_default_one_is_taken():
    backbone, (images, _) = tiny_backbone(path="gated"), digit_tensors(VAL)
    found, expected = (extract(backbone, loader(images), path) for path in (None, "gated"))
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.channels, expected.channels)


@pytest.mark.parametrize("training", [True, False])
def test_a_backbone_is_left_as_it_was(training):
    backbone, (images, _) = tiny_backbone().train(training), digit_tensors(VAL)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    found = extract(backbone, loader(images), "gated")

    def damaged():
        yield images[:2], torch.zeros(2)
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 (what reading an image raises)
        extract(backbone, damaged(), "gated")
    assert all(module.training is training for module in backbone.modules())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    again = extract(backbone.eval(), loader(images), "gated")
    assert torch.equal(again.features, found.features)


# The images of an evaluation


def first_batch(cfg, splits=("val",)):
    prepared = prepare_evaluation(cfg, "knn", (), splits)
    return prepared, next(iter(prepared.loaders[splits[0]]))[0]


def test_the_pre_training_s_images_are_the_default(trained):
    cfg = evaluation_config("knn", trained.checkpoint)
    prepared, images = first_batch(cfg, ("val", "train"))
    assert [len(prepared.loaders[split].dataset) for split in ("val", "train")] == [31, 96]
    expected = torch.from_numpy(digits(VAL)[0]).permute(0, 3, 1, 2) / 255
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    expected = torchvision.transforms.functional.normalize(expected, mean, std)
    torch.testing.assert_close(images, expected)
    assert prepared.folder.parent == trained.checkpoint.parent / "evaluation"
    assert prepared.folder.name.startswith("knn-custom-")


def test_images_of_another_data_set_have_its_size_and_normalisation(dual, tmp_path):
    """Grey squares of 20 pixels; solo-learn shows CIFAR-10 at 32."""
    squares = np.arange(12, dtype=np.uint8)[:, None, None, None] * 20
    squares = np.broadcast_to(squares, (12, 20, 20, 3))
    file = write_arrays(tmp_path / "cifar.npz", squares, np.arange(12) % 10)
    overrides = ["dataset=cifar10", "data.format=npz", "data.num_workers=0"]
    overrides += [f"data.{split}_path={file}" for split in ("train", "val")]
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    grey = torch.arange(12) * 20 / 255
    expected = (grey[:, None] - mean) / std
    for size in (32, 24):
        crop = [] if size == 32 else [f"crop_size={size}"]
        cfg = evaluation_config("knn", dual.checkpoint, *overrides, *crop)
        prepared, images = first_batch(cfg)
        assert images.shape == (12, 3, size, size)
        torch.testing.assert_close(images.amin(dim=(2, 3)), expected)
        torch.testing.assert_close(images.amax(dim=(2, 3)), expected)
        assert prepared.folder.name.startswith("knn-cifar10-")
    metrics = evaluate_knn(evaluation_config("knn", dual.checkpoint, *overrides))
    assert metrics["data"] == {
        "dataset": "cifar10",
        "train_images": 12,
        "val_images": 12,
        "resolution": [32, 32],
    }
    assert metrics["pretraining"]["dataset"] == "custom"


def test_stl10_s_labelled_part_is_evaluated(dual, monkeypatch):
    """Not the unlabelled one, which its pre-training config names."""
    opened = []

    def stl10(root, split, download, transform):
        opened.append(split)
        return [(transform(Image.new("RGB", (96, 96))), 0)]

    monkeypatch.setattr(torchvision.datasets, "STL10", stl10)
    cfg = evaluation_config("knn", dual.checkpoint, "dataset=stl10", "data.num_workers=0")
    _, images = first_batch(cfg, ("train", "val"))
    assert opened == ["train", "test"]
    assert images.shape == (1, 3, 96, 96)


@pytest.mark.parametrize("key", ["train_path", "val_path"])
def test_images_of_another_data_set_need_their_paths(key, dual):
    paths = {"train_path": "train.npz", "val_path": "val.npz"}
    data = {"dataset": "cifar10", "format": "npz", **paths}
    del data[key]
    cfg = evaluation_config("knn", dual.checkpoint)
    OmegaConf.set_struct(cfg, False)
    cfg.data = data
    assert_refused(lambda: prepare_evaluation(cfg, "knn", (), ("val",)), f"data.{key}: missing")


@nothing_twice()
def test_results_of_the_same_settings_share_a_folder(dual):
    def folder(*overrides):
        cfg = evaluation_config("knn", dual.checkpoint, *overrides)
        return prepare_evaluation(cfg, "knn", ("k", "distance"), ("val",)).folder

    same = {
        folder(*overrides)
        for overrides in ([], ["batch_size=3"], ["path=dense"], ["seed=1"], ["data.num_workers=1"])
    }
    assert len(same) == 1
    others = [
        ["threshold=0.1"],
        ["k=3"],
        ["features=projector"],
        ["crop_size=20"],
        [f"data.val_path={dual.folder / 'train.npz'}"],
    ]
    assert len(same | {folder(*overrides) for overrides in others}) == 1 + len(others)
    assert folder("output=elsewhere") == Path("elsewhere")


def test_a_folder_of_results_belongs_to_one_run(dual, plain, tmp_path):
    evaluate_knn(evaluation_config("knn", dual.checkpoint, f"output={tmp_path}"))
    before = (tmp_path / "metrics.json").read_bytes()
    other = evaluation_config("knn", plain.checkpoint, f"output={tmp_path}")
    assert_refused(
        lambda: evaluate_knn(other), "output: got", str(dual.checkpoint), "another folder"
    )
    assert (tmp_path / "metrics.json").read_bytes() == before
    moved = tmp_path / "elsewhere" / dual.folder.name
    shutil.copytree(dual.folder, moved)
    own = evaluation_config("knn", moved / "last.ckpt", f"output={tmp_path}")
    assert evaluate_knn(own)["pretraining"]["checkpoint"] == str(moved / "last.ckpt")


def test_a_run_whose_folder_was_renamed_keeps_its_results(dual, tmp_path):
    shutil.copytree(dual.folder, tmp_path / "before")
    evaluate_knn(evaluation_config("knn", tmp_path / "before/last.ckpt", "path=dense"))
    (tmp_path / "before").rename(tmp_path / "now")
    found = evaluate_knn(evaluation_config("knn", tmp_path / "now/last.ckpt", "path=gated"))
    assert {"dense", "gated"} <= found.keys()


def test_two_evaluations_at_once_lose_no_path(dual, tmp_path, monkeypatch):
    """Each reads what is there, and writes it with its own path, while the other waits."""
    options = ["data.num_workers=0", f"output={tmp_path}"]
    first, second = (
        prepare_evaluation(evaluation_config("knn", dual.checkpoint, *options), "knn", (), ("val",))
        for _ in range(2)
    )
    read, started = evaluation._metrics_before, threading.Event()
    other = threading.Thread(target=second.write, args=({"gated": {"knn_top1": 2.0}}, 0))

    def slowly(file):
        before = read(file)
        if not started.is_set():
            started.set()
            other.start()
            other.join(timeout=0.3)
        return before

    monkeypatch.setattr(evaluation, "_metrics_before", slowly)
    first.write({"dense": {"knn_top1": 1.0}}, 0)
    other.join()
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert (found["dense"], found["gated"]) == ({"knn_top1": 1.0}, {"knn_top1": 2.0})


# The commands

EVALUATIONS = {
    main_linear: {
        "linear",
        *(f"linear_{d}" for d in ("cifar10", "cifar100", "imagenet100", "stl10")),
    },
    main_knn: {"knn"},
    main_policy: {"policy"},
    main_umap: {"umap"},
}


@pytest.mark.parametrize("module", EVALUATIONS)
def test_help_explains_an_evaluation_and_lists_its_configs(module, call):
    code, stdout, _ = call(module, "--help")
    assert code == 0
    explanation, _, configs = stdout.partition("\nconfigs:\n")
    assert explanation.strip() == explanation_of(module)
    assert f"python -m {module.__name__} checkpoint=PATH/last.ckpt" in explanation
    assert set(configs.split()) == EVALUATIONS[module]


def test_help_of_pre_training_lists_no_evaluation(call):
    _, stdout, _ = call(main_pretrain, "--help")
    configs = set(stdout.partition("\nconfigs:\n")[2].split())
    assert "vicreg_dual_cifar100" in configs
    assert not configs & set().union(*EVALUATIONS.values())


@pytest.mark.parametrize("module", EVALUATIONS)
def test_without_a_checkpoint_an_evaluation_asks_for_one(module, call, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "solo_gating.evaluate.tasks.umap.load_umap", lambda: None
    )  # it need not be installed
    code, _, stderr = call(module)
    assert code == 2
    assert stderr.startswith("error: checkpoint: missing")
    assert len(stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line(call, tmp_path):
    assert call(main_knn, "checkpoint=nowhere.ckpt") == (
        2,
        "",
        "error: checkpoint: 'nowhere.ckpt' is not a file\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_flops_of_a_checkpoint_need_no_config(dual, call, tmp_path):
    """Measured on the validation images of its run, as its own evaluation is."""
    code, stdout, stderr = call(main_flops, f"checkpoint={dual.checkpoint}", "flops.images=31")
    assert code == 0, stderr
    found = json.loads((tmp_path / "outputs/flops/tiny/metrics.json").read_text())
    cfg = evaluation_config("knn", dual.checkpoint, f"output={tmp_path / 'knn'}", "path=gated")
    assert found["flops"]["gated"] == pytest.approx(evaluate_knn(cfg)["gated"]["flops"])
    assert "measured on 31 images" in stdout
    (dual.folder / "val.npz").rename(dual.folder / "elsewhere.npz")
    typed = ("--flops.checkpoint", str(dual.checkpoint), "name=other")
    code, stdout, stderr = call(main_flops, *typed)
    (dual.folder / "elsewhere.npz").rename(dual.folder / "val.npz")
    assert code == 0, stderr
    assert "at the target budget 0.5" in stdout
    assert "data.val_path is null" in stderr


def test_flops_of_a_checkpoint_without_its_config_are_refused(dual, call, tmp_path):
    shutil.copy(dual.checkpoint, tmp_path / "alone.ckpt")
    code, _, stderr = call(main_flops, "checkpoint=alone.ckpt")
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("error: checkpoint: there is no args.json beside 'alone.ckpt'")
