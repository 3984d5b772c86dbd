"""Views made on the device: the same as Pillow, torchvision and solo-learn make, one by one."""

import importlib.util
import json
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import chisquare, ks_2samp
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision import datasets as tv
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil

from solo_gating import InputError
from solo_gating.config.pretraining import prepare_config
from solo_gating.data import Place, training_loader
from solo_gating.data.augmentations import check_augmentations, view_transform
from solo_gating.data.datasets import fraction_of

from ..support.helpers import copy_of, tiny_config, tiny_model, write_images

pytest.importorskip("kornia")

from solo_gating.data.device import operations as op
from solo_gating.data.device import parameters as draw
from solo_gating.data.device.loader import DeviceLoader, arrays_of, fits
from solo_gating.data.device.views import DeviceView
from solo_gating.main_benchmark_data import benchmark_data
from solo_gating.main_pretrain import pretrain
from solo_gating.transfer import send

FULL = {
    "rrc": {"enabled": True, "crop_min_scale": 0.2, "crop_max_scale": 1.0},
    "color_jitter": {
        "prob": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
    },
    "grayscale": {"prob": 0.2},
    "gaussian_blur": {"prob": 0.5},
    "solarization": {"prob": 0.1},
    "equalization": {"prob": 0.1},
    "horizontal_flip": {"prob": 0.5},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def entry(size=24, dataset="cifar10", **keys):
    """Solo-learn's transform of an entry of `augmentations`, and ours."""
    views = OmegaConf.create([{"crop_size": size, "num_crops": 1, **keys}])
    check_augmentations(views)
    return view_transform(dataset, views[0]), DeviceView(dataset, views[0])


def pictures(number=16, size=24):
    """Half of them noise, half of them smooth; the first is grey, the second black."""
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (number, size, size, 3)).astype(np.uint8)
    walk = rng.standard_normal((number // 2, size, size, 3)).cumsum(axis=1).cumsum(axis=2)
    images[::2] = (128 + 8 * walk).clip(0, 255)
    images[0] = images[0, :, :, :1]
    images[1] = 0
    return images


def tensor(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def by_pillow(images, change, *parameters):
    """What a function of PIL images gives for each of them, as levels."""
    each = zip(*(values.tolist() for values in parameters), strict=True)
    arguments = list(each) or [()] * len(images)
    return tensor(
        [change(Image.fromarray(image), *a) for image, a in zip(images, arguments, strict=True)]
    ).float()


def like(found, expected):
    """Two samples of one distribution."""
    assert ks_2samp(np.asarray(found), np.asarray(expected)).pvalue > 1e-3


# Operations with given parameters


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (op.brightness, pil.adjust_brightness),
        (op.contrast, pil.adjust_contrast),
        (op.saturation, pil.adjust_saturation),
    ],
)
def test_mixing_is_torchvision_s_to_the_level(ours, theirs):
    images, factors = pictures(), torch.linspace(0, 2.2, 16)
    assert torch.equal(ours(tensor(images).float(), factors), by_pillow(images, theirs, factors))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (op.grey, lambda image: pil.to_grayscale(image, 3)),
        (op.solarised, ImageOps.solarize),
        (op.equalised, ImageOps.equalize),
    ],
)
def test_operations_without_parameters_are_pillow_s_to_the_level(ours, theirs):
    images = pictures()
    assert torch.equal(ours(tensor(images).float()), by_pillow(images, theirs))


def test_hue_is_torchvision_s_in_all_but_a_few_pixels():
    images, factors = pictures(), torch.linspace(-0.5, 0.5, 16)
    expected = by_pillow(images, pil.adjust_hue, factors)
    wrong = (op.hue(tensor(images).float(), factors) - expected).abs()
    assert (wrong > 0).float().mean() < 0.005
    assert wrong.max() <= 6  # one of 255 hues


def test_blur_is_pillow_s_within_two_levels():
    images, sigmas = pictures(), torch.linspace(0.1, 2.0, 16)
    expected = by_pillow(images, lambda image, s: image.filter(ImageFilter.GaussianBlur(s)), sigmas)
    wrong = op.blur(tensor(images).float(), sigmas, 2.0) - expected
    assert wrong.abs().max() <= 2
    assert wrong.abs().mean() < 0.5
    assert wrong.mean().abs() < 0.05


@pytest.mark.parametrize("sides", [(4, 14), (15, 25)])
def test_a_resized_crop_is_torchvision_s_within_a_level(sides):
    """Boxes that are enlarged, and boxes that are made smaller."""
    images, rng = pictures(), np.random.RandomState(0)
    sizes = rng.randint(*sides, (16, 2))
    corners = (rng.rand(16, 2) * (25 - sizes)).astype(int)
    boxes = torch.from_numpy(np.concatenate([corners, sizes], axis=1))
    mirrored = torch.arange(16) % 2

    def change(image, mirror, top, left, height, width):
        # In two calls, as Pillow makes some boxes smaller in rows first.
        for size in ((height, 14), (14, 14)):
            box = top, left, height, width
            image = pil.resized_crop(image, *box, size, InterpolationMode.BICUBIC)
            top, left, height, width = 0, 0, *size
        return pil.hflip(image) if mirror else image

    expected = by_pillow(images, change, mirrored, *boxes.T)
    found = op.resized_crop(tensor(images).float(), boxes.float(), (14, 14), mirrored)
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() < 0.005


def test_an_image_of_the_right_size_is_not_changed_by_resizing():
    images = tensor(pictures()).float()
    boxes = torch.tensor([[0.0, 0.0, 24.0, 24.0]]).expand(16, 4)
    assert torch.equal(op.resized_crop(images, boxes, (24, 24)), images)


def test_the_affine_map_is_torchvision_s_within_a_level():
    images = pictures()
    angles, shears = torch.linspace(-60, 60, 16), torch.linspace(20, -20, 16)
    zooms = torch.linspace(0.7, 1.3, 16)
    matrices = torch.tensor(
        [
            pil._get_inverse_affine_matrix([12, 12], angle, [3, -2], zoom, [shear, 5.0])
            for angle, zoom, shear in zip(
                angles.tolist(), zooms.tolist(), shears.tolist(), strict=True
            )
        ]
    )

    def change(image, angle, zoom, shear):
        bilinear = InterpolationMode.BILINEAR
        return pil.affine(image, angle, [3, -2], zoom, [shear, 5.0], interpolation=bilinear)

    expected = by_pillow(images, change, angles, zooms, shears)
    wrong = (op.affine(tensor(images).float(), matrices) - expected).abs()
    assert wrong.max() <= 1
    assert (wrong > 0).float().mean() < 0.005


def test_normalising_and_erasing_are_torchvision_s():
    images, mean, std = tensor(pictures()), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = pil.normalize(images / 255, mean, std)
    found = op.normalised(images.float(), mean, std)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    boxes = torch.tensor([[i, 2, 5, i + 1] for i in range(16)])
    erased = [pil.erase(v, *box, 0.0) for v, box in zip(found, boxes.tolist(), strict=True)]
    assert torch.equal(op.erased(found, boxes), torch.stack(erased))


# What is drawn


@pytest.mark.parametrize("image", [(32, 32), (24, 60)])
def test_crops_have_torchvision_s_distribution(image):
    scale, ratio, number = (0.08, 1.0), (3 / 4, 4 / 3), 3000
    ours = draw.crop_boxes(number, image, scale, ratio, generator()).numpy()
    blank = torch.empty(3, *image)
    get = transforms.RandomResizedCrop.get_params
    theirs = np.array([get(blank, list(scale), list(ratio)) for _ in range(number)])
    assert (ours >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= image).all()
    for boxes in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], *map(column, range(4))):
        like(boxes(ours), boxes(theirs))


def column(number):
    return lambda table: table[:, number]


@pytest.mark.parametrize("image", [(10, 40), (40, 10), (20, 20)])
def test_where_no_crop_fits_it_is_torchvision_s_in_the_middle(image):
    scale, ratio = [1.5, 2.0], [3 / 4, 4 / 3]
    box = transforms.RandomResizedCrop.get_params(torch.empty(3, *image), scale, ratio)
    found = draw.crop_boxes(3, image, scale, ratio, generator())
    assert found.tolist() == [list(box)] * 3


def test_erased_boxes_have_torchvision_s_distribution():
    scale, ratio, number = (0.02, 0.4), (0.3, 3.3), 3000
    ours = draw.erasing_boxes(number, (12, 20), scale, ratio, generator()).numpy()
    blank = torch.empty(3, 12, 20)
    get = transforms.RandomErasing.get_params
    theirs = np.array([get(blank, scale, ratio, [0.0])[:4] for _ in range(number)])
    for place in range(4):
        like(ours[:, place], theirs[:, place])


@pytest.mark.parametrize(
    ("translate", "scale", "shear"),
    [((0.1, 0.3), (0.7, 1.3), [-17.0, 17.0]), (None, None, [-5.0, 5.0, 10.0, 20.0])],
)
def test_affine_maps_have_torchvision_s_distribution(translate, scale, shear):
    number, degrees = 3000, (-20.0, 20.0)
    maps = draw.affine_matrices(number, (12, 20), degrees, translate, scale, shear, generator())
    theirs = np.array(
        [
            pil._get_inverse_affine_matrix(
                [10, 6],
                *transforms.RandomAffine.get_params(degrees, translate, scale, shear, [20, 12]),
            )
            for _ in range(number)
        ]
    )
    for place in range(6):
        like(maps[:, place], theirs[:, place].astype(np.float32))


def test_jitter_has_torchvision_s_ranges_and_orders():
    number = 3000
    transform, view = entry(color_jitter={**FULL["color_jitter"], "prob": 1.0})
    draws = view.draw(number, (24, 24), generator())
    (jitter,) = transform.transforms[1].transforms
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = [jitter.get_params(*ranges) for _ in range(number)]
    for place in range(4):
        like(draws.factors[:, place], [parameters[1 + place] for parameters in theirs])
    counts = Counter(map(tuple, draws.jitter.tolist()))
    assert set(counts) == {tuple(p[0].tolist()) for p in theirs}
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_every_operation_has_its_rate_and_independently_of_the_others():
    number = 20000
    rates = {"mirrored": 0.3, "grey": 0.2, "blurred": 0.6, "solarised": 0.1, "equalised": 0.7}
    keys = ("horizontal_flip", "grayscale", "gaussian_blur", "solarization", "equalization")
    probabilities = dict(zip(keys, ({"prob": rate} for rate in rates.values()), strict=True))
    _, view = entry(
        color_jitter={**FULL["color_jitter"], "prob": 0.8}, erasing={"prob": 0.4}, **probabilities
    )
    draws = view.draw(number, (24, 24), generator())
    found = {name: getattr(draws, name).float() for name in (*rates, "erased")}
    found["jittered"] = (draws.jitter != 4).all(dim=1).float()
    assert torch.equal(found["jittered"], (draws.jitter != 4).any(dim=1).float())
    for name, rate in {**rates, "erased": 0.4, "jittered": 0.8}.items():
        assert found[name].mean().item() == pytest.approx(rate, abs=4 * 0.5 / number**0.5), name
    correlations = torch.corrcoef(torch.stack(list(found.values()))) - torch.eye(len(found))
    assert correlations.abs().max() < 5 / number**0.5
    like(draws.sigmas, np.random.RandomState(0).uniform(0.1, 2.0, number))


def test_the_blur_has_solo_learn_s_sigmas():
    transform, _ = entry(gaussian_blur={"prob": 1.0})
    (blur,) = transform.transforms[1].transforms
    with mock.patch("random.uniform", side_effect=lambda low, high: low) as uniform:
        blur(Image.fromarray(pictures()[0]))
    assert [call.args for call in uniform.call_args_list] == [(0.1, 2.0)]


@pytest.mark.parametrize("name", ["grayscale", "solarization", "gaussian_blur", "horizontal_flip"])
def test_as_many_views_are_changed_as_solo_learn_changes(name):
    transform, view = entry(**{name: {"prob": 0.3}})
    plain, _ = entry()
    image, number = Image.fromarray(pictures()[3]), 600
    same = plain(image)
    copies = tensor([np.asarray(image)] * number)
    ours = view(copies, generator())
    theirs = [transform(image) for _ in range(number)]
    for views in (ours, theirs):
        # Blur of less than 0.2 pixels or so changes nothing.
        changed = np.mean([(v - same).abs().max().item() > 1e-4 for v in views])
        assert changed == pytest.approx(0.3 if name != "gaussian_blur" else 0.28, abs=0.08)


# Whole views


def test_operations_follow_each_other_as_in_solo_learn_s_pipeline():
    """With nothing left to chance; of these operations no two commute."""
    fixed = {
        "color_jitter": {
            "prob": 1.0,
            "brightness": 0.3,
            "contrast": 0.0,
            "saturation": 0.0,
            "hue": 0.0,
        },
        "affine": {"degrees": [30, 30], "translate": None},
        "grayscale": {"prob": 1.0},
        "solarization": {"prob": 1.0},
        "equalization": {"prob": 1.0},
        "horizontal_flip": {"prob": 1.0},
    }
    images = pictures()
    for keys in (fixed, {**fixed, "grayscale": {"prob": 0.0}}):
        transform, view = entry(size=24, **keys)
        (jitter,) = transform.transforms[2].transforms
        jitter.brightness = view.jitter.brightness = (1.3, 1.3)
        expected = torch.stack([transform(Image.fromarray(image)) for image in images])
        wrong = (view(tensor(images), generator()) - expected).abs()
        assert (wrong > 1e-5).float().mean() < 0.02
        assert torch.equal(view(tensor(images), generator(1)), view(tensor(images), generator(2)))


@pytest.mark.parametrize("seed", [0, 1])
def test_views_have_the_distribution_of_solo_learn_s(seed):
    transform, view = entry(**FULL)
    image, number = Image.fromarray(pictures()[2 * seed + 4]), 500
    torch.manual_seed(seed)
    theirs = torch.stack([transform(image) for _ in range(number)])
    ours = view(tensor([np.asarray(image)] * number), generator(seed))
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    for figure in (
        lambda v: v.mean((1, 2, 3)),
        lambda v: v.std((1, 2, 3)),
        lambda v: v.diff(dim=3).abs().mean((1, 2, 3)),
        lambda v: (v[:, 0] - v[:, 2]).mean((1, 2)),
        lambda v: (v[..., :12] - v[..., 12:]).mean((1, 2, 3)),
        lambda v: v.std(dim=1).mean((1, 2)),
    ):
        like(figure(ours), figure(theirs))


def test_a_view_without_a_crop_keeps_the_image_s_shape():
    images = pictures()[:, :, :15]
    transform, view = entry(size=12)
    found = view(tensor(images), generator())
    expected = torch.stack([transform(Image.fromarray(image)) for image in images])
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.01


# The loader


def device_config(file, **overrides):
    return tiny_config(data={"train_path": str(file), "pipeline": "device"}, **overrides)


def loader(file, place=None, **overrides):
    return training_loader(prepare_config(device_config(file, **overrides)), place)


@pytest.fixture
def file(tmp_path):
    return write_images(tmp_path / "a.npz", 21)


def test_batches_hold_the_images_their_indices_name(file):
    content = np.load(file)
    train = loader(file, augmentations=[{"crop_size": 16, "num_crops": 2}])
    transform, _ = entry(size=16, dataset="custom")
    seen = []
    for indices, views, targets in train:
        assert indices.dtype == targets.dtype == torch.int64
        assert len(views) == 2
        for index, first, second, target in zip(indices, *views, targets, strict=True):
            expected = transform(Image.fromarray(content["images"][index]))
            torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)
            assert torch.equal(first, second)
            assert target == content["labels"][index]
        seen += indices.tolist()
    assert len(set(seen)) == len(seen) == 16 == len(train) * 8


def test_views_differ_and_small_ones_follow_large_ones(file):
    crops = [
        {"crop_size": 16, "num_crops": 2, "rrc": FULL["rrc"]},
        {"crop_size": 8, "num_crops": 3, "rrc": FULL["rrc"]},
    ]
    gating = {"views": ["gated", "dense", "gated", "gated", "gated"]}
    _, views, _ = next(iter(loader(file, augmentations=crops, gating=gating)))
    assert [view.shape for view in views] == 2 * [(8, 3, 16, 16)] + 3 * [(8, 3, 8, 8)]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[2], views[4])


def epoch_of(train, epoch=0):
    train.sampler.set_epoch(epoch)
    return list(train)


def test_batches_follow_from_seed_epoch_and_rank_alone(file):
    first = epoch_of(loader(file), 3)
    train = loader(file)
    epoch_of(train, 1)
    again = epoch_of(train, 3)
    for (a, views, _), (b, others, _) in zip(first, again, strict=True):
        assert torch.equal(a, b)
        assert all(map(torch.equal, views, others))
    for other in (
        epoch_of(train, 2),
        epoch_of(loader(file, seed=1), 3),
        epoch_of(loader(file, Place(rank=1, processes=2)), 3),
    ):
        assert not torch.equal(other[0][0], first[0][0])


def test_processes_share_each_epoch_as_torch_s_sampler_does(file):
    for epoch in (0, 1):
        parts = [
            torch.cat(
                [batch[0] for batch in epoch_of(loader(file, Place(rank=r, processes=2)), epoch)]
            )
            for r in range(2)
        ]
        for rank, part in enumerate(parts):
            reference = DistributedSampler(
                range(21), num_replicas=2, rank=rank, shuffle=True, seed=0, drop_last=True
            )
            reference.set_epoch(epoch)
            assert part.tolist() == list(reference)[: len(part)]
        together = torch.cat(parts).tolist()
        assert len(set(together)) == len(together) == 16


def test_a_step_sees_no_difference_to_a_dataloader_s_batches(file):
    cfg = device_config(file)
    batches = list(training_loader(prepare_config(cfg)))
    rows = [
        (i, [v[n] for v in views], t)
        for indices, views, targets in batches
        for n, (i, t) in enumerate(zip(indices.tolist(), targets.tolist(), strict=True))
    ]
    model = tiny_model(cfg, dtype=torch.float32)
    for ours, theirs in zip(batches, DataLoader(rows, batch_size=8), strict=True):
        losses = []
        for batch in (ours, theirs):
            torch.manual_seed(0)
            losses.append(copy_of(model).training_step(batch, 0))
        assert torch.equal(*losses)


def made(cls, **attributes):
    dataset = cls.__new__(cls)
    vars(dataset).update(transform=None, target_transform=None, **attributes)
    return dataset


@pytest.mark.parametrize("name", ["cifar", "stl10"])
def test_arrays_of_torchvision_s_data_sets_are_their_images(name):
    images = pictures(20)
    if name == "cifar":
        dataset = made(tv.CIFAR10, data=images, targets=[n % 2 for n in range(20)])
    else:
        labels = np.array([n % 2 for n in range(20)])
        dataset = made(tv.STL10, data=images.transpose(0, 3, 1, 2), labels=labels)
    part = fraction_of(dataset, 0.5)
    assert isinstance(part, Subset)
    for each in (dataset, part):
        found, targets = arrays_of(each)
        for index in range(len(each)):
            image, target = each[index]
            assert np.array_equal(np.asarray(image), found[index])
            assert target == targets[index]


def test_images_that_would_take_more_than_half_of_the_memory_stay_on_the_host():
    device = SimpleNamespace(type="cuda")
    with mock.patch("torch.cuda.mem_get_info", return_value=(1000, 4000)):
        assert fits(500, device)
        assert not fits(501, device)
    assert fits(10**15, torch.device("cpu"))


def test_images_on_the_host_make_the_same_batches(file):
    expected = epoch_of(loader(file))
    train = loader(file)
    host = lambda here, there: send(train._images.index_select(0, here), train._place.device)  # noqa: E731
    with mock.patch.object(train, "_take", host):
        found = epoch_of(train)
    for (a, views, _), (b, others, _) in zip(expected, found, strict=True):
        assert torch.equal(a, b)
        assert all(map(torch.equal, views, others))


# What is refused


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pipeline": "gpu"}, r"^data.pipeline: got 'gpu', expected one of device, workers$"),
        ({"format": "image_folder"}, "^data.pipeline: got device .*format=image_folder.*workers"),
        ({"format": "h5"}, "^data.pipeline: got device .*format=h5, .*expected workers"),
        (
            {"dataset": "imagenet100", "format": "image_folder", "num_classes": None},
            "^data.pipeline: got device with data.dataset=imagenet100",
        ),
    ],
)
def test_data_that_is_not_in_memory_is_refused(data, message, file):
    with pytest.raises(InputError, match=message):
        prepare_config(OmegaConf.merge(device_config(file), {"data": data}))


def test_without_kornia_it_is_named(file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "kornia" else find(name)
    )
    with pytest.raises(InputError, match=r"^data.pipeline: got device, .*pip install kornia"):
        prepare_config(device_config(file))


def test_images_of_two_sizes_and_fewer_than_a_batch_for_each_process_are_refused(file, tmp_path):
    write_images(tmp_path / "b.npz", 4, size=8)
    with pytest.raises(InputError, match=r"^data.train_path: got images of different sizes"):
        loader(tmp_path / "*.npz")
    with pytest.raises(InputError, match=r"^optimizer.batch_size: got 8 on 3 processes with 21"):
        loader(file, Place(processes=3))


@pytest.mark.parametrize(("pipeline", "most"), [("workers", 7), ("device", 6)])
def test_each_of_several_processes_has_a_batch(pipeline, most, tmp_path):
    pytest.importorskip("kornia")
    write_images(tmp_path / "a.npz", 20)

    def of_three(batch):
        cfg = device_config(tmp_path / "a.npz")
        cfg.data.pipeline, cfg.optimizer.batch_size = pipeline, batch
        return training_loader(prepare_config(cfg), Place(processes=3))

    of_three(most)
    with pytest.raises(InputError, match=rf"got {most + 1} on 3 processes with 20.*most {most} "):
        of_three(most + 1)


def test_lightning_s_overfitting_is_refused(file):
    cfg = device_config(file)
    cfg.overfit_batches = 2
    with pytest.raises(InputError, match=r"^overfit_batches: got 2 with data.pipeline=device"):
        prepare_config(cfg)


# The benchmark


def options_of(folder, **changes):
    overrides = [
        *("data.format=npz", f"data.train_path={folder}/a.npz"),
        *("optimizer.batch_size=8", "data.num_workers=4"),
    ]
    options = {"config_name": "vicreg_dual_cifar10", "seconds": 0.01, "threads": 1}
    options |= {"output": folder / "out", "overrides": overrides, **changes}
    return SimpleNamespace(**options)


def test_the_benchmark_times_both_pipelines(file, tmp_path):
    report = benchmark_data(options_of(tmp_path))
    assert json.loads((tmp_path / "out/benchmark_data.json").read_text()) == report
    baseline, device, *_ = report["rows"]
    assert [baseline["pipeline"], device["pipeline"]] == ["workers", "device, CPU"]
    assert baseline["ratio"] == 1
    for row in report["rows"]:
        assert row["images_per_second"] * row["milliseconds"] == pytest.approx(8000)
        assert row["rounds"] >= 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0}, "^seconds: got 0, expected a number > 0"),
        ({"config_name": "vicreg"}, "^config-name: got 'vicreg', expected one of"),
        ({"overrides": ["data.train_pth=x"]}, "data.train_pth"),
        ({"overrides": []}, "^data.train_path|^data.pipeline"),
    ],
)
def test_what_the_benchmark_cannot_time_is_refused(changes, message, file, tmp_path, monkeypatch):
    monkeypatch.setattr(tv.CIFAR10, "download", mock.Mock(side_effect=OSError("offline")))
    with pytest.raises(InputError, match=message):
        benchmark_data(options_of(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


# A run


def test_a_run_goes_on_with_the_order_and_views_it_would_have_had(tmp_path, file, monkeypatch):
    cfg = device_config(
        file,
        max_epochs=2,
        augmentations=[{"crop_size": 16, "num_crops": 2, **FULL}],
        checkpoint={"enabled": True, "dir": str(tmp_path / "runs")},
        auto_resume={"enabled": True},
    )
    seen, make = [], DeviceLoader.__iter__

    def kill(epoch):
        def batches(self):
            for batch in make(self):
                if self.sampler.epoch == epoch:
                    raise RuntimeError("killed")
                seen.append((self.sampler.epoch, batch[0].tolist(), batch[1][1].sum().item()))
                yield batch

        monkeypatch.setattr(DeviceLoader, "__iter__", batches)

    kill(1)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(cfg.copy())
    assert {epoch for epoch, _, _ in seen} == {0}
    kill(None)
    metrics = pretrain(cfg.copy())
    assert metrics["steps"] == 4
    assert metrics["data"]["train_images"] == 21
    assert np.isfinite(metrics["logged"]["train_vicreg_loss"])
    stopped = seen.copy()
    seen.clear()
    cfg.checkpoint.dir = str(tmp_path / "whole")
    pretrain(cfg)
    assert stopped == seen
    assert [epoch for epoch, _, _ in seen] == [0, 0, 1, 1]
