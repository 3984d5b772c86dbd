"""The whole config: the shipped ones are complete and as published, mistakes are refused."""

import json
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from solo_gating import GATED_METHODS, METHODS, InputError
from solo_gating.checkpoints.reading import check_architecture, read_checkpoint
from solo_gating.config.compose import composed, config_names
from solo_gating.config.defaults import DEFAULTS, configs_folder
from solo_gating.config.pretraining import prepare_config, scale_learning_rates
from solo_gating.data.arrays import read_arrays
from solo_gating.main_pretrain import pretrain
from solo_gating.solo_learn import LINE

from ..support.helpers import tiny_config, write_images


def shipped(name, *overrides):
    with initialize_config_dir(str(configs_folder()), version_base="1.2"):
        return compose(name, overrides=list(overrides))


CIFAR, ALL = ("cifar10", "cifar100"), ("cifar10", "cifar100", "stl10", "imagenet100")
REQUIRED = [
    *(
        f"{method}_{data}"
        for method in ("vicreg_dual", "vicreg_gated", "vicreg", "barlow_dual")
        for data in ALL
    ),
    *(
        f"{method}_{data}"
        for method in ("simsiam_gated", "simsiam")
        for data in (*CIFAR, "imagenet100")
    ),
    *(f"{method}_dual_{data}" for method in ("byol", "mocov2plus") for data in CIFAR),
    *(f"simclr_{kind}_{data}" for kind in ("cdg", "scdg", "cgnet", "fbs", "dgc") for data in CIFAR),
    "vicreg_dual_digits",
    "vicreg_any_digits",
]


def test_every_row_of_the_papers_has_a_config():
    names = config_names()
    assert set(REQUIRED) <= set(names)
    for variant in ("two_encoders", "no_invariance"):
        assert f"vicreg_dual_{variant}_cifar100" in names


def flat(cfg, above=""):
    """Every value of nested groups, by its key with dots."""
    found = {}
    for name, value in cfg.items():
        inside = isinstance(value, dict) and value
        found |= flat(value, f"{above}{name}.") if inside else {f"{above}{name}": value}
    return found


def test_our_configs_change_these_of_the_defaults():
    defaults, ours = flat(DEFAULTS), flat(OmegaConf.to_container(composed("run", [])))
    assert {
        key: (defaults.get(key), ours[key]) for key in ours if defaults.get(key) != ours[key]
    } == {
        "max_epochs": (100, 500),
        "precision": ("32-true", "16-mixed"),
        "sync_batchnorm": (False, True),
        "checkpoint.enabled": (False, True),
        "wandb.project": ("solo-learn", "solo-gating"),
        "knn_eval.k": (20, 1),
        # Lightning's own.
        "enable_progress_bar": (None, True),
        "log_every_n_steps": (None, 50),
        "check_val_every_n_epoch": (None, 1),
    }


@pytest.mark.skipif(LINE == "legacy", reason="1.0.2 has no such configs")
def test_the_defaults_are_solo_learn_s():
    from solo.methods.base import BaseMethod
    from solo.utils.auto_resumer import AutoResumer
    from solo.utils.checkpointer import Checkpointer

    cfg = OmegaConf.create({"backbone": {}, "optimizer": {}, "scheduler": {}})
    for part in (BaseMethod, AutoResumer, Checkpointer):
        cfg = part.add_and_assert_specific_cfg(cfg)
    theirs, ours = flat(OmegaConf.to_container(cfg)), flat(DEFAULTS)
    both = set(theirs) & set(ours)
    assert {"knn_eval.k", "checkpoint.enabled", "scheduler.warmup_epochs"} <= both
    assert {key: ours[key] for key in both} == {key: theirs[key] for key in both}


STUDENTS = ("simreg", "seed")
SIZES = {"cifar10": 32, "cifar100": 32, "stl10": 96, "imagenet100": 224, "custom": 12}


def completed(name):
    """A shipped config with the files that only the user has."""
    cfg = shipped(name)
    if name.startswith("gate_encoder"):
        cfg.pretrained = __file__
    if cfg.method in STUDENTS:
        cfg.method_kwargs.teacher = __file__
    return prepare_config(cfg)


@pytest.mark.parametrize("name", config_names())
def test_a_shipped_config_is_complete_and_consistent(name):
    cfg = completed(name)
    assert {view.crop_size for view in cfg.augmentations} == {SIZES[cfg.data.dataset]}
    method, data = cfg.name.rsplit("-", 1)
    assert f"{method}_{data}" == name
    own = {"_any_": "_dual_", "gate_encoder_": "vicreg_distilled_"}
    own |= {f"simclr_{kind}_": "simclr_gated_" for kind in ("fbs", "dgc", "cgnet", "cdg", "scdg")}
    for ours, method_s in own.items():
        name = name.replace(ours, method_s)
    assert name.startswith(cfg.method)
    assert data == ("digits" if cfg.data.dataset == "custom" else cfg.data.dataset)
    assert cfg.data.num_large_crops == (1 if cfg.method in STUDENTS else 2)
    assert cfg.backbone.name.startswith("resnet18_")
    assert cfg.backbone.kwargs.stem == ("imagenet" if data in ("stl10", "imagenet100") else "cifar")
    assert ("gating" in cfg) == (cfg.method in GATED_METHODS)
    sizes = {"cifar10": 32, "cifar100": 32, "stl10": 96, "imagenet100": 224}
    if data in sizes:
        assert {view.crop_size for view in cfg.augmentations} == {sizes[data]}


ONE_VIEW = {"augmentations[0].num_crops": 1, "augmentations[0].rrc.crop_min_scale": 0.2}
PUBLISHED = {
    # run.sh of UCDvision/simreg, main.py and tools/opts.py of jacobswan1/SEED
    "simreg_cifar100": {
        **ONE_VIEW,
        "max_epochs": 130,
        "optimizer.lr": 0.05,
        "optimizer.batch_size": 256,
        "optimizer.weight_decay": 1e-4,
        "optimizer.kwargs.momentum": 0.9,
        "scheduler.warmup_epochs": 0,
        "augmentations[0].color_jitter.prob": 0,
        "augmentations[0].gaussian_blur.prob": 0,
        "augmentations[0].horizontal_flip.prob": 0.5,
    },
    "seed_cifar100": {
        **ONE_VIEW,
        "max_epochs": 200,
        "optimizer.lr": 0.03,
        "optimizer.batch_size": 256,
        "optimizer.weight_decay": 1e-4,
        "optimizer.kwargs.momentum": 0.9,
        "scheduler.warmup_epochs": 5,
        "method_kwargs.queue_size": 65536,
        "method_kwargs.student_temperature": 0.2,
        "method_kwargs.teacher_temperature": 1e-4,
        "augmentations[0].color_jitter.prob": 0.8,
        "augmentations[0].color_jitter.saturation": 0.4,
        "augmentations[0].gaussian_blur.prob": 0.5,
    },
    "vicreg_dual_cifar100": {
        "optimizer.lr": 0.3,
        "optimizer.name": "lars",
        "optimizer.batch_size": 512,
        "optimizer.weight_decay": 1e-4,
        "optimizer.kwargs.eta": 0.02,
        "optimizer.kwargs.clip_lr": True,
        "optimizer.kwargs.exclude_bias_n_norm": True,
        "scheduler.warmup_epochs": 10,
        "max_epochs": 500,
        "precision": "16-mixed",
        "sync_batchnorm": True,
        "method_kwargs.sim_loss_weight": 25,
        "method_kwargs.var_loss_weight": 25,
        "method_kwargs.cov_loss_weight": 1,
        "method_kwargs.proj_hidden_dim": 2048,
        "method_kwargs.proj_output_dim": 2048,
        "gating.sparsity_weight": 5,
        "gating.bound_gradient": "selected",
        "gating.weight_decay": 0,
        "gating.separate_bn": True,
        "augmentations[0].rrc.crop_min_scale": 0.2,
        "augmentations[0].gaussian_blur.prob": 0,
        "augmentations[1].gaussian_blur.prob": 0.2,
        "augmentations[1].solarization.prob": 0.1,
    },
    "vicreg_dual_cifar10": {"augmentations[1].gaussian_blur.prob": 0},
    "vicreg_dual_stl10": {"augmentations[1].gaussian_blur.prob": 0, "max_epochs": 500},
    "vicreg_dual_imagenet100": {"augmentations[1].gaussian_blur.prob": 0},
    "vicreg_dual_no_invariance_cifar100": {
        "method_kwargs.sim_loss_weight": 0,
        "method_kwargs.var_loss_weight": 25,
    },
    "vicreg_dual_two_encoders_cifar100": {"backbone.name": "resnet18_two_encoders"},
    "vicreg_gated_cifar100": {"gating.views": ["gated", "gated"], "gating.separate_bn": False},
    "simsiam_gated_cifar100": {
        "optimizer.name": "sgd",
        "optimizer.lr": 0.5,
        "optimizer.weight_decay": 1e-5,
        "optimizer.batch_size": 256,
        "backbone.kwargs.zero_init_residual": True,
        "method_kwargs.pred_hidden_dim": 512,
        "gating.views": ["gated", "gated"],
        "gating.weight_decay": 0,
        "augmentations[0].gaussian_blur.prob": 0,
        "augmentations[0].num_crops": 2,
    },
    "simsiam_gated_cifar10": {"augmentations[0].gaussian_blur.prob": 0},
    "simsiam_cifar100": {"augmentations[0].gaussian_blur.prob": 0},
    "simsiam_gated_imagenet100": {"augmentations[0].gaussian_blur.prob": 0.5},
    "vicreg_any_cifar100": {"gating.bound_gradient": "selected", "gating.weight_decay": 0},
    "byol_dual_cifar100": {  # as in solo-learn's scripts/pretrain/cifar/byol.yaml
        "optimizer.name": "lars",
        "optimizer.lr": 1.0,
        "optimizer.classifier_lr": 0.1,
        "optimizer.weight_decay": 1e-5,
        "optimizer.batch_size": 256,
        "optimizer.kwargs.eta": 0.02,
        "optimizer.kwargs.clip_lr": True,
        "optimizer.kwargs.exclude_bias_n_norm": True,
        "scheduler.warmup_epochs": 10,
        "max_epochs": 1000,
        "precision": "16-mixed",
        "sync_batchnorm": True,
        "method_kwargs.proj_hidden_dim": 4096,
        "method_kwargs.proj_output_dim": 256,
        "method_kwargs.pred_hidden_dim": 4096,
        "momentum": {"base_tau": 0.99, "final_tau": 1.0, "classifier": False},
        "gating.views": ["gated", "dense"],
        "augmentations[0].rrc.crop_min_scale": 0.08,
        "augmentations[0].color_jitter.saturation": 0.2,
        "augmentations[0].gaussian_blur.prob": 0,
        "augmentations[0].solarization.prob": 0,
        "augmentations[1].solarization.prob": 0.2,
    },
    "mocov2plus_dual_cifar100": {  # scripts/pretrain/cifar/mocov2plus.yaml
        "optimizer.name": "sgd",
        "optimizer.lr": 0.3,
        "optimizer.classifier_lr": 0.3,
        "optimizer.weight_decay": 1e-4,
        "optimizer.batch_size": 256,
        "scheduler.warmup_epochs": 10,
        "max_epochs": 1000,
        "method_kwargs.proj_hidden_dim": 2048,
        "method_kwargs.proj_output_dim": 256,
        "method_kwargs.queue_size": 32768,
        "method_kwargs.temperature": 0.2,
        "momentum": {"base_tau": 0.99, "final_tau": 0.999, "classifier": False},
        "augmentations[0].num_crops": 2,
        "augmentations[0].color_jitter.brightness": 0.4,
        "augmentations[0].gaussian_blur.prob": 0.5,
        "augmentations[0].solarization.prob": 0,
    },
    "barlow_dual_cifar10": {"method_kwargs.lamb": 0.0051, "gating.views": ["gated", "dense"]},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    cfg = completed(name)
    assert {key: OmegaConf.select(cfg, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_the_target_budget_is_an_override():
    cfg = prepare_config(shipped("vicreg_dual_cifar100", "gating.target_budget=0.1"))
    assert cfg.gating.target_budget == 0.1


def test_learning_rates_are_per_256_images():
    cfg = prepare_config(tiny_config(optimizer={"batch_size": 128, "lr": 0.3}))
    scale_learning_rates(cfg, world_size=4)
    assert cfg.optimizer.lr == pytest.approx(0.6)
    assert cfg.optimizer.classifier_lr == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"method": "vicreg_tripple"}, ["method: got 'vicreg_tripple'", "vicreg_dual"]),
        ({"method": "linear"}, ["method: got 'linear'", "vicreg_dual"]),
        (
            {"backbone": {"name": "resnet19_gated"}},
            ["backbone.name: got 'resnet19_gated'", "resnet18_gated"],
        ),
        (
            {"backbone": {"name": "resnet18_plain"}},
            [
                "backbone.name: got 'resnet18_plain'",
                "'vicreg_dual' needs gates",
                "resnet18_gated",
            ],
        ),
        ({"gating": {"foo": 1}}, ["gating.foo: no such key", "target_budget"]),
        *(
            (
                {"checkpoint": {"frequency": value}},
                [f"checkpoint.frequency: got {value!r}", "an integer ≥ 0"],
            )
            for value in (float("inf"), float("nan"), -1, "a b", True, None, 1.5, [1])
        ),
        (
            {"checkpoint": {"keep_prev": "no"}},
            ["checkpoint.keep_prev: got 'no'", "true or false"],
        ),
        ({"checkpoint": {"enabled": 1}}, ["checkpoint.enabled: got 1", "true or false"]),
        ({"data": {"dataset": "mnist"}}, ["data.dataset: got 'mnist'", "cifar10", "custom"]),
        ({"data": {"format": "csv"}}, ["data.format: got 'csv'", "npz"]),
        ({"data": {"train_path": None}}, ["data.train_path: missing"]),
        (
            {
                "data": {"dataset": "cifar100", "num_classes": None},
                "backbone": {"kwargs": {"stem": "imagenet"}},
            },
            ["backbone.kwargs.stem: got 'imagenet' with data.dataset=cifar100", "custom"],
        ),
        (
            {"method_kwargs": {"base_loss": "byol"}},
            ["method_kwargs.base_loss: got 'byol', method 'vicreg_dual' does not read it", "us3l"],
        ),
        ({"data": {"num_classes": 0}}, ["data.num_classes: got 0", "an integer ≥ 1"]),
        ({"data": {"num_classes": None}}, ["data.num_classes: got None", "an integer ≥ 1"]),
        ({"data": {"fraction": 1.5}}, ["data.fraction: got 1.5", "(0, 1)"]),
        (
            {"data": {"dataset": "cifar10", "num_classes": 7}},
            ["data.num_classes: got 7", "cifar10 has 10"],
        ),
        (
            {"data": {"format": "image_folder", "num_classes": None, "train_path": "nowhere"}},
            ["data.train_path: 'nowhere' does not exist"],
        ),
        ({"optimizer": {"name": "lion"}}, ["optimizer.name: got 'lion'", "lars"]),
        ({"optimizer": {"batch_size": 0}}, ["optimizer.batch_size: got 0", "an integer ≥ 2"]),
        ({"optimizer": {"lr": "fast"}}, ["optimizer.lr: got 'fast'", "a number ≥ 0"]),
        ({"optimizer": {"kwargs": {"eta": 1}}}, ["optimizer.kwargs.eta: sgd", "momentum"]),
        ({"max_epochs": 0}, ["max_epochs: got 0", "an integer ≥ 1"]),
        ({"augmentations": []}, ["augmentations: got none"]),
        (
            {"augmentations": [{"crop_size": 16, "num_crops": 3}]},
            ["augmentations: got 3 crops", "compares 2"],
        ),
        ({"final_knn": {"enabled": True}}, ["final_knn.enabled: got true", "data.val_path"]),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(overrides, parts):
    with pytest.raises(InputError) as error:
        prepare_config(tiny_config(**overrides))
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_gating_without_gates_is_refused():
    cfg = tiny_config("vicreg", gating={"target_budget": 0.3})
    with pytest.raises(InputError, match=r"gating: method 'vicreg' has no gates.*vicreg_dual"):
        prepare_config(cfg)


def test_two_encoders_without_a_dense_view_are_refused():
    cfg = tiny_config("vicreg_gated", backbone={"name": "resnet18_two_encoders"})
    with pytest.raises(InputError, match=r"gating.views: got \['gated', 'gated'\].*dense view"):
        prepare_config(cfg)


# Data


def archive(**arrays):
    return lambda file: np.savez(file, **arrays)


IMAGES = np.zeros((20, 16, 16, 3), np.uint8)
LABELS = np.zeros(20, int)


def truncated(file):
    np.savez_compressed(file, images=np.random.RandomState(0).bytes(20 * 768))
    file.write_bytes(file.read_bytes()[:-500])


def pickled(file):
    with file.open("wb") as out:
        np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def single_array(file):
    with file.open("wb") as out:
        np.save(out, IMAGES)


def members(**contents):
    """A zip with files of these contents, and `.npy` behind their names."""

    def write(file):
        with zipfile.ZipFile(file, "w") as out:
            for name, content in contents.items():
                out.writestr(f"{name}.npy", content)

    return write


def array(shape, data=b"", dtype="|u1", padding=0):
    """A .npy file whose header may say anything."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    header = (header + " " * padding + "\n").encode()
    return b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + data


def patched(offset, value):
    """An archive with two bytes changed in the headers of all members, local and central."""

    def write(file):
        np.savez(file, images=IMAGES)
        content = bytearray(file.read_bytes())
        for signature, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            place = content.index(signature) + offset + shift
            content[place : place + 2] = value.to_bytes(2, "little")
        file.write_bytes(content)

    return write


def bare(file):
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("images", b"no array")


BAD_FILES = {
    "floats": (archive(images=IMAGES.astype(float)), ["float64", "uint8 N×H×W×3"]),
    "grey": (archive(images=IMAGES[..., 0]), ["(20, 16, 16)", "uint8 N×H×W×3"]),
    "channels first": (archive(images=IMAGES.transpose(0, 3, 1, 2)), ["(20, 3, 16, 16)"]),
    "no image": (archive(images=IMAGES[:0], labels=LABELS[:0]), ["(0, 16, 16, 3)", "N ≥ 1"]),
    "other names": (archive(x=IMAGES, y=LABELS), ["holds ['x', 'y']", "`images`"]),
    "too few labels": (archive(images=IMAGES, labels=LABELS[:5]), ["(5,)", "20 integers"]),
    "labels of floats": (archive(images=IMAGES, labels=LABELS + 0.5), ["float64", "20 integers"]),
    "label too large": (
        archive(images=IMAGES, labels=LABELS + 3),
        ["3 to 3", "data.num_classes=3 are 0 to 2"],
    ),
    "label negative": (archive(images=IMAGES, labels=LABELS - 2), ["-2 to -2", "are 0 to 2"]),
    "truncated": (truncated, ["cannot read"]),
    "text": (lambda file: file.write_text("not a zip"), ["cannot read"]),
    "empty": (lambda file: file.write_bytes(b""), ["cannot read"]),
    "pickle": (pickled, ["cannot read"]),
    "pickle inside": (
        archive(images=np.array([None, {}], dtype=object)),
        ["cannot read"],
    ),
    "labels of objects": (
        archive(images=IMAGES, labels=np.array([None] * 20)),
        ["cannot read", "labels.npy holds Python objects"],
    ),
    "labels of times": (
        archive(images=IMAGES, labels=LABELS.astype("m8[s]")),
        ["labels of", "20 integers"],
    ),
    "label beyond int64": (
        archive(images=IMAGES, labels=np.full(20, 2**64 - 1, np.uint64)),
        ["18446744073709551615 to 18446744073709551615", "are 0 to 2"],
    ),
    "more bytes than exist": (
        members(images=array((10**12, 16, 16, 3))),
        ["cannot read", "images.npy has", "bytes, but by its header uint8 (1000000000000, 16"],
    ),
    "fewer bytes than exist": (
        members(images=array((1, 1, 1, 3), bytes(4))),
        ["cannot read", "bytes, but by its header uint8 (1, 1, 1, 3)"],
    ),
    "labels cut short": (
        members(images=array((2, 1, 1, 3), bytes(6)), labels=array((2,), bytes(8), "<i8")),
        ["cannot read", "labels.npy has", "bytes, but by its header int64 (2,)"],
    ),
    "negative shape": (members(images=array((-1, -1, 1, 3), bytes(3))), ["-1"]),
    "many dimensions": (members(images=array((1,) * 40, bytes(1))), ["uint8 of 40 dimensions"]),
    "records": (members(images=array((1, 1, 1, 3), bytes(6), "u1,u1")), ["are records"]),
    "long header": (members(images=array((1, 1, 1, 3), bytes(3), padding=20_000)), ["cannot read"]),
    "no shape": (members(images=array("[{}]")), ["cannot read"]),
    "no array inside": (members(images=b"no array"), ["cannot read", "NumPy did not write it"]),
    "empty inside": (members(images=b""), ["cannot read", "NumPy did not write it"]),
    "not named .npy": (bare, ["holds ['images'], expected `images`", "as np.savez writes"]),
    "no member": (members(), ["holds [], expected `images`"]),
    "encrypted": (patched(6, 1), ["cannot read", "it is encrypted"]),
    "unknown compression": (patched(8, 99), ["cannot read"]),
    "folder": (lambda file: file.mkdir(), ["is a folder, a broken link or no regular file"]),
    "broken link": (lambda file: file.symlink_to("nowhere"), ["is a folder, a broken link or"]),
    "pipe": (lambda file: os.mkfifo(file), ["is a folder, a broken link or no regular file"]),
    "single array": (single_array, ["is a single array"]),
    "too few images": (
        archive(images=IMAGES[:7], labels=LABELS[:7]),
        ["optimizer.batch_size: got 8 with 7 training images"],
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_arrays_that_cannot_be_used_are_refused_before_training(kind, tmp_path):
    write, parts = BAD_FILES[kind]
    file = tmp_path / "bad.npz"
    write(file)
    with pytest.raises(InputError) as error:
        pretrain(tiny_config(data={"train_path": str(file)}))
    message = str(error.value)
    assert all(part in message for part in parts), message
    if kind != "too few images":
        assert message.startswith("data.train_path: ")
        assert str(file) in message
    assert not re.search("pickle|trust|unsafe|weights_only|\n", message), message


@pytest.mark.parametrize(
    "content",
    [
        {"images": IMAGES.astype(np.float32)},
        {"images": IMAGES, "labels": LABELS[:5]},
        {"images": IMAGES, "labels": LABELS + 0.5},
    ],
)
def test_headers_are_checked_before_anything_is_unpacked(content, tmp_path, monkeypatch):
    np.savez(tmp_path / "bad.npz", **content)
    monkeypatch.setattr("solo_gating.data.arrays._array", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(InputError, match="expected"):
        read_arrays(str(tmp_path / "bad.npz"), "data.train_path", 3)


def test_arrays_larger_than_the_memory_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "big.npz", images=IMAGES)
    monkeypatch.setattr("solo_gating.data.arrays._memory", lambda: IMAGES.nbytes)
    with pytest.raises(InputError, match=r"images.npy unpacks to 15,488 bytes, this machine has"):
        read_arrays(str(tmp_path / "big.npz"), "data.train_path", 3)


@pytest.mark.parametrize("paths", [3, True, None, {"a": "b"}, [1, 2], ["a", None]])
def test_what_is_no_path_of_arrays_is_refused(paths):
    with pytest.raises(InputError, match=r"^data.train_path: got .*, expected a path or glob"):
        read_arrays(paths, "data.train_path", 3)


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_that_does_not_exist_is_refused(split, tmp_path):
    data = {"train_path": str(write_images(tmp_path / "a.npz", 16))}
    data[f"{split}_path"] = str(tmp_path / "absent*.npz")
    with pytest.raises(InputError, match=rf"^data.{split}_path: no file matches .*absent"):
        pretrain(tiny_config(data=data))


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    model = METHODS["vicreg_dual"](prepare_config(tiny_config()))
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": model.state_dict()}, file)
    return file


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint, tmp_path):
    data = {"train_path": str(write_images(tmp_path / "a.npz", 16))}
    cfg = tiny_config(
        data=data, resume_from_checkpoint=str(checkpoint), backbone={"kwargs": {"width": 5}}
    )
    message = r"another architecture: backbone.conv1.weight is \(4, 3, 3, 3\) there and \(5,"
    with pytest.raises(InputError, match=message):
        pretrain(cfg)
    assert {file.name for file in tmp_path.iterdir()} == {"a.npz", "last.ckpt"}


def test_a_checkpoint_of_another_method_is_refused(checkpoint):
    model = METHODS["vicreg"](prepare_config(tiny_config("vicreg")))
    content = read_checkpoint(checkpoint, "resume_from_checkpoint")
    with pytest.raises(InputError, match=r"gate.* and absent in this config"):
        check_architecture(model, content, checkpoint)


def saved(content):
    return lambda file: torch.save(content, file)


class Code:
    def __reduce__(self):
        return (json.loads, ("1",))


def half(file):
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, file)
    file.write_bytes(file.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (half, "cannot read"),
        (lambda file: file.write_text("no checkpoint"), "cannot read"),
        (lambda file: file.write_bytes(b""), "cannot read"),
        (saved({"state_dict": Code()}), "cannot read"),
        (saved([1, 2]), "no `state_dict`"),
        (saved({"model": {}}), "no `state_dict`"),
        (lambda file: None, "is not a file"),
    ],
    ids=["truncated", "text", "empty", "code", "list", "other keys", "absent"],
)
def test_what_is_no_checkpoint_is_refused(write, reason, tmp_path):
    file = tmp_path / "last.ckpt"
    write(file)
    with pytest.raises(InputError) as error:
        read_checkpoint(file, "resume_from_checkpoint")
    message = str(error.value)
    assert message.startswith("resume_from_checkpoint: ")
    assert str(file) in message
    assert reason in message
    assert "\n" not in message
