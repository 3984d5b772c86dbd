"""Helpers of study_every_budget.sh: where the dial stood, and the table of all runs."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def position(file: Path, share: float) -> str:
    """The overrides that turn the dial to a share, from the metrics of a sweep."""
    points = read(file)["gated"]["sweep"]
    point = next(point for point in points if point["asked"] == share)
    words = [f"threshold={point['threshold']!r}"]
    if "budget" in point:
        words.append(f"budget={point['budget']!r}")
    return " ".join(words)


def table(out: Path, shares: list[float]) -> None:
    """1-NN and linear accuracy of each variant, mean ± std over its seeds."""
    runs: dict[str, list[dict[tuple[str, str], float]]] = {}
    for folder in sorted(out.glob("*/seed_*")):
        if not list(folder.glob("*/*/metrics.json")):
            continue
        runs.setdefault(folder.parent.name, []).append(figures(folder))
    columns = ["dense", *(f"gated at {share:.0%}" for share in shares)]
    print("| run | seeds | " + " | ".join(f"{c}: 1-NN / linear" for c in columns) + " |")
    print("|" + "---|" * (len(columns) + 2))
    for name, rows in runs.items():
        cells = []
        for column in columns:
            found = [
                mean([row[column, kind] for row in rows if (column, kind) in row])
                for kind in ("knn", "linear")
            ]
            cells.append(" / ".join(found) if any(found) else "")
        print(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")


def figures(folder: Path) -> dict[tuple[str, str], float]:
    """The accuracies of one run, by column and kind."""
    found: dict[tuple[str, str], float] = {}
    (metrics,) = folder.glob("*/offline*/metrics.json")
    found["dense", "knn"] = read(metrics)["dense"]["knn_top1"]
    sweep = folder / "sweep/metrics.json"
    if sweep.exists():
        for point in read(sweep)["gated"]["sweep"]:
            if point["asked"] is not None:
                found[f"gated at {point['asked']:.0%}", "knn"] = point["knn_top1"]
    for file in folder.glob("linear/*/metrics.json"):
        name = file.parent.name
        path, column = (
            ("dense", "dense") if name == "dense" else ("gated", f"gated at {float(name):.0%}")
        )
        found[column, "linear"] = read(file)[path]["linear_top1"]
    return found


def mean(values: list[float]) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def read(file: Path) -> dict[str, Any]:
    """A JSON file."""
    return json.loads(file.read_text())


if __name__ == "__main__":
    command, where, *numbers = sys.argv[1:]
    if command == "position":
        print(position(Path(where), float(numbers[0])))
    else:
        table(Path(where), [float(number) for number in numbers])
