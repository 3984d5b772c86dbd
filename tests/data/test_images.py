"""Image folders: what counts as an image, what its levels become, and what cannot be read."""

import io
import os
import socket
import struct
import warnings

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from solo_gating import InputError
from solo_gating.config.defaults import DEFAULTS
from solo_gating.config.pretraining import prepare_config
from solo_gating.data import (
    classification_loader,
    count_class_folders,
    evaluation_loader,
    skipped_images,
    training_loader,
)
from solo_gating.data.datasets import check_data, fraction_of, open_dataset
from solo_gating.data.images import ImageFileError, read_image

from ..support.helpers import tiny_config

LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = LEVELS.astype(np.uint16) * 257


def read(image, kind, **options):
    """An image through a file of a kind, as an array of 8-bit RGB."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_image(file, "data.train_path: 'x'")
    assert found.mode == "RGB"
    return np.asarray(found)


# Levels


@pytest.mark.parametrize(
    ("kind", "order"), [("PNG", "<u2"), ("PPM", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")]
)
def test_sixteen_bits_are_scaled_to_eight(kind, order):
    found = read(Image.fromarray(WIDE.astype(order)), kind)
    assert np.array_equal(found, np.repeat(LEVELS[..., None], 3, axis=2))


def test_levels_between_are_rounded_to_the_nearest():
    levels = np.random.RandomState(0).randint(0, 65536, (16, 16)).astype(np.uint16)
    assert np.array_equal(read(Image.fromarray(levels), "PNG")[..., 0], np.rint(levels / 257))


def test_a_png_of_sixteen_bits_may_have_pillow_s_mode_i():
    """As in versions of Pillow that have no other mode for it."""
    image = Image.fromarray(WIDE.astype(np.int32))
    image.format = "PNG"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("solo_gating.data.images.Image.open", lambda source: image)
        found = read_image("x.png", "x")
    assert np.array_equal(np.asarray(found)[..., 0], LEVELS)


def tiff(levels, bits, white_is_zero=False):
    """A grey TIFF of one strip, 16 bits little-endian or 12 bits packed, by its specification."""
    if bits == 12:
        digits = "".join(f"{level:012b}" for level in levels.ravel())
        data = int(digits, 2).to_bytes(len(digits) // 8, "big")
    else:
        data = levels.astype("<u2").tobytes()
    height, width = levels.shape
    entries = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: 0 if white_is_zero else 1,
        273: 8,
        277: 1,
        278: height,
        279: len(data),
    }
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return io.BytesIO(head + data + struct.pack("<H", len(entries)) + table + bytes(4))


@pytest.mark.parametrize(("bits", "white_is_zero"), [(16, False), (16, True), (12, False)])
def test_a_tiff_says_what_is_white(bits, white_is_zero):
    highest = 2**bits - 1
    levels = np.rint(LEVELS * (highest / 255)).astype(int)
    found = np.asarray(read_image(tiff(levels, bits, white_is_zero), "x"))[..., 0]
    assert np.array_equal(found, 255 - LEVELS if white_is_zero else LEVELS)


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.int16])
def test_levels_that_nothing_defines_are_refused(kind):
    image = Image.fromarray(LEVELS.astype(np.int32 if kind is np.int16 else kind))
    tags = {258: 16, 339: 2} if kind is np.int16 else {}
    with pytest.raises(ImageFileError, match=r"^data.train_path: 'x' is .* not defined, expected"):
        read(image, "TIFF", tiffinfo=tags)


RGB = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_eight_bits_and_fewer_are_what_pillow_makes_of_them(mode):
    image = Image.fromarray(RGB).convert("RGBA" if mode == "PA" else "RGB").convert(mode)
    assert np.array_equal(read(image, "TIFF"), np.asarray(image.convert("RGB")))


def test_a_transparent_palette_gives_its_colours():
    image = Image.fromarray(RGB).quantize(16)
    for transparency in (3, bytes(range(16))):
        found = read(image, "PNG", transparency=transparency)
        assert np.array_equal(found, np.asarray(image.convert("RGB")))


def test_colours_of_sixteen_bits_are_read():
    """A PNG by its specification, since Pillow writes none."""
    import zlib

    def chunk(name, content):
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB.astype(np.uint16) * 257)
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert np.array_equal(np.asarray(read_image(file, "x")), RGB)


# Folders


def save(file, seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file


def config(train, val=None, batch=2, **data):
    """Of images in folders; the training's by default are labelled."""
    data = {
        "format": "image_folder",
        "num_classes": None,
        "train_path": str(train),
        "val_path": val and str(val),
        **data,
    }
    return prepare_config(tiny_config(data=data, optimizer={"batch_size": batch}))


def names(dataset, root):
    return [os.path.relpath(file, root) for file in dataset.files]


@pytest.fixture
def untidy(tmp_path):
    """Two classes, and all that is found beside images."""
    root = tmp_path / "train"
    for name in ("cat/1.png", "cat/deep/er/2.PNG", "dog/3.JpEg", "dog/sub/4.png"):
        save(root / name)
    for name in ("cat/._1.png", ".cache/5.png", "cat/.thumbs/6.png", "__MACOSX/cat/._1.png"):
        save(root / name)
    save(root / "dog/@eaDir/7.png")
    for name in (".DS_Store", "cat/Thumbs.db", "dog/notes.txt", "desktop.ini"):
        (root / name).write_text("no image")
    (root / "empty/er").mkdir(parents=True)
    (root / "text").mkdir()
    (root / "text/a.txt").write_text("no image")
    (root / "dog/up").symlink_to("..")
    (root / "self").symlink_to(".")
    (root / "cat/same").symlink_to("same")
    save(tmp_path / "elsewhere/8.png")
    (root / "cat/linked").symlink_to(tmp_path / "elsewhere")
    (root / "dog/9.png").symlink_to(tmp_path / "elsewhere/8.png")
    return root


def test_labelled_and_unlabelled_folders_hold_the_same_images(untidy):
    labelled = open_dataset(config(untidy).data, "train", None)
    cfg = config(untidy, no_labels=True, num_classes=2)
    unlabelled = open_dataset(cfg.data, "train", None)
    cats = ["cat/1.png", "cat/deep/er/2.PNG", "cat/linked/8.png"]
    dogs = ["dog/3.JpEg", "dog/9.png", "dog/sub/4.png"]
    assert names(labelled, untidy) == [*cats, *dogs]
    assert names(unlabelled, untidy) == [*cats, *dogs]
    assert labelled.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert labelled.classes == ["cat", "dog"]
    assert count_class_folders(str(untidy)) == 2
    assert len(list(labelled)) == 6


def test_images_are_in_torchvision_s_order(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("b/2.png", "b/10.png", "a/z.png", "a/b/c.png", "a/b-c/d.png", "a/B.png"):
        save(tmp_path / name)
    theirs = ImageFolder(str(tmp_path))
    ours = open_dataset(config(tmp_path).data, "train", None)
    assert ours.samples == theirs.samples
    assert ours.classes == theirs.classes


def pipe(file):
    os.mkfifo(file)


def socket_file(file):
    before = os.getcwd()
    os.chdir(file.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(file.name)
    finally:
        os.chdir(before)


def truncated(file):
    save(file)
    file.write_bytes(file.read_bytes()[:-200])


BAD_IMAGES = {
    "truncated": truncated,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no image"),
    "broken link": lambda file: file.symlink_to("nowhere.png"),
    "link to itself": lambda file: file.symlink_to(file.name),
    "pipe": pipe,
    "socket": socket_file,
    "device": lambda file: file.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("no_labels", [False, True])
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_an_image_that_cannot_be_read_is_named_or_left_out(kind, no_labels, tmp_path):
    good = [save(tmp_path / f"train/{name}.png", 7) for name in ("a/1", "a/3", "b/1", "b/2")]
    bad = tmp_path / "train/a/2.png"
    BAD_IMAGES[kind](bad)
    data = {"no_labels": no_labels, "num_classes": 2}
    dataset = open_dataset(config(tmp_path / "train", **data).data, "train", None)
    with pytest.raises(InputError) as error:
        dataset[1]
    message = str(error.value)
    assert message.startswith(f"data.train_path: {str(bad)!r} ")
    assert message.endswith("; data.on_damaged=skip leaves such images out")
    assert "\n" not in message

    cfg = config(tmp_path / "train", **data, on_damaged="skip")
    with pytest.warns(UserWarning, match="data.train_path: 1 of 5 images cannot be read and are"):
        loader = training_loader(cfg)
    assert loader.dataset.dataset.files == [str(file) for file in good]
    assert skipped_images(cfg, train=loader) == {"skipped_images": {"train": 1}}
    assert len(list(loader)) == 2


def test_a_worker_s_error_is_one_sentence(tmp_path):
    for name in ("a/1.png", "b/1.png"):
        truncated(save(tmp_path / name))
    loader = training_loader(config(tmp_path, num_workers=1))
    with pytest.raises(InputError) as error:
        next(iter(loader))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("data.train_path: ")
    assert message.count("data.on_damaged=skip") == 1


def test_levels_that_nothing_defines_stop_what_skips_damaged_images(tmp_path):
    save(tmp_path / "a/1.png")
    Image.fromarray(LEVELS.astype(np.float32)).save(tmp_path / "a/2.tiff")
    with pytest.raises(InputError, match=r"2.tiff' is an image of mode F"):
        training_loader(config(tmp_path, on_damaged="skip"))


def test_a_folder_of_damaged_images_is_refused(tmp_path):
    truncated(save(tmp_path / "a/1.png"))
    with pytest.raises(InputError, match=r"^data.train_path: none of the 1 images can be read"):
        training_loader(config(tmp_path, on_damaged="skip"))


def test_damaged_images_are_left_out_of_evaluation_and_classifiers(tmp_path):
    for name in ("train/a/1", "train/b/1", "val/a/1", "val/b/1", "val/b/3"):
        save(tmp_path / f"{name}.png")
    for name in ("train/a/2.png", "val/b/2.png"):
        truncated(tmp_path / name)
    cfg = config(tmp_path / "train", tmp_path / "val", on_damaged="skip")
    with pytest.warns(UserWarning, match="are left out"):
        loaders = evaluation_loader(cfg, "val"), classification_loader(cfg)
    assert [len(loader.dataset) for loader in loaders] == [3, 2]
    counted = skipped_images(cfg, val=loaders[0], train=loaders[1])
    assert counted == {"skipped_images": {"val": 1, "train": 1}}
    assert [target for _, targets in loaders[0] for target in targets.tolist()] == [0, 1, 1]


# Classes


def classes(folder, *names):
    for name in names:
        save(folder / name / "1.png")
    return folder


@pytest.mark.parametrize("dataset", ["custom", "imagenet100"])
def test_validation_images_have_the_labels_of_training(dataset, tmp_path):
    known = [f"n{number:03}" for number in range(100 if dataset == "imagenet100" else 4)]
    train = classes(tmp_path / "train", *known)
    val = classes(tmp_path / "val", known[3], known[1])
    loader = evaluation_loader(config(train, val, dataset=dataset), "val", 8)
    ((_, targets),) = loader
    assert targets.tolist() == [1, 3]
    assert loader.dataset.classes == known


def test_a_class_that_training_has_not_is_refused(tmp_path):
    train = classes(tmp_path / "train", "a", "b", "c")
    val = classes(tmp_path / "val", "a", "b", "d")
    message = r"^data.val_path: got the class 'd', expected those of .*: a, b, c$"
    with pytest.raises(InputError, match=message):
        evaluation_loader(config(train, val), "val")
    (val / "d/1.png").unlink()  # a folder without an image is no class
    assert len(evaluation_loader(config(train, val), "val").dataset) == 2


def test_validation_without_training_s_names_has_its_own(tmp_path):
    """Training's images are elsewhere, or have no labels."""
    val = classes(tmp_path / "val", "a", "b")
    for data in ({"train_path": "elsewhere"}, {"train_path": str(val), "no_labels": True}):
        cfg = config(val, val, **{"num_classes": 3, **data})
        assert [target for _, target in open_dataset(cfg.data, "val", None)] == [0, 1]
        cfg.data.num_classes = 1
        with pytest.raises(InputError, match=r"^data.val_path: got 2 class folders"):
            open_dataset(cfg.data, "val", None)


# data.fraction


@pytest.mark.parametrize("value", [True, [0.5], "half", float("nan"), 0, 1, -0.5, None, {"a": 1}])
def test_a_fraction_that_is_none_is_refused(value):
    data = OmegaConf.create({**DEFAULTS["data"], "fraction": value})
    with pytest.raises(InputError, match=r"^data.fraction: got .*, expected a number in"):
        check_data(data)


@pytest.mark.parametrize(
    ("targets", "fraction"),
    [
        ([0, 0, 0, 0, 1], 0.5),  # a class of one image
        ([0, 1, 2] * 3, 0.2),  # fewer images than classes
        ([0, 1, 2] * 3, 0.9),  # fewer are left
        (None, 0.01),  # no image
    ],
)
def test_a_fraction_that_cannot_be_drawn_is_refused(targets, fraction):
    class Images(list):
        pass

    images = Images(range(9 if targets is None else len(targets)))
    if targets is not None:
        images.targets = np.array(targets)
    with pytest.raises(InputError, match=rf"^data.fraction: got {fraction} of \d images"):
        fraction_of(images, fraction)


# h5


def test_h5_images_have_the_labels_of_training_and_are_named(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("solo.data.h5_dataset")
    monkeypatch.setenv("HOME", str(tmp_path))  # where solo-learn keeps what it found in a file
    good = np.frombuffer(save(tmp_path / "1.png").read_bytes(), np.uint8)

    def written(name, *classes):
        with h5py.File(tmp_path / name, "w") as file:
            for each in classes:
                file[f"{each}/1.png"] = good
        return str(tmp_path / name)

    known = [f"n{number:03}" for number in range(100)]
    paths = {"train_path": written("train.h5", *known)}
    data = OmegaConf.create(
        {**DEFAULTS["data"], "format": "h5", "dataset": "imagenet100", "num_classes": 100, **paths}
    )
    data.val_path = written("val.h5", known[7], known[2])
    val = open_dataset(data, "val", None)
    assert [target for _, target in val] == [2, 7]
    with h5py.File(data.val_path, "a") as file:
        del file[f"{known[7]}/1.png"]
        file[f"{known[7]}/1.png"] = good[:-200]
    with pytest.raises(InputError, match=rf"^data.val_path: '{known[7]}/1.png' of .*val.h5'"):
        val[1]
    data.on_damaged = "skip"
    with pytest.warns(UserWarning, match="1 of 2 images"):
        assert [target for _, target in open_dataset(data, "val", None)] == [2]
    data.val_path = written("other.h5", "n1234")
    with pytest.raises(InputError, match=r"^data.val_path: got the class 'n1234'"):
        open_dataset(data, "val", None)
    data.dataset = "custom"
    with pytest.raises(InputError, match=r"^data.format: got h5 with data.dataset=custom"):
        open_dataset(data, "val", None)
