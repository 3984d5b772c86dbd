"""One optimiser step of a method on a random batch, as a recipe configures it."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from ...config.compose import composed
from ...config.pretraining import prepare_config, scale_learning_rates
from ...training.model import build_model
from ..machine import now
from .memory import added_bytes, bytes_of

# Of `configs`, those of CIFAR-100; for every one `vicreg` is the dense baseline.
RECIPES = (
    "vicreg",
    "vicreg_dual",
    "vicreg_gated",
    "vicreg_dual_two_encoders",
    "vicreg_any",
    "vicreg_distilled",
)
OPTIMIZATIONS = ("lars", "sgd", "adamw")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")

# Beyond this size ResNets have the stem for ImageNet.
_CIFAR_UP_TO = 64


@dataclass(frozen=True)
class Setup:
    """What all methods that are compared have in common.

    Attributes:
        batch: images of a view.
        resolution: of the images, in pixels.
        width: of the backbone's first stage.
        projector: width of the projector's layers.
        optimization: of `configs/optimization`.
        precision: as Lightning names it.
        channels_last: the memory format of images and weights.
        compile: whether backbone and projector are compiled.
        fused: whether the optimiser is PyTorch's fused one.
        accelerator: as Lightning names it.
        seed: of the weights, the batch and the gates' noise.
    """

    batch: int
    resolution: int
    width: int = 64
    projector: int = 2048
    optimization: str = "lars"
    precision: str = "32-true"
    channels_last: bool = True
    compile: bool = False
    fused: bool = False
    accelerator: str = "auto"
    seed: int = 0

    def config(self, recipe: str) -> DictConfig:
        """The complete config of a recipe of `RECIPES`, learning rates scaled."""
        small = self.resolution <= _CIFAR_UP_TO
        overrides = [
            f"optimization={self.optimization}",
            # solo-learn gives every ResNet on CIFAR the stem for small images, whatever its own is.
            f"data.dataset={'cifar100' if small else 'imagenet100'}",
            "data.val_path=null",
            f"seed={self.seed}",
            f"optimizer.batch_size={self.batch}",
            f"++backbone.kwargs.width={self.width}",
            f"++backbone.kwargs.stem={'cifar' if small else 'imagenet'}",
            f"method_kwargs.proj_hidden_dim={self.projector}",
            f"method_kwargs.proj_output_dim={self.projector}",
            f"performance.disable_channel_last={not self.channels_last}",
            f"performance.compile={self.compile}",
            *(["+optimizer.kwargs.fused=true"] if self.fused else []),
        ]
        cfg = composed(f"{recipe}_cifar100", overrides)
        cfg = prepare_config(cfg)
        scale_learning_rates(cfg, 1)
        return cfg


class TrainingStep:
    """What Lightning does in a step with automatic optimisation: forward, backward, optimiser.

    Without a Trainer: no data is loaded, and nothing is logged. The batch is a random one and
    stays the same.

    Args:
        recipe: of `RECIPES`.
        setup: what the step has in common with those that it is compared with.
    """

    def __init__(self, recipe: str, setup: Setup):
        fabric = Fabric(accelerator=setup.accelerator, devices=1, precision=setup.precision)  # type: ignore[arg-type]
        self._fabric = fabric
        self.device = fabric.device
        self.model: Any = build_model(setup.config(recipe)).to(fabric.device).train()
        self.model._trainer = SimpleNamespace(
            current_epoch=0, global_step=0, estimated_stepping_batches=1000, sanity_checking=False
        )
        self.model.log = self.model.log_dict = lambda *args, **kwargs: None
        (optimizer,), _ = self.model.configure_optimizers()
        self.optimizer: Any = fabric.setup_optimizers(optimizer)
        generator = torch.Generator().manual_seed(setup.seed)
        size = (setup.batch, 3, setup.resolution, setup.resolution)
        views = [torch.randn(size, generator=generator).to(self.device) for _ in range(2)]
        targets = torch.randint(0, 100, (setup.batch,), generator=generator)
        self.batch: list[Any] = [torch.arange(setup.batch), views, targets.to(self.device)]

    def __call__(self) -> Tensor:
        """One step; its loss. Gradients stay until the next one, as under Lightning."""
        with self._fabric.autocast():
            loss = self.model.training_step(self.batch, 0)
        self.optimizer.zero_grad()
        self._fabric.backward(loss)
        self.optimizer.step()
        self.model._trainer.global_step += 1
        return loss.detach()

    def timed(self) -> None:
        """One step, until the device has finished it."""
        self()
        now(self.device)

    @property
    def held_bytes(self) -> int:
        """Bytes of weights, the optimiser's state, the batch, and gradients if there are any."""
        weights = [*self.model.parameters(), *self.model.buffers()]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        states = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return bytes_of([*weights, *gradients, *states, *self.batch[1], self.batch[2]])

    def peak_bytes(self) -> int:
        """The most that the step, once the optimiser has its state, holds at any moment."""
        self.optimizer.zero_grad()

        def steps() -> None:
            self()  # the second one begins with gradients, as every step but a run's first
            self()

        return self.held_bytes + added_bytes(steps, self.device)
