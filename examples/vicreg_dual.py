"""VICReg with one gated and one dense view, as a loop of your own: no config, no Trainer, no Hydra.

python examples/vicreg_dual.py [FOLDER] [EPOCHS]

FOLDER holds train/ and test/ with a folder of images for each class; without one, scikit-learn's
handwritten digits are written to datasets/digits. The labels serve the 1-NN table at the end only.
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from solo_gating import create_backbone
from solo_gating.data.digits import write_digits
from solo_gating.evaluate.knn import knn_top1
from solo_gating.flops import count_flops, selected_channels
from solo_gating.losses import bound_loss, budget_loss

from solo.losses.vicreg import vicreg_loss_func  # isort: skip (solo-learn 1.0.2 wants the plugin first)

SIZE, BUDGET, REST, RATE = 12, 0.3, 6, 3e-3  # pixels; share of FLOPs; epochs of rest for the gates
DEFAULTS = ("datasets/digits", "30")
PLAIN = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.3] * 3, [0.37] * 3)]
MOVED = v2.RandomAffine(20, (0.125, 0.125), (0.7, 1.3), shear=17)
VIEW = v2.Compose(
    [v2.Resize(SIZE), MOVED, v2.ColorJitter(0.4, 0.4), *PLAIN, v2.RandomErasing(0.5, (0.02, 0.2))]
)


def train(folder, epochs=30, width=16, batch=64):
    """Train on the images in `folder/train`; the backbone comes back in evaluation mode."""
    images = ImageFolder(f"{folder}/train", lambda image: (VIEW(image), VIEW(image)))
    loader = DataLoader(images, batch, shuffle=True, drop_last=True)
    backbone = create_backbone("resnet18_gated", width=width, stem="cifar")
    projector = torch.nn.Sequential(
        *(torch.nn.Linear(8 * width, 512), torch.nn.BatchNorm1d(512), torch.nn.ReLU()),
        torch.nn.Linear(512, 512),
    )
    weights = [*backbone.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, epochs * len(loader), pct_start=0.1
    )
    flops = count_flops(backbone, (SIZE, SIZE))
    for epoch in range(epochs):
        for (one, other), _ in loader:
            paths = ("gated", "dense") if epoch >= REST else ("dense", "dense")
            with backbone.path(*paths) as passes:
                loss = vicreg_loss_func(projector(backbone(one)), projector(backbone(other)))
            if passes[0].masks:
                channels = selected_channels(passes[0].masks)  # B × gates
                loss = loss + budget_loss(flops.share(channels).mean(), BUDGET, weight=100.0)
                shares = flops.channel_shares(channels.mean(0))
                loss = loss + bound_loss(shares, BUDGET**0.5, epoch - REST)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.2f}")
    return backbone.eval()


@torch.no_grad()
def evaluate(backbone, folder):
    """For each path the 1-NN accuracy in % on `folder/test`, and the mean FLOPs of an image."""
    plain = v2.Compose([v2.Resize(SIZE), *PLAIN])
    train, test = (
        next(iter(DataLoader(ImageFolder(f"{folder}/{part}", plain), 10_000)))
        for part in ("train", "test")
    )
    flops, rows = count_flops(backbone, (SIZE, SIZE)), {}
    for path in ("dense", "gated"):
        with backbone.path(path) as passes:
            accuracy = knn_top1((backbone(train[0]), train[1]), (backbone(test[0]), test[1]))
        masks = passes[-1].masks
        spent = flops.gated(selected_channels(masks).long()).double() if masks else flops.dense
        rows[path] = accuracy, float(torch.as_tensor(spent).double().mean())
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    folder, epochs = [*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :]]
    if folder == DEFAULTS[0]:
        write_digits(Path(folder))
    for path, (accuracy, spent) in evaluate(train(folder, int(epochs)), folder).items():
        print(f"{path}: 1-NN {accuracy:.1f} %, {spent:.4g} FLOPs per image")
