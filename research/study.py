"""What the studies share: images, evaluation and tables.

python research/study.py shrink DATA FOLDER PIXELS   images of DATA arrays, made smaller
python research/study.py evaluate CHECKPOINT FILE SHARE...
python research/study.py table OUT SHARE...          the table of all runs
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import ablations  # noqa: F401 - checkpoints name its methods
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from solo_gating.backbones import TwoPathResNet
from solo_gating.evaluate.calibrate import calibrate, reachable_shares
from solo_gating.evaluate.evaluation import evaluation_of
from solo_gating.evaluate.extract import extract
from solo_gating.evaluate.knn import knn_top1
from solo_gating.files import write_json
from solo_gating.flops import count_flops

CALIBRATION_IMAGES = 512
OWN = "gated, as trained"


def shrink(data: Path, folder: Path, pixels: int) -> None:
    """Write arrays of smaller images, by Pillow's box filter."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(data.glob("*.npz")):
        with np.load(file) as arrays:
            images = [
                Image.fromarray(i).resize((pixels, pixels), Image.BOX) for i in arrays["images"]
            ]
            np.savez(folder / file.name, images=np.stack(images), labels=arrays["labels"])


def evaluate(checkpoint: Path, file: Path, shares: list[float]) -> None:
    """1-NN and logistic regression of the dense path, and of the gated one at its own and at given shares."""
    evaluation = evaluation_of(checkpoint, ["data.num_workers=0"], ("train", "val"))
    backbone = evaluation.encoder.backbone
    batches = {split: list(loader) for split, loader in evaluation.loaders.items()}

    def of_path(path: str) -> dict[str, float]:
        with evaluation.of_path(path):
            return accuracies(backbone, batches, path)

    found = {"dense": of_path("dense")}
    if isinstance(backbone, TwoPathResNet):
        low, high = backbone.budget_range or (0.0, 0.0)
        told, dial = high > low, backbone.gates[0].dial
        if not told:
            found[OWN] = of_path("gated")
        if dial is None or (dial == "budget" and not told):  # there is no other position
            shares = []
        images = torch.cat([images for images, _ in batches["train"]])
        images = images[:: max(1, len(images) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]
        least, most = reachable_shares(backbone, images) if shares else (0, 1)
        for share in [share for share in shares if least <= share <= most]:
            calibrate(backbone, images, share, share if told else None).apply(backbone)
            found[column(share)] = of_path("gated")
    write_json(file, found)


def accuracies(backbone: Any, batches: dict[str, list[Any]], path: str) -> dict[str, float]:
    """In percent; FLOPs of an image, the mean over the validation images, and their share of the dense path's."""
    device = next(backbone.parameters()).device
    train, val = (extract(backbone, batches[split], path) for split in ("train", "val"))
    labelled = [(split.features.to(device), split.targets.to(device)) for split in (train, val)]
    dense = count_flops(backbone, val.resolution).dense
    return {
        "knn": knn_top1(*labelled),
        "linear": logistic_regression(*labelled),
        "share": (val.flops or dense) / dense,
        "flops": val.flops or float(dense),
    }


def logistic_regression(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], c: float = 0.03, steps: int = 300
) -> float:
    """Top-1 accuracy in percent, on standardised features: scikit-learn's objective, on a GPU where they are.

    Args:
        train: features N × C and targets N, none of them -1.
        test: features M × C and targets M.
        c: the sum of the cross-entropies has this weight beside ½ · the weights' squared norm.
        steps: of L-BFGS at most.
    """
    (bank, labels), (queries, truth) = train, test
    deviation, mean = torch.std_mean(bank, dim=0, correction=0)
    deviation[deviation == 0] = 1
    bank, queries = (bank - mean) / deviation, (queries - mean) / deviation
    classes = int(labels.max()) + 1
    weight = torch.zeros(classes, bank.shape[1], device=bank.device, requires_grad=True)
    bias = torch.zeros(classes, device=bank.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(bank, weight, bias), labels)
        value = value + weight.square().sum() / (2 * c * len(labels))
        value.backward()
        return value

    optimizer.step(loss)
    found = F.linear(queries, weight, bias).argmax(dim=1)
    return 100 * (found == truth).double().mean().item()


def column(share: float) -> str:
    """The table's name of the gated path with the dial at a share."""
    return f"gated at {share:.0%}"


def results(out: Path) -> dict[str, list[dict[str, Any]]]:
    """For each variant that has been evaluated, in order of names, what each of its seeds has given."""
    found = {
        folder.name: [json.loads(f.read_text()) for f in sorted(folder.glob("*/accuracies.json"))]
        for folder in sorted(path for path in out.iterdir() if path.is_dir())
    }
    return {name: runs for name, runs in found.items() if runs}


def table(out: Path, shares: list[float]) -> None:
    """Accuracy of each variant, mean ± standard deviation over its seeds."""
    columns = ["dense", *map(column, shares), OWN]
    print("| run | seeds | " + " | ".join(f"{c}: 1-NN / linear" for c in columns) + " |")
    print("|" + "---|" * (len(columns) + 2))
    for name, runs in results(out).items():
        cells = [cell([run[c] for run in runs if c in run]) for c in columns]
        if cells[-1]:
            used = 100 * statistics.mean(run[OWN]["share"] for run in runs)
            cells[-1] += f" ({used:.0f} %)"
        print(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")


def cell(rows: list[dict[str, float]]) -> str:
    """Both accuracies; empty without a run."""
    return " / ".join(mean([row[kind] for row in rows]) for kind in ("knn", "linear") if rows)


def mean(values: list[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "shrink":
        shrink(Path(words[0]), Path(words[1]), int(words[2]))
    elif command == "evaluate":
        torch.set_num_threads(1)
        evaluate(Path(words[0]), Path(words[1]), [float(word) for word in words[2:]])
    else:
        table(Path(words[0]), [float(word) for word in words[1:]])
