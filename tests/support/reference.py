"""A gated ResNet written from the formulas: loops over images and blocks, weights by name.

And what trains it: the losses of three methods, and SGD with LARS. Nothing here calls the package. Evaluation really computes only the selected channels and counts
the multiply-accumulates of the convolutions it does.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 2 / 3
EPS = 1e-5

Weights = dict[str, Tensor]


class StraightThrough(torch.autograd.Function):
    """Forward: soft ≥ 0.5; backward: d soft / d logits = soft (1 − soft) / τ."""

    @staticmethod
    def forward(ctx, logits, noise):
        soft = 1 / (1 + torch.exp(-(logits + noise) / TEMPERATURE))
        ctx.save_for_backward(soft)
        return (soft >= 0.5).to(logits.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (soft,) = ctx.saved_tensors
        return gradient * soft * (1 - soft) / TEMPERATURE, None


class NumberSelected(torch.autograd.Function):
    """Forward: Σ mask; backward: 1 for what is selected, 0 for the rest, as of an L1 norm at 0."""

    @staticmethod
    def forward(ctx, mask):
        ctx.save_for_backward(mask)
        return mask.sum()

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        return gradient * (mask > 0.5).to(mask.dtype)


class Counter:
    """Convolves, and counts multiply-accumulates per image."""

    def __init__(self):
        self.macs = 0

    def conv(self, x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        out = F.conv2d(x, weight, stride=stride, padding=padding)
        self.macs += out[0].numel() * weight[0].numel()
        return out


class Reference:
    """The network of one encoder.

    Args:
        weights: as in torchvision's state dict, with `gate.*` and perhaps `gated_bn1`, `gated_bn2`.
        stem: "cifar" or "imagenet".
        depth: blocks of each stage.
    """

    def __init__(self, weights: Weights, stem: str, depth: tuple[int, ...] = (2, 2, 2, 2)):
        self.w = weights
        self.stem = stem
        self.blocks = [f"layer{s + 1}.{b}" for s, blocks in enumerate(depth) for b in range(blocks)]

    def norm(self, x: Tensor, name: str, training: bool, channels=slice(None)) -> Tensor:
        shape = (1, -1, 1, 1)
        if training:
            mean = x.mean(dim=(0, 2, 3))
            variance = ((x - mean.view(shape)) ** 2).mean(dim=(0, 2, 3))
        else:
            mean = self.w[f"{name}.running_mean"][channels]
            variance = self.w[f"{name}.running_var"][channels]
        x = (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + EPS)
        scale, shift = self.w[f"{name}.weight"][channels], self.w[f"{name}.bias"][channels]
        return x * scale.view(shape) + shift.view(shape)

    def after_stem(self, images: Tensor, training: bool, count: Counter) -> Tensor:
        stride, padding = (1, 2) if self.stem == "cifar" else (2, 3)
        x = count.conv(images, self.w["conv1.weight"], stride, padding)
        x = F.relu(self.norm(x, "bn1", training))
        return x if self.stem == "cifar" else F.max_pool2d(x, 3, 2, 1)

    def shortcut(self, x: Tensor, block: str, stride: int, training: bool, count: Counter):
        weight = self.w.get(f"{block}.downsample.0.weight")
        if weight is None:
            return x
        return self.norm(count.conv(x, weight, stride), f"{block}.downsample.1", training)

    def logits(self, x: Tensor, block: str, training: bool, count: Counter) -> Tensor:
        pooled = x.mean(dim=(2, 3), keepdim=True)
        hidden = count.conv(pooled, self.w[f"{block}.gate.reduce.weight"])
        hidden = F.relu(self.norm(hidden, f"{block}.gate.norm", training))
        return count.conv(hidden, self.w[f"{block}.gate.expand.weight"])[:, :, 0, 0]

    def norms(self, block: str, path: str) -> tuple[str, str]:
        own = path == "gated" and f"{block}.gated_bn1.weight" in self.w
        return tuple(f"{block}.{'gated_' if own else ''}bn{i}" for i in (1, 2))

    def stride(self, block: str) -> int:
        return 2 if block.endswith(".0") and not block.startswith("layer1") else 1

    def evaluate(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Gated path, one image at a time: features, one mask per block, FLOPs of each image."""
        features, masks, flops = [], [[] for _ in self.blocks], []
        for image in images:
            count = Counter()
            x = self.after_stem(image[None], False, count)
            for index, block in enumerate(self.blocks):
                on = self.logits(x, block, False, count)[0] >= 0
                bn1, bn2 = self.norms(block, "gated")
                stride = self.stride(block)
                out = torch.zeros(())
                if on.any():
                    hidden = count.conv(x, self.w[f"{block}.conv1.weight"][on], stride, 1)
                    hidden = F.relu(self.norm(hidden, bn1, False, on))
                    out = count.conv(hidden, self.w[f"{block}.conv2.weight"][:, on], 1, 1)
                side = self.shortcut(x, block, stride, False, count)
                x = F.relu(self.norm(out.expand_as(side), bn2, False) + side)
                masks[index].append(on)
            features.append(x.mean(dim=(2, 3))[0])
            flops.append(count.macs)
        return torch.stack(features), [torch.stack(m) for m in masks], torch.tensor(flops)

    def dense_flops(self, images: Tensor) -> int:
        count = Counter()
        self.forward(images[:1], "dense", training=False, count=count)
        return count.macs

    def forward(self, images: Tensor, path: str, noises=None, training=True, count=None):
        """Features, and on the gated path the sampled masks; gradients flow to the weights."""
        count = count or Counter()
        x = self.after_stem(images, training, count)
        masks = []
        for index, block in enumerate(self.blocks):
            bn1, bn2 = self.norms(block, path)
            stride = self.stride(block)
            hidden = count.conv(x, self.w[f"{block}.conv1.weight"], stride, 1)
            hidden = F.relu(self.norm(hidden, bn1, training))
            if path == "gated":
                logits = self.logits(x, block, training, Counter())
                mask = StraightThrough.apply(logits, noises[index])
                hidden = hidden * mask[:, :, None, None]
                masks.append(mask)
            out = self.norm(
                count.conv(hidden, self.w[f"{block}.conv2.weight"], 1, 1), bn2, training
            )
            x = F.relu(out + self.shortcut(x, block, stride, training, count))
        return x.mean(dim=(2, 3)), masks

    def flops_share(self, masks: list[Tensor], images: Tensor) -> Tensor:
        """F^R / F^O with F^R averaged over the batch, from k²·H·W·(C_in·n + n·C_out)."""
        size = images.shape[-1]
        size = size + 2 if self.stem == "cifar" else (size - 1) // 2 + 1
        total = self.w["conv1.weight"].numel() * size**2
        dense = total
        if self.stem == "imagenet":
            size = (size - 1) // 2 + 1
        for mask, block in zip(masks, self.blocks, strict=True):
            if self.stride(block) == 2:
                size = (size - 1) // 2 + 1
            c_out, c_in = self.w[f"{block}.conv1.weight"].shape[:2]
            shortcut = c_in * c_out * size**2 if f"{block}.downsample.0.weight" in self.w else 0
            gate = sum(
                self.w[f"{block}.gate.{name}.weight"].numel() for name in ("reduce", "expand")
            )
            selected = mask.sum() / len(mask)
            total = total + 9 * size**2 * selected * (c_in + c_out) + shortcut + gate
            dense = dense + 9 * size**2 * c_out * (c_in + c_out) + shortcut
        return total / dense


def budget(share: Tensor, target: float, weight: float) -> Tensor:
    return weight * (share - target) ** 2


def bound(
    masks: list[Tensor],
    target: float,
    epoch: int,
    decay: float = 0.02,
    gradient: str = "selected",
) -> Tensor:
    p = math.exp(-decay * epoch)
    lower = upper = 0.0
    for mask in masks:
        selected = NumberSelected.apply(mask) if gradient == "selected" else mask.sum()
        share = selected / mask.numel()
        lower = lower + torch.clamp(p * target - share, min=0) ** 2
        upper = upper + torch.clamp(share - (1 - p + p * target), min=0) ** 2
    return (lower + upper) / len(masks)


def noise_table(masks_shape: list[tuple[int, int]], seed: int) -> list[Tensor]:
    """The draws that `helpers.fixed_noise(seed)` gives to successive gates."""
    rng = np.random.RandomState(seed)
    return [torch.from_numpy(rng.logistic(size=shape)) for shape in masks_shape]


def mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    """A projector or predictor: linear layers, and BatchNorms of a batch; ReLU after affine ones."""
    number = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith(f"{name}."))
    for layer in (f"{name}.{i}" for i in range(number)):
        weight, shift = weights.get(f"{layer}.weight"), weights.get(f"{layer}.bias", 0)
        if f"{layer}.running_mean" in weights:
            x = (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + EPS)
            x = x if weight is None else F.relu(x * weight + shift)
        elif weight is not None:
            x = x @ weight.T + shift
    return x


def vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    """25 · invariance + 25 · variance + 1 · covariance."""
    loss = 25 * ((z1 - z2) ** 2).mean()
    for z in (z1, z2):
        covariance = (z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1)
        deviation = torch.sqrt(covariance.diagonal() + 1e-4)
        loss = loss + 25 * torch.clamp(1 - deviation, min=0).mean()
        loss = loss + (covariance.triu(1) ** 2 + covariance.tril(-1) ** 2).sum() / z.shape[1]
    return loss


def barlow(z1: Tensor, z2: Tensor, lamb: float, scale: float) -> Tensor:
    one, other = ((z - z.mean(0)) / torch.sqrt(z.var(0, unbiased=False) + EPS) for z in (z1, z2))
    c = one.T @ other / len(one)
    off_diagonal = (c.triu(1) ** 2 + c.tril(-1) ** 2).sum()
    return scale * (((1 - c.diagonal()) ** 2).sum() + lamb * off_diagonal)


def simsiam(z1: Tensor, z2: Tensor, p1: Tensor, p2: Tensor) -> Tensor:
    def cosine(p: Tensor, z: Tensor) -> Tensor:
        return ((p * z).sum(1) / (p.norm(dim=1) * z.norm(dim=1))).mean()

    return -(cosine(p1, z2.detach()) + cosine(p2, z1.detach())) / 2


def descend(
    weights: Weights,
    velocity: Weights,
    lr: float,
    decay: float,
    momentum: float,
    eta: float | None,
) -> None:
    """A step of SGD in place; with η by LARS, clipped, biases and norms excluded.

    The gates have no weight decay.
    """
    for name, weight in weights.items():
        gradient, own_decay = weight.grad, 0.0 if ".gate." in name else decay
        if eta is None:
            gradient = gradient + own_decay * weight.detach()
        elif weight.ndim > 1:
            size, slope = weight.detach().norm(), gradient.norm()
            rate = eta * size / (slope + own_decay * size + 1e-8)
            gradient = min(rate / lr, 1) * (gradient + own_decay * weight.detach())
        velocity[name] = momentum * velocity[name] + gradient if name in velocity else gradient
        weight.data -= lr * velocity[name]
        weight.grad = None
