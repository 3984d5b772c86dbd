"""No step waits for a GPU: on machines that have none, with tensors that have shapes and no values."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solo_gating.data import Place
from solo_gating.data.augmentations import check_augmentations
from solo_gating.data.device import loader as device_loader
from solo_gating.data.device import views as device_views
from solo_gating.data.device.loader import DeviceLoader
from solo_gating.flops import count_flops
from solo_gating.main_pretrain import pretrain
from solo_gating.solo_learn import LINE
from solo_gating.training.callbacks import StopAtNonFiniteLoss

from ..data.test_device_pipeline import FULL
from ..support.helpers import random_batch, tiny_config, tiny_model, write_images
from .test_distributed import Step

aten = torch.ops.aten

each_method = pytest.mark.parametrize(
    ("method", "gating"),
    [
        ("vicreg", {}),
        ("vicreg_dual", {}),
        ("vicreg_dual", {"target_budget": [0.1, 0.9]}),
        ("vicreg_dual", {"target_budget": [0.1, 0.9], "budget_per_image": True}),
        ("simsiam_gated", {}),
        ("simclr_dual", {}),
        ("barlow_dual", {}),
    ],
)
LARS = {
    "name": "lars",
    "kwargs": {"eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True, "momentum": 0.9},
}


class _NoWaitingCopies(TorchDispatchMode):
    """Refuses copies between host and GPU for which the host waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            asynchronous = kwargs.get("non_blocking") or args[2:3] == (True,)
            if {t.device.type for t in tensors} == {"cpu", "cuda"} and not asynchronous:
                raise AssertionError("a copy that the host waits for")
        return out


@contextmanager
def gpu_without_values(mode=None):
    """New tensors have no values; what reads one, or mixes devices, raises, and so do waiting copies."""
    unpinned = mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with mode or FakeTensorMode(), unpinned, _NoWaitingCopies():
        yield


def test_what_waits_is_noticed():
    with gpu_without_values():
        x = torch.ones(3, device="cuda")
        with pytest.raises(AssertionError, match="waits"):
            x.new_tensor([1.0, 2.0, 3.0])
        with pytest.raises(AssertionError, match="waits"):
            x.cpu()
        with pytest.raises(DataDependentOutputException):
            float(x.sum())
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(3)


@each_method
def test_forward_pass_losses_optimiser_and_validation(method, gating):
    """A step in single precision, and one in mixed."""
    if LINE == "legacy" and method == "simclr_dual":
        pytest.skip("1.0.2's SimCLR sends the GPU a zero to log")
    cfg = tiny_config(method, optimizer=LARS, **({"gating": gating} if gating else {}))
    flops = count_flops(tiny_model(cfg).backbone, (16, 16))  # once in a run
    mode = FakeTensorMode()
    with mode, torch.device("cuda"):
        model = tiny_model(cfg, epoch=2, dtype=None)
        views = [torch.randn(8, 3, 16, 16) for _ in range(2)]
        batch = [torch.arange(8), views, torch.zeros(8, dtype=torch.int64)]
    if method != "vicreg":
        model._flops[16, 16] = flops
    (optimizer,), _ = model.configure_optimizers()
    callback = StopAtNonFiniteLoss()
    with gpu_without_values(mode):
        for step, mixed in enumerate([False, True]):
            with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
                loss = model.training_step(batch, 0)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            trainer = SimpleNamespace(
                callback_metrics={f"{name}_step": value for name, value in model.logged.items()},
                global_step=step + 1,
                log_every_n_steps=50,
            )
            callback.on_train_batch_end(trainer, model, loss, batch, step)
        assert loss.device.type == "cuda"
        model.eval()
        with torch.no_grad():
            model.validation_step([views[0], batch[2]], 0)


@each_method
def test_backward_pass(method, gating):
    """On the host: PyTorch's autograd asks for a real GPU."""
    cfg = tiny_config(method, **({"gating": gating} if gating else {}))
    model = tiny_model(cfg, dtype=torch.float32)
    if method != "vicreg":
        model.flops((16, 16))  # once in a run
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor
    indices, views, targets = random_batch(dtype=torch.float32)
    batch = [fake(indices), [fake(view) for view in views], fake(targets)]
    state = [*model.named_parameters(), *model.named_buffers()]
    step = Step(model)
    with mode:
        weights = {f"model.{name}": fake(tensor) for name, tensor in state}
        loss = torch.func.functional_call(step, weights, (batch,))
        loss.backward()
    assert loss.shape == ()
    with pytest.raises(DataDependentOutputException):
        float(loss)


def test_views_made_on_the_device():
    entry = {"crop_size": 24, "num_crops": 1, **FULL, "affine": {"degrees": 30}, "erasing": {}}
    entries = OmegaConf.create([entry])
    check_augmentations(entries)
    view = device_views.DeviceView("cifar10", entries[0])
    draws = view.draw(32, (24, 24), torch.Generator().manual_seed(0))
    groups = device_views._Groups(draws, torch.device("cpu"))  # drawn on the host, with values
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for table in (groups.floats, groups._order):
            table.update({n: mode.from_tensor(t).to("cuda") for n, t in table.items()})
    with (
        gpu_without_values(mode),
        mock.patch.object(device_views, "_Groups", return_value=groups),
    ):
        images = torch.zeros(32, 3, 24, 24, dtype=torch.uint8, device="cuda")
        assert view.apply(images, draws).device.type == "cuda"


@pytest.mark.parametrize("fits", [True, False])
def test_batches_of_images_on_the_device_or_the_host(fits):
    def view(images, generator):
        return images.float()

    images, targets = np.zeros((20, 8, 8, 3), np.uint8), np.zeros(20)
    place = Place(torch.device("cuda"))
    loader = DeviceLoader(images, targets, [(view, 2)], batch_size=8, seed=0, place=place)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, mock.patch.object(device_loader, "fits", return_value=fits):
        loader._move()  # once in a run
    order = mock.MagicMock()  # a drawn one has values, too
    order.__iter__.return_value = range(20)
    order.__len__.return_value = 20
    loader.sampler = order
    with gpu_without_values(mode), mock.patch.object(device_loader, "batch_generator"):
        batches = list(loader)
    assert len(batches) == 2
    for indices, views, labels in batches:
        assert {t.device.type for t in (indices, *views, labels)} == {"cuda"}


class _Reads(TorchDispatchMode):
    """Counts the numbers that the host asks tensors for."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_lightning_reads_no_more_figures_in_a_run_with_more_steps(tmp_path, monkeypatch):
    fit, reads = Trainer.fit, []

    def counted(*args, **kwargs):
        with _Reads() as counter:
            fit(*args, **kwargs)
        reads.append(counter.number)

    monkeypatch.setattr(Trainer, "fit", counted)
    for images in (16, 40):
        data = {"train_path": str(write_images(tmp_path / "a.npz", images)), "pipeline": "device"}
        metrics = pretrain(tiny_config(data=data, log_every_n_steps=100))
        assert metrics["steps"] == 2 * images // 8
    assert reads[0] == reads[1] > 0
