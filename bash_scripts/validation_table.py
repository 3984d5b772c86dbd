"""Print the Markdown table of validate_cifar.sh from its runs' metrics.json files."""

import json
import sys
from pathlib import Path


def main(out: Path) -> None:
    """Read OUT/<run>/<method>/<version>/metrics.json."""
    runs = {}
    for file in sorted(out.glob("*/*/*/metrics.json")):
        metrics = json.loads(file.read_text())
        if metrics.get("finished", True):  # not stopped by a limit of the Trainer
            runs[file.relative_to(out).parts[0]] = metrics
    if not runs:
        sys.exit(f"error: no finished run below {out}")
    few = next(key for key in next(iter(runs.values()))["raw"] if key.endswith("_per_class"))
    print(
        f"| encoder | 1-NN, % | 1-NN, {few.split('_')[2]} labels per class, % | FLOPs cut | share in training |"
    )
    print("|---|---|---|---|---|")
    first = next(iter(runs.values()))
    row("raw pixels", first["raw"], few)
    row("untrained", first["untrained"], few)
    for name, metrics in runs.items():
        for path in ("dense", "gated"):
            if path in metrics:
                share = (
                    metrics["logged"].get("train_flops_share_epoch") if path == "gated" else None
                )
                row(f"{name}, {path}", metrics[path], few, share)


def row(name: str, figures: dict[str, float], few: str, share: float | None = None) -> None:
    """One line of the table."""
    cut = f"{figures['flops_cut']:.2%}" if "flops_cut" in figures else ""
    used = f"{share:.3f}" if share is not None else ""
    print(f"| {name} | {figures['knn_top1']:.2f} | {figures[few]:.2f} | {cut} | {used} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
