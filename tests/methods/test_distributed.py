"""Two processes with a batch of B each give the gradients of one process with 2·B, and go on alike."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from solo_gating import InputError
from solo_gating.budgets import WidthSchedule
from solo_gating.evaluate.extract import extract
from solo_gating.files import read_json
from solo_gating.main_knn import evaluate_knn
from solo_gating.methods import gated
from solo_gating.training import pretrain
from solo_gating.training.checkpoints import Checkpointer

from ..support.encoders import VAL, digit_tensors, evaluation_config, loader, tiny_backbone
from ..support.helpers import (
    default_dtype,
    of_two_processes,
    random_batch,
    student_config,
    tiny_config,
    tiny_model,
    with_resnet10,
    write_teacher,
)
from ..training.test_randomness import (
    assert_same,
    last_checkpoint,
    logged_by,
    small_config,
    write_data,
)

RANGE = "vicreg_dual over a range of budgets"
PER_IMAGE = "vicreg_dual with a budget for each image"
DISTILLED = "vicreg_distilled"
# With a gate that scales, one with a penalty of its batch, and one whose views differ.
KINDS = ("vicreg_dual with fbs gates", "vicreg_dual with dgc gates", "simsiam_gated with cdg gates")
MOMENTUM = ("byol_dual", "mocov2plus_dual", "nnbyol_gated")
METHODS = ("vicreg_dual", "simsiam_gated", RANGE, PER_IMAGE, DISTILLED, *KINDS, *MOMENTUM)
LOCAL = "vicreg_dual with shares of each process"
BATCH = 4  # per process
SHALLOW = {"name": "resnet10_gated"}
PIPELINES = ("workers", "device")
PATHS = ("dense", "gated")


class SumOverProcesses(torch.autograd.Function):
    """All-reduce; so is its gradient, as every process's loss depends on every process's part."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm(nn.Module):
    """BatchNorm in training over all processes; PyTorch's SyncBatchNorm refuses CPU tensors."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        moments = torch.stack([x.mean(dims), x.square().mean(dims)])
        if dist.is_initialized():
            moments = SumOverProcesses.apply(moments) / dist.get_world_size()
        mean, square = moments
        x = (x - mean.view(shape)) / (square - mean**2 + self.eps).sqrt().view(shape)
        return x if self.weight is None else x * self.weight.view(shape) + self.bias.view(shape)


def synchronise(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, GlobalBatchNorm(child))
        else:
            synchronise(child)


class Step(nn.Module):
    """A training step as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.training_step(batch, 0)


def rows_of_one_table(rows: slice):
    """Logistic noise of which each process gets the rows of its images."""
    rng = np.random.RandomState(5)

    def noise(logits: Tensor) -> Tensor:
        table = rng.logistic(size=(2 * BATCH, logits.shape[1]))
        return torch.from_numpy(table[rows])

    return mock.patch("solo_gating.gates.channel.logistic_noise", noise)


def gradients(method: str, rows: slice, parallel: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Of a step with some of the images, and the FLOPs share that was logged."""
    target: Any = [0.05, 0.9] if method in (RANGE, PER_IMAGE) else 0.1
    gating: dict[str, Any] = {"budget_per_image": True} if method == PER_IMAGE else {}
    gating |= {"target_budget": target, "sparsity_weight": 1000.0, "bound_weight": 100.0}
    if method in KINDS:
        gating |= {"gate": method.split()[2], "gate_kwargs": {"penalty_weight": 10.0}}
    model = tiny_model(tiny_config(method.split()[0], backbone=SHALLOW, gating=gating), epoch=2)
    model._trainer.global_step = 17
    synchronise(model)
    indices, views, targets = random_batch(2 * BATCH)
    batch = [indices[rows], [view[rows] for view in views], targets[rows]]
    step = DistributedDataParallel(Step(model)) if parallel else Step(model)
    with rows_of_one_table(rows):
        step(batch).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found, model.logged["train_flops_share"]


def student_steps(folder: Path, rows: slice, parallel: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Of SEED's second step, and the queue behind it."""
    with default_dtype(torch.float64):
        model = tiny_model(student_config("seed", folder / "teacher.pt"))
        synchronise(model)
        step = DistributedDataParallel(Step(model)) if parallel else Step(model)
        for number in range(2):
            indices, views, targets = random_batch(2 * BATCH, seed=number)
            model.zero_grad()
            step([indices[rows], [views[0][rows]], targets[rows]]).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model.queue


def queue_after(rows: slice) -> tuple[Tensor, Tensor]:
    """MoCo's queue after a step with some of the images, and its place."""
    with default_dtype(torch.float64):
        model = tiny_model(tiny_config("mocov2plus_dual", backbone=SHALLOW))
        indices, views, targets = random_batch(2 * BATCH)
        model.momentum_backbone.eval()  # no statistics of a process's own batch
        with mock.patch.object(model, "log"), mock.patch.object(model, "log_dict"):
            model.training_step([indices[rows], [v[rows] for v in views], targets[rows]], 0)
    return model.queue, model.queue_ptr


@with_resnet10()
def process(rank: int) -> dict[str, Any]:
    rows = slice(rank * BATCH, (rank + 1) * BATCH)
    with default_dtype(torch.float64):
        results = {method: gradients(method, rows, parallel=True) for method in METHODS}
        with mock.patch.object(gated, "global_mean", lambda values: values):
            results[LOCAL] = gradients("vicreg_dual", rows, parallel=True)
    results["seed"] = student_steps(Path(os.environ["SHARED_FOLDER"]), rows, parallel=True)
    results["queue"] = queue_after(rows)
    results["full disk"] = a_full_disk(rank)
    results["extraction"] = extraction()
    results |= {pipeline: runs(rank, pipeline) for pipeline in PIPELINES}
    results["us3l"] = us3l_run()
    return results | {"knn": evaluation(Path(os.environ["SHARED_FOLDER"]), 2)}


def extraction() -> dict[str, Any]:
    """What both processes find of 31 images, and the error of one with more processes than images."""
    backbone, (images, targets) = tiny_backbone(), digit_tensors(VAL)
    batches = loader(images, targets, 4)
    found: dict[str, Any] = {path: extract(backbone, batches, path) for path in PATHS}
    try:
        extract(backbone, loader(images[:1]), "dense")
    except InputError as error:
        found["error"] = str(error)
    return found


def a_full_disk(rank: int) -> str:
    """What each process raises if the first one cannot write a checkpoint."""

    def save(file: Any, weights_only: bool) -> None:  # as Lightning's Trainer
        if rank == 0:
            raise InputError("the disk is full")
        dist.barrier()

    def broadcast(what: Any) -> Any:
        box = [what]
        dist.broadcast_object_list(box)
        return box[0]

    strategy = SimpleNamespace(barrier=dist.barrier, broadcast=broadcast)
    trainer: Any = SimpleNamespace(
        save_checkpoint=save,
        strategy=strategy,
        is_global_zero=rank == 0,
        current_epoch=0,
        max_epochs=1,
        should_stop=False,
        fast_dev_run=False,
    )
    cfg = tiny_config(checkpoint={"frequency": 1, "keep_prev": True})
    try:
        Checkpointer(cfg, Path("absent")).on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    except InputError as error:
        return str(error)
    return "nothing"


def runs(rank: int, pipeline: str) -> list[Any]:
    """Of both processes together: a whole run, and one that is killed and continued."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_PORT": "0"}  # Lightning starts none then
    found = []
    for kills in ((), ((1, 0),)):
        folder = Path(os.environ["SHARED_FOLDER"])
        cfg = small_config(
            folder,
            backbone=SHALLOW,
            devices=2,
            strategy="ddp",
            data={"pipeline": pipeline},
            checkpoint={"dir": str(folder / f"{pipeline}-{len(kills)}")},
        )
        logged = logged_by(cfg, *kills)
        dist.barrier()  # the first one writes
        found.append((last_checkpoint(cfg), logged))
    return found


def us3l_run() -> dict[str, Any]:
    """Of both processes together, after `runs`: the widths of each batch, and the weights in the end."""
    folder = Path(os.environ["SHARED_FOLDER"])
    cfg = small_config(
        folder,
        "us3l",
        backbone=SHALLOW,
        devices=2,
        strategy="ddp",
        optimizer={"weight_decay": 0.0},
        momentum={"base_tau": 0.9, "final_tau": 0.9},
        checkpoint={"dir": str(folder / "us3l")},
    )
    drawn, models = [], []
    draw, build = WidthSchedule.at, pretrain.build_model

    def recorded(self: WidthSchedule, *place: Any) -> tuple[float, ...]:
        drawn.append((place, draw(self, *place)))
        return drawn[-1][1]

    def kept(cfg: Any) -> Any:
        models.append(build(cfg))
        return models[-1]

    with (
        mock.patch.object(WidthSchedule, "at", recorded),
        mock.patch.object(pretrain, "build_model", kept),
    ):
        logged_by(cfg)
    return {"drawn": drawn, "weights": models[0].state_dict()}


def evaluation(folder: Path, processes: int) -> dict[str, Any]:
    """What `main_knn` finds of the first of these runs."""
    (checkpoint,) = (folder / f"{PIPELINES[0]}-0").glob("*/*/last.ckpt")
    overrides = ["k=1", f"devices={processes}", f"output={folder / f'knn-{processes}'}"]
    return evaluate_knn(evaluation_config("knn", checkpoint, *overrides))


@pytest.fixture(scope="module", autouse=True)
def _shallow():
    with with_resnet10():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder):
    """What both processes found."""
    write_data(folder, processes=2)
    write_teacher(folder / "teacher.pt")
    return of_two_processes(process, folder)


def one(method):
    with default_dtype(torch.float64):
        return gradients(method, slice(None), parallel=False)


def distance(found, expected):
    """Largest difference of a gradient, relative to that parameter's largest."""
    assert set(found) == set(expected)
    floor = 1e-6 * max(value.abs().max() for value in expected.values())
    return max(
        ((found[n] - expected[n]).abs().max() / (expected[n].abs().max() + floor)).item()
        for n in expected
    )


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_gradients_of_one(method, two):
    expected, share = one(method)
    for rank in range(2):
        found, its_share = two[rank][method]
        assert distance(found, expected) < 1e-5
        assert its_share.item() == pytest.approx(share.item(), rel=1e-10)
    assert any(".gate." in name for name in expected)
    assert not [name for name in expected if name.startswith("momentum_")]


def test_two_processes_have_one_queue_of_mocov2plus(two):
    queue, pointer = queue_after(slice(None))
    for found in two:
        torch.testing.assert_close(found["queue"][0], queue, rtol=1e-9, atol=1e-9)
        assert torch.equal(found["queue"][1], pointer)
    assert int(pointer) == 2 * BATCH


def test_two_processes_have_one_queue_of_seed(two, folder):
    """That of one process with the whole batch: of two steps, in the order of the processes."""
    expected, queue = student_steps(folder, slice(None), parallel=False)
    assert len(queue) == 2 * 2 * BATCH
    for rank in range(2):
        found, its_queue = two[rank]["seed"]
        assert distance(found, expected) < 1e-8
        torch.testing.assert_close(its_queue, queue, rtol=1e-12, atol=0)


def test_a_budget_of_each_process_s_own_share_would_differ(two):
    """The check above notices a loss that is not global: the processes' shares differ enough."""
    expected, _ = one("vicreg_dual")
    assert distance(two[0][LOCAL][0], expected) > 1e-3
    assert abs(two[0][LOCAL][1] - two[1][LOCAL][1]) > 1e-3


def test_no_process_waits_for_one_that_cannot_write(two):
    assert [found["full disk"] for found in two] == ["the disk is full"] * 2


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_two_processes_go_on_like_two_that_were_not_killed(pipeline, two):
    for found in two:
        whole, continued = found[pipeline]
        assert_same(continued, whole)


def test_two_processes_train_the_same_widths_and_keep_the_same_weights(two):
    expected = [
        ((0, epoch, batch), WidthSchedule(0.25, 3).at(0, epoch, batch))
        for epoch in range(3)
        for batch in range(2)
    ]
    first, second = (found["us3l"] for found in two)
    assert first["drawn"] == second["drawn"] == expected
    for name, value in first["weights"].items():
        if "running" not in name:  # statistics of each process's images
            assert torch.equal(value, second["weights"][name]), name


def test_two_processes_find_what_one_finds(two):
    """Of 31 images one process has 16, the other 15."""
    both = [found["extraction"] for found in two]
    backbone, (images, targets) = tiny_backbone(), digit_tensors(VAL)
    for path in PATHS:
        expected = extract(backbone, loader(images, targets), path)
        for found in (both[0][path], both[1][path]):
            torch.testing.assert_close(found.features, expected.features, rtol=1e-4, atol=1e-5)
            assert torch.equal(found.targets, targets)
            assert found.flops == expected.flops
            if path == "gated":
                assert torch.equal(found.channels, expected.channels)
            for ours, theirs in zip(found.selected, expected.selected, strict=True):
                assert torch.equal(ours, theirs)
    for found in both:
        assert found["error"].startswith("devices: got 2 processes for 1 images")


def test_two_processes_evaluate_a_checkpoint_as_one_does(two, folder):
    one = evaluation(folder, 1)
    written = read_json(folder / "knn-2" / "metrics.json")
    for path in PATHS:
        assert one[path] == written[path] == two[0]["knn"][path] == two[1]["knn"][path]
