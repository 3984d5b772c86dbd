"""Files that strangers wrote: odd args.json, damaged and senseless checkpoints."""

import collections
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchvision.models import resnet18

from solo_gating import InputError
from solo_gating.checkpoints.encoder import encoder_of
from solo_gating.checkpoints.reading import read_args, read_checkpoint
from solo_gating.deploy.dense import solo_learn_args
from solo_gating.evaluate.evaluation import evaluation_of, images_of, prepare_evaluation
from solo_gating.evaluate.extract import NonFiniteFeaturesError, extract
from solo_gating.evaluate.table import final_table, format_table
from solo_gating.evaluate.tasks import linear as linear_task
from solo_gating.main_knn import evaluate_knn
from solo_gating.main_linear import evaluate_linear
from solo_gating.main_umap import evaluate_umap

from .. import fuzz_strangers as fuzz
from ..support.encoders import (
    VAL,
    assert_refused,
    digit_tensors,
    digits,
    evaluation_config,
    loader,
    run_config,
    save_run,
    tiny_backbone,
    write_arrays,
)

KEY = "checkpoint: "
WEIGHT, COUNT = "backbone.layer1.0.conv1.weight", "backbone.bn1.num_batches_tracked"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return save_run(run_config(folder), folder)


@pytest.fixture
def copied(run, tmp_path):
    """The run's files in a folder of this test's own: its checkpoint, and its args."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("last.ckpt", "args.json"):
        shutil.copy(run.folder / name, folder)
    return folder / "last.ckpt", json.loads((folder / "args.json").read_text())


# args.json


def changed(args, place, value):
    *groups, name = place.split(".")
    for group in groups:
        args = args[int(group)] if isinstance(args, list) else args[group]
    args[name] = value


@pytest.mark.parametrize(
    "name", ["${oc.env:FUZZ_SECRET}", "${data.dataset}", r"\${x}", r"a\\${oc.env:X}\$", "${", "$x"]
)
def test_an_interpolation_in_an_args_json_is_text(name, copied, monkeypatch, tmp_path):
    monkeypatch.setenv("FUZZ_SECRET", fuzz.SECRET)
    checkpoint, args = copied
    args |= {"name": name, "method_kwargs": {"x": [name]}}
    changed(args, "data.val_path", "${oc.env:FUZZ_SECRET}")
    (checkpoint.parent / "args.json").write_text(json.dumps(args))
    encoder = encoder_of(checkpoint)
    found = encoder.description()
    assert found["name"] == name
    assert found["method_kwargs"] == {"x": [name]}
    assert OmegaConf.to_container(encoder.args, resolve=True)["name"] == name
    with pytest.raises(ValueError, match="width 4"):  # 64 would be written out
        solo_learn_args(encoder)
    cfg = evaluation_config("knn", checkpoint, f"data.val_path={tmp_path / 'absent.npz'}")
    assert_refused(lambda: prepare_evaluation(cfg, "knn", ("k",), ("val",)), "absent.npz")
    assert cfg.data.val_path == str(tmp_path / "absent.npz")


@pytest.mark.parametrize("key", ["name", "method", "backbone.name", "data.dataset", "data.format"])
@pytest.mark.parametrize("head", ["backbone", "projector"])
def test_whatever_an_args_json_holds_a_sentence_is_short(key, head, copied):
    checkpoint, args = copied
    changed(args, key, "a" * 10_000)
    changed(args, "data.val_path", "b" * 10_000)
    (checkpoint.parent / "args.json").write_text(json.dumps(args))
    cfg = evaluation_config("knn", checkpoint, f"features={head}")
    with pytest.raises(InputError) as error:
        prepare_evaluation(cfg, "knn", ("k",), ("val",))
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("given", ["${oc.env:FUZZ_SECRET}", "/${data.dataset}/x.npz", r"\${seed}"])
@pytest.mark.parametrize("several", [False, True])
def test_paths_in_an_args_json_are_text(given, several, copied, monkeypatch):
    """Also where an evaluation takes them over."""
    monkeypatch.setenv("FUZZ_SECRET", fuzz.SECRET)
    checkpoint, args = copied
    changed(args, "data.val_path", [given] if several else given)
    (checkpoint.parent / "args.json").write_text(json.dumps(args))
    cfg = evaluation_config("knn", checkpoint)
    assert_refused(lambda: prepare_evaluation(cfg, "knn", ("k",), ("val",)), repr(given))


def test_a_file_s_name_is_no_interpolation(copied, monkeypatch):
    monkeypatch.setenv("FUZZ_SECRET", fuzz.SECRET)
    checkpoint, _ = copied
    odd = checkpoint.rename(checkpoint.parent / "it's ${oc.env:FUZZ_SECRET}=[x].ckpt")
    evaluation = evaluation_of(odd, ["accelerator=cpu"], ("val",))
    assert evaluation.encoder.checkpoint == odd


ODD_ARGS = {
    "a list for a group": ("backbone", [1], ["backbone: got [1]", "a group"]),
    "a number for a group": ("method_kwargs", 5, ["method_kwargs: got 5", "a group"]),
    "null for a needed one": ("backbone.name", None, ["lacks backbone.name"]),
    "what is missing": ("data.dataset", "???", ["lacks data.dataset"]),
    "a number for a name": ("backbone.name", 18, ["backbone.name: got 18", "text"]),
    "a list for a name": ("name", ["x"], ["name: got ['x']", "text"]),
    "a text for a number": ("data.num_classes", "10", ["data.num_classes: got '10'"]),
    "a truth for a number": ("data.num_classes", True, ["data.num_classes: got True"]),
    "an interpolation for a number": (
        "data.num_classes",
        "${oc.env:FUZZ_SECRET}",
        ["data.num_classes: got '${oc.env:FUZZ_SECRET}'"],
    ),
    "no classes": ("data.num_classes", 0, ["data.num_classes: got 0"]),
    "a number for a path": ("data.val_path", 3, ["data.val_path: got 3", "a path"]),
    "views of nothing": ("augmentations", [], ["augmentations: got []"]),
    "views that are texts": ("augmentations", ["x"], ["augmentations: got ['x']"]),
    "images of 10⁹ pixels": ("augmentations.0.crop_size", 10**9, ["crop_size: got 1000000000"]),
    "a text for a mean": ("augmentations.0.mean", ["a", "b", "c"], ["mean: got ['a'"]),
    "no deviation": ("augmentations.0.std", [0, 1, 1], ["std: got [0, 1, 1]"]),
    "NaN": ("optimizer.lr", float("nan"), ["optimizer.lr: got nan", "a finite number"]),
    "a number of 400 digits": ("seed", 10**400, ["seed: got 1000", "…"]),
    "an unknown path": ("gating.views", ["open"], ["gating.views: got ['open']"]),
    "a share of 5": ("gating.target_budget", 5, ["gating.target_budget: got 5"]),
    "an unknown argument": ("backbone.kwargs", {"depth": 3}, ["describes no network", "depth"]),
    "a text for a width": ("backbone.kwargs.width", "x", ["width: got 'x'"]),
    "a width of 10¹²": ("backbone.kwargs.width", 10**12, []),
    "a width of 10⁴": ("backbone.kwargs.width", 10**4, ["another architecture"]),
    "weights from elsewhere": ("backbone.kwargs.weights", "DEFAULT", ["kwargs.weights: got"]),
    "a file to read": ("backbone.kwargs", {"pretrained_cfg": {"file": "x"}}, ["pretrained_cfg"]),
    "a folder as data set": ("data.dataset", "x/../../../x", ["data.dataset: got 'x/../"]),
    "a number for workers": ("data.num_workers", -1, ["data.num_workers: got -1"]),
    "a text for a truth": ("data.no_labels", "no", ["data.no_labels: got 'no'"]),
}


@pytest.mark.parametrize("kind", ODD_ARGS)
def test_an_odd_args_json_is_refused_by_its_key(kind, copied):
    checkpoint, args = copied
    place, value, parts = ODD_ARGS[kind]
    changed(args, place, value)
    (checkpoint.parent / "args.json").write_text(json.dumps(args))
    cfg = evaluation_config("knn", checkpoint)
    assert_refused(lambda: prepare_evaluation(cfg, "knn", ("k",), ("val",)), *parts)
    assert sorted(file.name for file in checkpoint.parent.iterdir()) == ["args.json", "last.ckpt"]


TEXTS = {
    "not UTF-8": (lambda text: text.encode("utf-16"), ["it is not UTF-8"]),
    "twice": (lambda text: b'{"seed": 1, ' + text[1:].encode(), ["the key 'seed' is", "twice"]),
    "large": (lambda text: text.encode() + b" " * 2**24, ["bytes, expected at most"]),
    "deep": (lambda text: b"[" * 100_000, ["nested too deeply"]),
    "deep, and whole": (
        lambda text: b'{"x": ' + b"[" * 400 + b"]" * 400 + b"}",
        ["nested too deeply"],
    ),
    "digits": (lambda text: b'{"x": ' + b"9" * 5000 + b"}", ["too many digits"]),
    "cut": (lambda text: text[:50].encode(), ["as JSON"]),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_an_args_json_that_is_no_json_is_refused(kind, run, tmp_path):
    change, parts = TEXTS[kind]
    file = tmp_path / "args.json"
    file.write_bytes(change((run.folder / "args.json").read_text()))
    assert_refused(lambda: read_args(file, "key"), "key: ", str(file), *parts)


def test_a_byte_order_mark_does_no_harm(run, tmp_path):
    whole = (run.folder / "args.json").read_bytes()
    file = tmp_path / "args.json"
    file.write_bytes(b"\xef\xbb\xbf" + whole)
    assert read_args(file, "key") == read_args(run.folder / "args.json", "key")


def test_a_pipe_is_no_args_json(tmp_path):
    os.mkfifo(tmp_path / "args.json")
    assert_refused(lambda: read_args(tmp_path / "args.json", "key"), "no regular file")


def test_fuzzed_args_json(run, copied, monkeypatch):
    monkeypatch.setenv("FUZZ_SECRET", fuzz.SECRET)
    checkpoint, args = copied
    cfg = evaluation_config("knn", checkpoint)
    found = collections.Counter(
        fuzz.outcome_of_args(cfg, checkpoint, fuzz.changed_args(args, seed)) for seed in range(15)
    )
    assert set(found) == {"sentence", "accepted"}, found


# Checkpoints


def test_damaged_checkpoints_are_refused(run, tmp_path):
    whole = run.checkpoint.read_bytes()
    state = read_checkpoint(run.checkpoint, "checkpoint")["state_dict"]
    found = collections.Counter(
        fuzz.outcome_of_checkpoint(tmp_path / "x.ckpt", fuzz.damaged(whole, seed), state)
        for seed in range(100)
    )
    assert set(found) <= {"sentence", "unchanged"}, found
    assert found["sentence"] > 75  # the others changed what is not read


def test_a_flipped_bit_of_a_weight_is_found(run, tmp_path):
    whole, file = run.checkpoint.read_bytes(), tmp_path / "x.ckpt"
    with zipfile.ZipFile(run.checkpoint) as archive:
        members = [m for m in archive.infolist() if "/data/" in m.filename and m.file_size > 500]
    for index, member in enumerate(members[:20]):
        start = whole.index(member.filename.encode()) + len(member.filename)
        content = bytearray(whole)
        content[start + 200 + index] ^= 1 << index % 8  # behind at most 64 bytes of padding
        file.write_bytes(content)
        assert_refused(lambda: read_checkpoint(file, "key"), "key: ", str(file), "checksum")


def test_a_file_without_checksums_can_be_read(run, tmp_path):
    content = torch.load(run.checkpoint, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "x.ckpt", "key")["epoch"] == content["epoch"]


def test_a_small_file_that_claims_to_be_large_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**7))
    assert_refused(lambda: read_checkpoint(tmp_path / "x.ckpt", "key"), "more than its size")


def of(name, change):
    return lambda content: content["state_dict"].update({name: change(content["state_dict"][name])})


def first_is(value):
    def change(weight):
        weight = weight.clone()
        weight.view(-1)[0] = value
        return weight

    return change


ODD_WEIGHTS = {
    "NaN": (of(WEIGHT, first_is(float("nan"))), [WEIGHT, "1 of 144 values", "NaN"]),
    "infinite": (of(WEIGHT, lambda w: w / 0), [WEIGHT, "144 of 144 values"]),
    "infinite in float32": (of(WEIGHT, lambda w: w.double() * 1e300), [WEIGHT, "in torch.float32"]),
    "complex": (of(WEIGHT, lambda w: w.cfloat()), [WEIGHT, "torch.complex64", "torch.bfloat16"]),
    "bool": (of(WEIGHT, lambda w: w > 0), [WEIGHT, "torch.bool"]),
    "integers": (of(WEIGHT, lambda w: w.long()), [WEIGHT, "torch.int64"]),
    "float8": (of(WEIGHT, lambda w: w.to(torch.float8_e4m3fn)), [WEIGHT, "float8"]),
    "a count in float": (of(COUNT, lambda n: n.float()), [COUNT, "torch.float32"]),
    "a variance below 0": (
        of("backbone.bn1.running_var", lambda v: -v),
        ["bn1.running_var", "variances below 0"],
    ),
    "sparse": (of(WEIGHT, lambda w: w.to_sparse()), [WEIGHT, "sparse_coo", "a dense tensor"]),
    "quantised": (
        of(WEIGHT, lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
        [WEIGHT, "quantized"],
    ),
    "meta": (of(WEIGHT, lambda w: w.to("meta")), [WEIGHT, "meta"]),
    "nested": (of(WEIGHT, lambda w: torch.nested.nested_tensor(list(w))), [WEIGHT, "nested"]),
    "one value for all": (
        of(WEIGHT, lambda w: torch.zeros(1).expand(w.shape)),
        [WEIGHT, "(4, 4, 3, 3)", "fewer values"],
    ),
    "10¹² values": (
        lambda content: content["state_dict"].update(x=torch.zeros(1).expand(10**12)),
        ["'x'", "fewer values"],
    ),
    "a list": (of(WEIGHT, lambda w: w.tolist()), [WEIGHT, "is a list"]),
    "a number as name": (
        lambda content: content["state_dict"].update({5: torch.zeros(1)}),
        ["the name 5"],
    ),
    "bare weights": (lambda content: resnet18().state_dict(), ["bare weights", "state_dict"]),
    "elsewhere": (
        lambda content: {"model": dict(content["state_dict"])},
        ["weights under 'model'", "expected a Lightning checkpoint"],
    ),
    "a text as epoch": (lambda content: content.update(epoch="6"), ["epoch: got '6'"]),
    "no number as epoch": (
        lambda content: content.update(epoch=float("nan")),
        ["epoch: got nan"],
    ),
}


@pytest.mark.parametrize("kind", ODD_WEIGHTS)
def test_senseless_weights_are_refused_by_their_name(kind, copied):
    change, parts = ODD_WEIGHTS[kind]
    checkpoint, _ = copied
    content = torch.load(checkpoint, weights_only=True)
    torch.save(change(content) or content, checkpoint)
    assert_refused(lambda: encoder_of(checkpoint), str(checkpoint), *parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(dtype, copied, run):
    checkpoint, _ = copied
    content = torch.load(checkpoint, weights_only=True)
    for name, value in content["state_dict"].items():
        if value.is_floating_point():
            content["state_dict"][name] = value.to(dtype)
    torch.save(content, checkpoint)
    images = digit_tensors(VAL)[0]
    found = extract(encoder_of(checkpoint).backbone, loader(images), "gated")
    expected = extract(run.model.backbone, loader(images), "gated")
    assert found.features.dtype == torch.float32
    tolerance = {"rtol": 0.1, "atol": 0.1} if dtype != torch.float64 else {}
    if dtype != torch.bfloat16:  # in which some gates decide otherwise
        torch.testing.assert_close(found.features, expected.features, **tolerance)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_an_evaluation_computes_in_its_precision(precision, run, tmp_path):
    cfg = evaluation_config("knn", run.checkpoint, f"precision={precision}", f"output={tmp_path}")
    metrics = evaluate_knn(cfg)
    images = images_of(run.checkpoint, [], "val")  # normalised as in pre-training
    images, targets = map(list, zip(*images, strict=True))
    images, targets = torch.stack(images), torch.tensor(targets)
    expected = extract(run.model.backbone, loader(images, targets), "gated")
    whole = extract(run.model.backbone, loader(images, targets), "dense")
    cut = 1 - expected.flops / whole.flops
    near = 1e-9 if precision == "64-true" else 0.01  # in half precision some gates decide otherwise
    assert metrics["gated"]["flops_cut"] == pytest.approx(cut, abs=near)
    assert 0 <= metrics["dense"]["knn_top1"] <= 100


def test_the_final_table_takes_the_weights_precision():
    images, targets = digit_tensors(VAL)
    batches = loader(images, targets)
    net = tiny_backbone()
    expected = final_table(net, net, ("dense",), batches, batches, 1, 2)
    found = final_table(net.bfloat16(), tiny_backbone(), ("dense",), batches, batches, 1, 2)
    assert found["raw"] == expected["raw"]
    assert found["dense"]["flops"] == expected["dense"]["flops"]
    assert found["dense"]["knn_top1"] == pytest.approx(expected["dense"]["knn_top1"], abs=15)


# Figures that do not exist


def test_features_that_are_not_finite_give_no_figure(copied):
    checkpoint, _ = copied
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["backbone.layer4.1.bn2.weight"] *= 3e38  # finite, and too large
    content["state_dict"]["backbone.layer4.1.bn2.weight"].clamp_(-3e38, 3e38)
    content["state_dict"]["backbone.layer4.1.bn2.running_var"].zero_()
    torch.save(content, checkpoint)
    cfg = evaluation_config("knn", checkpoint, "path=dense")
    assert_refused(lambda: evaluate_knn(cfg), "of 96 images are infinite or NaN on the dense path")


def test_a_figure_that_does_not_exist_is_a_dash():
    images, targets = digit_tensors(VAL)
    labelled, unlabelled = loader(images, targets), loader(images, targets - 100)
    net, broken = tiny_backbone(), tiny_backbone()
    broken.bn1.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteFeaturesError):
        extract(broken, labelled, "dense")
    table = final_table(broken, net, ("dense", "gated"), labelled, labelled, 1, 2)
    assert table["dense"]["knn_top1"] is None
    assert table["untrained"]["knn_top1"] is not None
    assert format_table(table).splitlines()[3].split() == ["dense", "–", "–", "–", "–"]
    for train, test in ((labelled, unlabelled), (unlabelled, labelled)):
        table = final_table(net, net, ("dense",), train, test, 1, 2)
        assert {row["knn_top1"] for row in table.values()} == {None}
        assert table["dense"]["flops"] > 0


def test_more_neighbours_than_training_images_are_refused(run, tmp_path):
    cfg = evaluation_config("knn", run.checkpoint, "k=[1,97]", f"output={tmp_path / 'out'}")
    assert_refused(lambda: evaluate_knn(cfg), "k: got 97", "at most 96")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(("images", "options"), [(3, []), (9, []), (31, ["classes=1"])])
def test_too_few_images_for_umap_are_refused(images, options, run, tmp_path, monkeypatch):
    monkeypatch.setattr("solo_gating.evaluate.tasks.umap.load_umap", lambda: None)
    file = write_arrays(tmp_path / "few.npz", *(part[:images] for part in digits(VAL)))
    cfg = evaluation_config("umap", run.checkpoint, f"data.val_path={file}", *options)
    assert_refused(lambda: evaluate_umap(cfg), "data.val_path: got ", "at least 10 images")


@pytest.mark.parametrize("value", [1e9, float("nan"), "60", None, -1, 10**400, [60]])
def test_a_planted_classifier_is_refused_before_training(value, run, tmp_path, monkeypatch):
    monkeypatch.setattr("solo_gating.evaluate.tasks.linear.train_on_features", None)
    options = ("augment=false", "path=dense", "seeds=2", f"output={tmp_path}")
    cfg = evaluation_config("linear", run.checkpoint, *options)
    identity = prepare_evaluation(
        cfg.copy(), "linear", linear_task._SETTINGS, ("train", "val")
    ).identity
    planted = tmp_path / f"dense-seed{cfg.seed + 1}.json"
    planted.write_text(json.dumps({"settings": identity, "top1": value, "top5": 99.0}))
    assert_refused(lambda: evaluate_linear(cfg), str(planted), "top1: got", "0 to 100")


def test_a_damaged_metrics_json_does_not_cost_an_evaluation(run, tmp_path):
    (tmp_path / "metrics.json").write_text('{"identity": ')
    cfg = evaluation_config("knn", run.checkpoint, "path=dense", f"output={tmp_path}")
    evaluate_knn(cfg)
    assert np.isfinite(json.loads((tmp_path / "metrics.json").read_text())["dense"]["knn_top1"])
