"""What a run logs, as CSV."""

import csv
from argparse import Namespace
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ..files import append, csv_lines, write_csv


class CSVLog(Logger):
    """`metrics.csv` in a folder, a line for each time that something is logged.

    Lightning's CSVLogger empties the file and writes it again when there is a new figure; here it is
    replaced whole, so that neither a kill nor a full disk can lose what it holds.

    Args:
        folder: made with the first line; an earlier log in it is replaced.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """The name of all versions' folder."""
        return self.folder.parent.name

    @property
    def version(self) -> str:
        """The folder's name."""
        return self.folder.name

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write a line.

        Raises:
            InputError: if the file cannot be written.
        """
        file, row = self.folder / "metrics.csv", {**metrics, "step": step}
        if row.keys() <= set(self._columns):
            append(file, csv_lines([row], self._columns))
            return
        rows: list[dict[str, Any]] = []
        if self._columns:
            with file.open(newline="") as lines:
                rows = list(csv.DictReader(lines))
        self._columns = sorted({*self._columns, *row})
        write_csv(file, [*rows, row], self._columns)

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: `args.json` has them."""


def next_version(folder: Path) -> Path:
    """`version_<n>` in a folder, after those that are there."""
    numbers = [version_number(found) for found in folder.glob("version_*")]
    return folder / f"version_{1 + max(numbers, default=-1)}"


def version_number(folder: Path) -> int:
    """n of a folder `version_<n>`; -1 for any other."""
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def read_logs(folder: Path) -> dict[str, dict[int, float]]:
    """Epoch → value of every figure in a run's CSV logs, continued runs included.

    Args:
        folder: the run's folder, with `logs/version_*/metrics.csv`.
    """
    series: dict[str, dict[int, float]] = defaultdict(dict)
    files = sorted(
        folder.glob("logs/version_*/metrics.csv"), key=lambda f: version_number(f.parent)
    )
    for file in filter(Path.is_file, files):
        with file.open(newline="", errors="replace") as lines:
            for row in csv.DictReader(lines):
                # Earlier versions could leave a line that is cut short.
                with suppress(TypeError, ValueError, OverflowError):
                    epoch = int(float(row.pop("epoch")))
                    for name, value in row.items():
                        if name != "step" and value:
                            series[name][epoch] = float(value)
    return dict(series)
