"""Data sets and transforms: what a network is given for what is on disk."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits

from solo_gating import InputError
from solo_gating.config.pretraining import prepare_config
from solo_gating.data import evaluation_loader, training_loader
from solo_gating.data.arrays import read_arrays
from solo_gating.data.augmentations import (
    check_augmentations,
    evaluation_transform,
    training_transform,
    view_transform,
)
from solo_gating.data.datasets import UnlabelledFolder, fraction_of, open_dataset
from solo_gating.data.digits import write_digits

from ..support.helpers import tiny_config, write_images


def loaders(*, val=True, **overrides):
    cfg = prepare_config(tiny_config(**overrides))
    return training_loader(cfg), evaluation_loader(cfg, "val") if val else None


def plain_view(size=16, **keys):
    """An entry of `augmentations` that changes nothing but what `keys` say."""
    views = OmegaConf.create([{"crop_size": size, "num_crops": 1, **keys}])
    check_augmentations(views)
    return views


def picture(size=16, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (size, size, 3)).astype(np.uint8)


# Arrays


def test_archives_are_read_in_the_order_given_and_a_glob_s_by_name(tmp_path):
    files = [write_images(tmp_path / f"{name}.npz", 4, seed) for seed, name in enumerate("cab")]
    contents = [np.load(file) for file in files]
    for paths, order in (
        (str(files[1]), [1]),
        ([str(file) for file in files], [0, 1, 2]),
        (str(tmp_path / "*.npz"), [1, 2, 0]),
        ([str(tmp_path / "c*.npz"), str(tmp_path / "[ab].npz")], [0, 1, 2]),
    ):
        images, labels = read_arrays(paths, "data.train_path", 3)
        assert np.array_equal(images, np.concatenate([contents[i]["images"] for i in order]))
        assert np.array_equal(labels, np.concatenate([contents[i]["labels"] for i in order]))


@pytest.mark.parametrize(
    ("second", "message"),
    [({"size": 8}, "different sizes"), ({"labels": False}, "with and without labels")],
)
def test_archives_that_do_not_fit_each_other_are_refused(second, message, tmp_path):
    write_images(tmp_path / "a.npz", 4)
    write_images(tmp_path / "b.npz", 4, **second)
    with pytest.raises(InputError, match=rf"^data.train_path: got .*{message}"):
        read_arrays(str(tmp_path / "*.npz"), "data.train_path", 3)


def test_an_empty_list_of_archives_is_refused():
    with pytest.raises(InputError, match=r"^data.val_path: got an empty list"):
        read_arrays([], "data.val_path", 3)


def test_batches_hold_the_images_their_indices_name(tmp_path):
    file = write_images(tmp_path / "a.npz", 20)
    content = np.load(file)
    train, val = loaders(
        data={"train_path": str(file), "val_path": str(file)},
        augmentations=[{"crop_size": 16, "num_crops": 2}],
    )
    transform = view_transform("custom", plain_view()[0])
    seen = []
    for indices, views, targets in train:
        assert len(views) == 2
        for index, first, second, target in zip(indices, *views, targets, strict=True):
            expected = transform(Image.fromarray(content["images"][index]))
            assert torch.equal(first, expected)
            assert torch.equal(second, expected)
            assert target == content["labels"][index]
        seen += indices.tolist()
    assert len(set(seen)) == len(seen) == 16  # the incomplete last batch is dropped
    assert torch.equal(
        torch.cat([targets for _, targets in val]), torch.from_numpy(content["labels"])
    )


def test_views_differ_where_they_are_random(tmp_path):
    file = write_images(tmp_path / "a.npz", 8)
    train, _ = loaders(
        val=False,
        data={"train_path": str(file)},
        augmentations=[{"crop_size": 16, "num_crops": 2, "horizontal_flip": {"prob": 0.5}}],
    )
    (_, (first, second), _) = next(iter(train))
    flipped = [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert any(flipped)
    for a, b, different in zip(first, second, flipped, strict=True):
        assert torch.equal(a, b.flip(-1) if different else b)


@pytest.mark.parametrize("hidden", [True, False])
def test_unlabelled_arrays_have_the_target_minus_one(hidden, tmp_path):
    train_file = write_images(tmp_path / "a.npz", 8, labels=hidden)
    val_file = write_images(tmp_path / "b.npz", 8)
    paths = {"train_path": str(train_file), "val_path": str(val_file)}
    train, val = loaders(data={**paths, "no_labels": hidden})
    assert next(iter(train))[2].unique().tolist() == [-1]
    assert next(iter(val))[1].tolist() == [i % 3 for i in range(8)]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_fraction_is_stratified_and_always_the_same(labelled, tmp_path):
    file = write_images(tmp_path / "a.npz", 90, labels=labelled)
    cfg = prepare_config(tiny_config(data={"train_path": str(file)}))
    dataset = open_dataset(cfg.data, "train", None)
    part = fraction_of(dataset, 1 / 3)
    assert part.indices == fraction_of(dataset, 1 / 3).indices
    assert len(set(part.indices)) == 30
    if labelled:
        assert np.bincount([part[i][1] for i in range(30)]).tolist() == [10, 10, 10]
    cfg = prepare_config(tiny_config(data={"train_path": str(file), "fraction": 0.5}))
    assert len(training_loader(cfg).dataset) == 45


# Image folders


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


def test_digits_are_split_by_writer_and_sorted_by_label(digits):
    targets = load_digits().target
    for split, expected in (("train", range(1400)), ("test", range(1400, 1797))):
        files = sorted((digits / split).glob("*/*.png"), key=lambda file: file.stem)
        assert [int(file.stem) for file in files] == list(expected)
        assert [int(file.parent.name) for file in files] == targets[list(expected)].tolist()


def test_digits_are_scikit_learn_s_upscaled(digits):
    images = load_digits().images
    for index in (0, 700, 1399):
        (file,) = digits.glob(f"train/*/{index:04d}.png")
        pixels = np.asarray(Image.open(file), dtype=float)
        assert pixels.shape == (16, 16)
        halved = pixels.reshape(8, 2, 8, 2).mean(axis=(1, 3))
        assert np.corrcoef(halved.ravel(), images[index].ravel())[0, 1] > 0.99
        assert np.abs(halved - images[index] * 255 / 16).mean() < 12


def test_digits_are_written_once(digits):
    victim = next(digits.glob("train/*/0000.png"))
    before = victim.stat().st_mtime_ns
    write_digits(digits)
    assert victim.stat().st_mtime_ns == before


def test_an_interrupted_write_is_completed(tmp_path, monkeypatch):
    calls = iter(range(6))

    def stop(*args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return Image.new("L", (8, 8))

    with monkeypatch.context() as patch:
        patch.setattr("solo_gating.data.digits.Image.fromarray", stop)
        with pytest.raises(KeyboardInterrupt):
            write_digits(tmp_path, size=8)
    write_digits(tmp_path, size=8)
    assert len(list(tmp_path.glob("*/*/*.png"))) == 1797
    (first,) = tmp_path.glob("train/*/0000.png")
    assert np.array_equal(
        np.asarray(Image.open(first)), np.rint(load_digits().images[0] * 255 / 16)
    )


def folder_config(path, **data):
    return {"data": {"format": "image_folder", "train_path": str(path), **data}}


def test_class_folders_are_counted_where_the_config_does_not(digits):
    cfg = prepare_config(tiny_config(**folder_config(digits / "train", num_classes=None)))
    assert cfg.data.num_classes == 10
    assert len(training_loader(cfg).dataset) == 1400


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent", "absent' does not exist"),
        ("a.npz", "a.npz' is a file, expected a folder"),
        ("flat", "not a folder with one folder of images for each class.*data.no_labels=true"),
        ("two", "got 2 class folders, expected with data.num_classes=3 are 3"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(path, message, tmp_path):
    write_images(tmp_path / "a.npz", 4)
    for image in ("flat/a.png", "two/x/a.png", "two/y/a.png"):
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture()).save(tmp_path / image)
    cfg = prepare_config(tiny_config(**folder_config(tmp_path / path)))
    with pytest.raises(InputError, match=rf"^data.train_path: .*{message}"):
        training_loader(cfg)


def test_every_image_below_an_unlabelled_folder_is_found(tmp_path):
    (tmp_path / "b/c").mkdir(parents=True)
    Image.fromarray(picture()).save(tmp_path / "z.png")
    Image.fromarray(picture()[..., 0]).save(tmp_path / "b/c/a.PNG")
    (tmp_path / "b/notes.txt").write_text("no image")
    folder = UnlabelledFolder(str(tmp_path), np.asarray)
    assert [target for _, target in folder] == [-1, -1]
    assert np.array_equal(folder[1][0], picture())
    assert np.array_equal(folder[0][0], np.repeat(picture()[..., :1], 3, axis=2))

    cfg = prepare_config(
        tiny_config(**folder_config(tmp_path, no_labels=True), optimizer={"batch_size": 2})
    )
    assert next(iter(training_loader(cfg)))[2].tolist() == [-1, -1]


def test_an_unlabelled_folder_without_images_is_refused(tmp_path):
    cfg = prepare_config(tiny_config(**folder_config(tmp_path, no_labels=True)))
    with pytest.raises(InputError, match=r"^data.train_path: there is no image below"):
        training_loader(cfg)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10"])
def test_a_data_set_that_cannot_be_downloaded_is_named(dataset, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    data = {"dataset": dataset, "train_path": str(tmp_path), "num_classes": None, "split": "train"}
    cfg = prepare_config(tiny_config(data={**data, "format": "image_folder"}))
    with pytest.raises(InputError) as error:
        training_loader(cfg)
    message = str(error.value)
    assert message.startswith(f"data.train_path: {dataset} is not in {str(tmp_path)!r}")
    assert "could not be downloaded" in message
    assert "no route" in message
    assert "data.format=npz" in message


# Transforms

STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
    "imagenet100": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "custom": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
}


@pytest.mark.parametrize("dataset", STATISTICS)
def test_evaluation_normalises_as_the_views_do(dataset):
    mean, std = STATISTICS[dataset]
    views = plain_view(mean=list(mean), std=list(std))
    image = Image.fromarray(picture())
    pixels = torch.from_numpy(picture()).permute(2, 0, 1) / 255
    expected = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    (view,) = training_transform(dataset, views)(image)
    torch.testing.assert_close(view, expected)
    assert torch.equal(evaluation_transform(dataset, views)(image), view)


def test_large_images_are_evaluated_on_the_centre():
    """The shorter side to 256, then the central 224×224: a border of 16 pixels is cut."""
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[16:-16, 16:-16] = 255
    views = plain_view(224, mean=[0.0] * 3, std=[1.0] * 3)
    image = evaluation_transform("custom", views)(Image.fromarray(pixels))
    assert torch.equal(image, torch.ones(3, 224, 224))


def test_small_images_are_evaluated_whole():
    views = plain_view(32, mean=[0.0] * 3, std=[1.0] * 3)
    image = evaluation_transform("custom", views)(Image.fromarray(picture(32)))
    assert torch.equal(image, torch.from_numpy(picture(32)).permute(2, 0, 1) / 255)


def test_an_affine_entry_moves_the_image():
    views = plain_view(affine={"degrees": [90, 90]}, mean=[0.0] * 3, std=[1.0] * 3)
    (view,) = training_transform("custom", views)(Image.fromarray(picture()))
    rotated = torch.from_numpy(np.rot90(picture(), -1).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(view, rotated, atol=1.5 / 255, rtol=0)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_an_erasing_entry_removes_a_part(prob):
    views = plain_view(
        erasing={"prob": prob, "scale": [0.25, 0.25]}, mean=[-1.0] * 3, std=[1.0] * 3
    )
    (view,) = training_transform("custom", views)(Image.fromarray(picture()))
    share = (view == 0).all(dim=0).float().mean().item()
    assert share == 0 if prob == 0 else 0.15 < share < 0.35


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"crop": 3}, r"augmentations\[1\].crop: no such key, expected rrc, color_jitter"),
        ({"crop_size": 0}, r"augmentations\[1\].crop_size: got 0, expected an integer"),
        ({"num_crops": "2"}, r"augmentations\[1\].num_crops: got '2', expected an integer"),
        ({"num_crops": None}, r"augmentations\[1\].num_crops: got None"),
    ],
)
def test_an_augmentation_that_does_not_exist_is_refused(view, message):
    good = {"crop_size": 16, "num_crops": 1}
    with pytest.raises(InputError, match=f"^{message}"):
        check_augmentations(OmegaConf.create([good, {**good, **view}]))
