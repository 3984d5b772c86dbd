"""The channel policy and the dial: against counts by hand, and what the command writes."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from solo_gating import InputError, main_policy
from solo_gating.evaluate.calibrate import Setting, calibrate, lowest_share, mean_share, sweep
from solo_gating.evaluate.extract import extract
from solo_gating.evaluate.policy import policy_of
from solo_gating.files import write_json
from solo_gating.main_knn import evaluate_knn
from solo_gating.main_policy import evaluate_policy
from solo_gating.plots.policy import draw_policy
from solo_gating.plots.sweeps import draw_sweeps
from solo_gating.policies import read_policy
from solo_gating.report.records import read_records

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

DENSE = flops_by_hand(None)
LOWEST = flops_by_hand([0] * 8) / DENSE


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with nothing_twice():
        yield


def policy_on(backbone, images, targets):
    found = extract(backbone, loader(images, targets), "gated")
    return policy_of(backbone, found, "resnet18_gated", {"width": 4, "stem": "cifar"}, 0.3)


def masks_on(backbone, images):
    with torch.no_grad(), backbone.path("gated") as passes:
        backbone(images)
    return passes[-1].masks


def shares_by_hand(masks):
    """F^R / F^O of each image."""
    channels = torch.stack([mask.sum(dim=1) for mask in masks], dim=1)
    return np.array([flops_by_hand(image) / DENSE for image in channels])


# Counting


def test_counts_are_those_of_the_masks():
    backbone, (images, targets) = tiny_backbone(), digit_tensors(VAL)
    policy = policy_on(backbone, images, targets)
    masks = masks_on(backbone, images)
    assert [block.name for block in policy.blocks] == [
        f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)
    ]
    for block, mask in zip(policy.blocks, masks, strict=True):
        counts = [sum(int(image[channel]) for image in mask) for channel in range(mask.shape[1])]
        assert block.selected == counts
        assert block.channels == len(counts)
        assert block.always_on == sum(count == 31 for count in counts)
        assert block.always_off == sum(count == 0 for count in counts)
        assert block.input_dependent == sum(0 < count < 31 for count in counts)
        assert block.always_on + block.always_off + block.input_dependent == block.channels
        active = mask.numpy().mean(axis=1)
        assert block.active == pytest.approx(active.mean())
        assert block.active_std == pytest.approx(active.std())
    shares = shares_by_hand(masks)
    assert policy.share == pytest.approx(shares.mean())
    assert policy.share_std == pytest.approx(shares.std())
    assert sum(block.input_dependent for block in policy.blocks) > 10
    assert (policy.images, policy.resolution, policy.threshold) == (31, [16, 16], 0.0)
    assert policy.target_budget == 0.3


@pytest.mark.parametrize("name", ["resnet18_gated", "resnet18_two_encoders"])
def test_the_share_is_that_of_the_extraction_s_flops(name):
    backbone, (images, targets) = tiny_backbone(name), digit_tensors(VAL)
    backbone.threshold = 0.2
    found = extract(backbone, loader(images, targets), "gated")
    policy = policy_of(backbone, found, name, {}, None)
    assert policy.share == pytest.approx(found.flops / DENSE)
    assert policy.threshold == 0.2


def test_gates_that_always_decide_the_same_are_counted_so():
    backbone, (images, targets) = tiny_backbone(), digit_tensors(VAL)
    on, off, half, threshold = (backbone.gated_blocks[index].gate for index in (0, 1, 2, 3))
    nn.init.zeros_(on.expand.weight)  # logits of 0
    for gate in (off, half):
        nn.init.constant_(gate.norm.bias, 100.0)  # every hidden unit is positive
        nn.init.constant_(gate.expand.weight, -1.0)
    half.expand.weight.data[:3] = 1.0
    threshold.threshold = math.inf
    policy = policy_on(backbone, images, targets)
    kinds = [(b.always_on, b.input_dependent, b.always_off) for b in policy.blocks[:4]]
    assert kinds == [(4, 0, 0), (0, 0, 4), (3, 0, 5), (0, 0, 8)]
    assert [b.active for b in policy.blocks[:4]] == [1, 0, 3 / 8, 0]
    assert [b.active_std for b in policy.blocks[:4]] == [0, 0, 0, 0]


def test_classes_make_up_the_whole():
    backbone, (images, targets) = tiny_backbone(), digit_tensors(VAL)
    targets[:5] = -1  # these belong to no class
    policy = policy_on(backbone, images, targets)
    masks = masks_on(backbone, images)
    shares = shares_by_hand(masks)
    assert [row["label"] for row in policy.classes] == sorted(set(targets[5:].tolist()))
    for row in policy.classes:
        mine = (targets == row["label"]).numpy()
        assert row["images"] == mine.sum()
        assert row["share"] == pytest.approx(shares[mine].mean())
        active = [mask.numpy()[mine].mean() for mask in masks]
        assert row["active"] == pytest.approx(active)
    images_of = [row["images"] for row in policy.classes]
    whole = np.average([row["share"] for row in policy.classes], weights=images_of)
    assert whole == pytest.approx(shares[5:].mean())
    assert len({row["share"] for row in policy.classes}) > 5


def test_images_without_labels_have_no_classes():
    images, _ = digit_tensors(VAL)
    assert policy_on(tiny_backbone(), images, torch.full((31,), -1)).classes == []


def test_a_single_image_has_a_policy():
    backbone, (images, targets) = tiny_backbone(), digit_tensors(VAL)
    policy = policy_on(backbone, images[:1], targets[:1])
    masks = masks_on(backbone, images[:1])
    assert policy.images == 1
    assert policy.share == pytest.approx(shares_by_hand(masks)[0])
    assert policy.share_std == 0
    for block, mask in zip(policy.blocks, masks, strict=True):
        assert block.selected == mask[0].tolist()
        assert (block.input_dependent, block.active_std) == (0, 0)


def test_the_dense_path_has_no_policy():
    backbone, (images, _) = tiny_backbone(), digit_tensors(VAL)
    found = extract(backbone, loader(images), "dense")
    assert_refused(lambda: policy_of(backbone, found, "x", {}, None), "path: got dense")


# The file and the picture


def test_a_policy_is_read_as_it_was_written(tmp_path):
    policy = policy_on(tiny_backbone(), *digit_tensors(VAL))
    file = tmp_path / "policy.json"
    write_json(file, policy.to_json())
    assert read_policy(file) == policy
    assert json.loads(file.read_text())["schema"] == "solo-gating policy 1"


def without(*keys):
    def change(content):
        place = content
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]
        return json.dumps(content)

    return change


def with_(**values):
    return lambda content: json.dumps(content | values)


def block_with(**values):
    def change(content):
        content["blocks"][0] |= values
        return json.dumps(content)

    return change


BAD_POLICIES = {
    "absent": (None, ["cannot read"]),
    "truncated": (lambda content: json.dumps(content)[:-40], ["cannot read"]),
    "binary": (lambda content: "\udcff", ["cannot read"]),
    "a list": (lambda content: "[1]", ["holds no JSON object"]),
    "foreign": (lambda content: '{"blocks": []}', ["is no policy", "policy.json"]),
    "of another version": (
        lambda content: json.dumps(content | {"schema": "solo-gating policy 2"}),
        ["is no policy"],
    ),
    "without blocks": (without("blocks"), ["is incomplete", "blocks"]),
    "without a share": (without("share"), ["is incomplete", "share"]),
    "block without channels": (without("blocks", 0, "channels"), ["is incomplete", "channels"]),
    "with more": (lambda content: json.dumps(content | {"x": 1}), ["'x'"]),
    "fewer counts than channels": (block_with(selected=[0, 0, 0]), ["selected: got [0, 0, 0]"]),
    "a count of more images": (block_with(selected=[4] * 4), ["selected: got [4,", "0 to 3"]),
    "a count below 0": (block_with(selected=[-1] * 4), ["selected: got [-1"]),
    "counts that are texts": (block_with(selected=["1"] * 4), ["selected: got ['1'"]),
    "a count and a half": (block_with(selected=[1.5] * 4), ["selected: got [1.5"]),
    "truths for counts": (block_with(selected=[True] * 4), ["selected: got [True"]),
    "a text for channels": (block_with(channels="4"), ["channels: got '4'"]),
    "other sums": (
        block_with(selected=[3] * 4, always_on=1),
        ["always_on: got 1, expected 4"],
    ),
    "a threshold that is NaN": (with_(threshold=float("nan")), ["threshold: got nan"]),
    "a text for the threshold": (with_(threshold="0"), ["threshold: got '0'"]),
    "a budget of 2": (with_(budget=2), ["budget: got 2"]),
    "no images": (with_(images=0), ["images: got 0"]),
    "one side": (with_(resolution=[16]), ["resolution: got [16]"]),
    "no blocks": (with_(blocks=[]), ["blocks: got none"]),
    "blocks are numbers": (lambda content: json.dumps(content | {"blocks": [1]}), ["incomplete"]),
}


@pytest.mark.parametrize("kind", BAD_POLICIES)
def test_what_is_no_policy_is_refused(kind, tmp_path):
    change, parts = BAD_POLICIES[kind]
    file = tmp_path / "policy.json"
    if change:
        content = policy_on(tiny_backbone(), *digit_tensors(slice(3))).to_json()
        file.write_bytes(change(content).encode(errors="surrogateescape"))
    assert_refused(lambda: read_policy(file, "export.policy"), "export.policy: ", str(file), *parts)


def picture(file):
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_picture_shows_the_three_kinds(tmp_path):
    """Each kind's colour has its share of the bars' area."""
    policy = policy_on(tiny_backbone(), *digit_tensors(VAL))
    draw_policy(policy, tmp_path / "policy.png", "title")
    pixels = picture(tmp_path / "policy.png")
    height, width, _ = pixels.shape
    assert 400 < height < 1500
    assert 800 < width < 2500
    colours = {"always_on": 0x0072B2, "input_dependent": 0xE69F00, "always_off": 0xDDDDDD}
    areas = {
        kind: (pixels == [colour >> 16, colour >> 8 & 255, colour & 255]).all(axis=2).sum()
        for kind, colour in colours.items()
    }
    for kind in colours:
        expected = np.mean([getattr(b, kind) / b.channels for b in policy.blocks])
        assert areas[kind] / sum(areas.values()) == pytest.approx(expected, abs=0.06), kind


# The dial


def wide_backbone():
    """Of width 8: enough channels for small steps."""
    return tiny_backbone(width=8)


@pytest.fixture(scope="module")
def images():
    return digit_tensors(slice(300, 332))[0]


@pytest.fixture(scope="module")
def settings(images):
    """The dial's positions for some shares, from low to high, at a threshold that is not 0."""
    backbone = wide_backbone()
    backbone.threshold = 0.37
    found = {share: calibrate(backbone, images, share) for share in (0.15, 0.3, 0.6, 1.0)}
    assert backbone.threshold == 0.37
    return found


def test_the_dial_reaches_the_shares_that_are_asked_for(settings, images):
    backbone, dense = wide_backbone(), flops_by_hand(None, width=8)
    for share, setting in settings.items():
        assert setting.share == pytest.approx(share, abs=0.002)
        backbone.threshold = setting.threshold
        channels = torch.stack([mask.sum(dim=1) for mask in masks_on(backbone, images)], dim=1)
        used = np.mean([flops_by_hand(image, width=8) for image in channels])
        assert used / dense == pytest.approx(setting.share)


def test_a_higher_threshold_uses_less(settings):
    thresholds = [setting.threshold for setting in settings.values()]
    assert thresholds == sorted(thresholds, reverse=True)
    assert len(set(thresholds)) == len(thresholds)


def test_the_share_is_measured_in_evaluation_mode_and_the_mode_is_put_back(images):
    backbone = wide_backbone()
    expected = mean_share(backbone, images)
    for training in (True, False):
        before = {k: v.clone() for k, v in backbone.train(training).state_dict().items()}
        assert mean_share(backbone, images) == expected
        assert all(module.training is training for module in backbone.modules())
        assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    twice = images.repeat(5, 1, 1, 1)  # more than one batch
    assert mean_share(backbone.eval(), twice) == pytest.approx(expected)


def test_without_any_channel_the_fixed_parts_remain():
    assert lowest_share(tiny_backbone(), (16, 16)) == pytest.approx(LOWEST)
    backbone, (images, _) = tiny_backbone(), digit_tensors(VAL)
    backbone.threshold = math.inf
    assert mean_share(backbone, images) == pytest.approx(LOWEST)


@pytest.mark.parametrize("share", [0.01, 0.0, 1.01])
def test_a_share_that_no_threshold_gives_is_refused(share):
    backbone, (images, _) = tiny_backbone(), digit_tensors(VAL)
    backbone.threshold = 0.25
    assert_refused(
        lambda: calibrate(backbone, images, share),
        f"calibrate: got {share}",
        f"from {LOWEST:.4f}",
        "to 1",
    )
    assert backbone.threshold == 0.25


def test_where_no_threshold_gives_the_share_the_nearest_is_returned():
    """Gates that treat all channels and images alike know all or nothing."""
    backbone, (images, _) = tiny_backbone(), digit_tensors(slice(4))
    for block in backbone.gated_blocks:
        nn.init.zeros_(block.gate.expand.weight)
    setting = calibrate(backbone, images, 0.3)
    assert setting.share == pytest.approx(LOWEST)
    assert setting.threshold > 0


@pytest.fixture
def calibrated(monkeypatch):
    """What is asked of the dial, which does nothing and says that it has found a threshold."""
    asked = []

    def fake(backbone, images, share, budget=None):
        asked.append((images, share))
        return Setting(1 - 2 * share, share + 0.01)

    for module in ("evaluate.calibrate", "evaluate.tasks.policy"):
        monkeypatch.setattr(f"solo_gating.{module}.calibrate", fake)
    return asked


def test_a_sweep_has_its_points_in_order_and_the_own_one_among_them(calibrated, images):
    backbone = tiny_backbone()
    backbone.threshold = 0.37
    share = mean_share(backbone, images)

    def evaluate():
        return {"figure": -backbone.threshold}

    points = sweep(backbone, images, [0.5, 0.9, 0.2], evaluate)
    assert backbone.threshold == 0.37
    expected = [(0.2, 0.6, 0.21), (None, 0.37, share), (0.5, 0.0, 0.51), (0.9, -0.8, 0.91)]
    for point, (asked, threshold, reached) in zip(points, expected, strict=True):
        assert point == {
            "asked": asked,
            "threshold": pytest.approx(threshold),
            "calibrated_share": pytest.approx(reached),
            "figure": pytest.approx(-threshold),
        }


def test_a_sweep_that_fails_puts_the_threshold_back(images):
    backbone = wide_backbone()

    def evaluate():
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 (what reading an image raises)
        sweep(backbone, images[:4], [], evaluate)
    assert backbone.threshold == 0


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return save_run(run_config(folder, backbone={"kwargs": {"width": 8}}), folder)


def policy_config(run, *overrides):
    return evaluation_config("policy", run.checkpoint, *overrides)


def test_the_policy_of_a_checkpoint_is_written(run, tmp_path):
    metrics = evaluate_policy(policy_config(run, f"output={tmp_path}"))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert {file.name for file in tmp_path.iterdir()} == {
        "metrics.json",
        "policy.json",
        "policy.csv",
        "policy.png",
    }
    policy = read_policy(tmp_path / "policy.json")
    assert policy.backbone["name"] == "resnet18_gated"
    assert policy.backbone["kwargs"]["width"] == 8
    assert (policy.images, policy.threshold, policy.target_budget) == (31, 0, 0.5)
    assert sum(row["images"] for row in policy.classes) == 31
    with (tmp_path / "policy.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    for row, block in zip(rows, policy.blocks, strict=True):
        assert row["name"] == block.name
        assert int(row["always_on"]) == block.always_on
        assert float(row["active"]) == block.active
    row = metrics["gated"]
    assert row["share"] == policy.share == pytest.approx(1 - row["flops_cut"])
    assert "calibrated_share" not in row
    assert picture(tmp_path / "policy.png").std() > 10


def test_a_calibrated_policy_has_the_share_that_was_asked_for(run, tmp_path):
    metrics = evaluate_policy(policy_config(run, "calibrate=0.4", f"output={tmp_path}"))
    row, policy = metrics["gated"], read_policy(tmp_path / "policy.json")
    assert row["calibrated_share"] == pytest.approx(0.4, abs=0.002)
    assert policy.share == row["share"] == pytest.approx(0.4, abs=0.05)
    assert policy.threshold == row["threshold"] != 0
    assert metrics["data"]["train_images"] == 96
    # Another evaluation with that threshold uses as much.
    override = f"threshold={policy.threshold}"
    knn = evaluate_knn(evaluation_config("knn", run.checkpoint, override, "path=gated"))
    assert knn["gated"]["flops"] == pytest.approx(row["flops"])


def test_calibration_images_are_spread_over_the_set_and_need_no_labels(run, calibrated, tmp_path):
    file = write_arrays(tmp_path / "unlabelled.npz", digits(slice(50))[0])
    overrides = [f"data.train_path={file}", "calibration_images=10"]
    metrics = evaluate_policy(policy_config(run, "calibrate=0.5", *overrides))
    assert metrics["data"]["train_images"] == 10
    expected = torch.from_numpy(digits(slice(0, 50, 5))[0]).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (expected - mean[:, None, None]) / std[:, None, None]
    ((images, share),) = calibrated
    torch.testing.assert_close(images, expected)
    assert share == 0.5
    assert metrics["gated"]["calibrated_share"] == 0.51


def test_a_sweep_is_written_and_drawn(run, tmp_path, capsys):
    overrides = ["sweep=true", "shares=[0.01,0.2,0.8]", "calibration_images=32"]
    metrics = evaluate_policy(policy_config(run, *overrides, f"output={tmp_path}"))
    assert "shares below" in capsys.readouterr().out
    points = metrics["gated"]["sweep"]
    assert [point["asked"] for point in points if point["asked"] is None] == [None]
    assert sorted(point["asked"] or 0 for point in points) == [0, 0.2, 0.8]
    shares = [point["share"] for point in points]
    assert shares == sorted(shares)
    dense = flops_by_hand(None, width=8)
    for point in points:
        assert point["flops"] == pytest.approx(point["share"] * dense)
        knn = evaluate_knn(
            evaluation_config(
                "knn", run.checkpoint, f"threshold={point['threshold']}", "path=gated"
            )
        )
        assert point["knn_top1"] == pytest.approx(knn["gated"]["knn_top1"])
    with (tmp_path / "sweep.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["share"]) for row in rows] == shares
    assert [row["asked"] for row in rows].count("") == 1
    own = next(point for point in points if point["asked"] is None)
    assert own["threshold"] == metrics["gated"]["threshold"] == 0
    assert own["share"] == pytest.approx(metrics["gated"]["share"])
    knn = evaluate_knn(evaluation_config("knn", run.checkpoint, "path=dense"))
    assert metrics["dense"] == {key: knn["dense"][key] for key in ("knn_top1", "flops")}
    assert picture(tmp_path / "sweep.png").std() > 10


def test_a_sweep_stays_where_its_settings_are_evaluated_without_it(run, tmp_path):
    options = ("calibration_images=32", f"output={tmp_path}")
    swept = evaluate_policy(policy_config(run, "sweep=true", "shares=[0.2]", *options))
    again = evaluate_policy(policy_config(run, *options))
    assert again["gated"]["sweep"] == swept["gated"]["sweep"]
    other = evaluate_policy(policy_config(run, "threshold=0.3", *options))
    assert "sweep" not in other["gated"]


def test_a_sweep_is_drawn_beside_its_rivals(run, tmp_path, monkeypatch):
    """The rivals are the run's own 1-NN table here: what a report of both would draw."""
    drawn = []
    monkeypatch.setattr(
        "solo_gating.evaluate.tasks.policy.draw_sweeps",
        lambda *found: drawn.append(found) or draw_sweeps(*found),
    )
    rivals = run.checkpoint.parent
    overrides = ["sweep=true", "shares=[0.5]", "calibration_images=32", f"beside=[{rivals}]"]
    evaluate_policy(policy_config(run, *overrides, f"output={tmp_path}"))
    ((sweeps, records),) = drawn
    assert tmp_path / "metrics.json" in [sweep.file for sweep in sweeps]
    assert records == read_records([rivals]).records
    assert picture(tmp_path / "sweeps.png").std() > 10


def test_the_command_s_flags_calibrate(run, calibrated, tmp_path, monkeypatch):
    checkpoint = f"checkpoint={run.checkpoint}"
    arguments = [checkpoint, "--calibrate", "0.3", f"output={tmp_path}", "accelerator=cpu"]
    monkeypatch.setattr("sys.argv", ["main_policy", *arguments])
    main_policy.main()
    assert [share for _, share in calibrated] == [0.3]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"]["calibrate"] == 0.3
    assert metrics["gated"]["threshold"] == pytest.approx(0.4)
    assert read_policy(tmp_path / "policy.json").threshold == metrics["gated"]["threshold"]
    assert not (tmp_path / "sweep.csv").exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("path=dense", ["path: got 'dense'", "expected gated"]),
        ("calibrate=0", ["calibrate: got 0", "a number in (0, 1] or null"]),
        ("calibrate=1.5", ["calibrate: got 1.5"]),
        ("calibrate=low", ["calibrate: got 'low'"]),
        ("beside=[x]", ["beside: got ['x'] with sweep=false"]),
        ("beside=3", ["beside: got 3", "a list of folders"]),
        ("sweep=perhaps", ["sweep: got 'perhaps'", "true or false"]),
        ("shares=[]", ["shares: got []", "a list of numbers in (0, 1]"]),
        ("shares=[0.3,2]", ["shares: got [0.3, 2]"]),
        ("shares=0.3", ["shares: got 0.3"]),
        ("calibration_images=0", ["calibration_images: got 0"]),
    ],
)
def test_a_mistake_is_found_before_anything_is_read(override, parts):
    cfg = evaluation_config("policy", "nowhere.ckpt", override)
    assert_refused(lambda: evaluate_policy(cfg), *parts)


def test_a_share_below_what_the_network_needs_is_refused(run):
    lowest = flops_by_hand([0] * 8, width=8) / flops_by_hand(None, width=8)
    cfg = policy_config(run, "calibrate=0.02", "calibration_images=4")
    assert_refused(lambda: evaluate_policy(cfg), "calibrate: got 0.02", f"from {lowest:.4f}")


def test_a_network_without_gates_has_no_policy(tmp_path):
    plain = save_run(run_config(tmp_path, "vicreg"), tmp_path)
    assert_refused(lambda: evaluate_policy(policy_config(plain)), "path: got gated", "no gates")


def test_an_unlabelled_set_has_a_policy_and_no_sweep(run, tmp_path):
    file = write_arrays(tmp_path / "unlabelled.npz", digits(VAL)[0])
    data = f"data.val_path={file}"
    metrics = evaluate_policy(policy_config(run, data, f"output={tmp_path}"))
    assert 0 < metrics["gated"]["share"] < 1
    assert read_policy(tmp_path / "policy.json").classes == []
    cfg = policy_config(run, data, "sweep=true", "calibration_images=4")
    with pytest.raises(InputError, match=r"data.val_path: no image has a label"):
        evaluate_policy(cfg)
