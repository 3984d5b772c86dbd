"""A report of runs and evaluations beside the papers' figures, as Markdown and as one HTML page.

    python -m solo_gating.main_report RUN_DIR... [output=DIR]
    python -m solo_gating.main_report runs=[RUN_DIR,...] [output=DIR]

Reads every metrics.json below the given folders: those of main_linear and main_knn, and those of
pre-trainings with a 1-NN table at their end; and the sweeps of main_policy --sweep, drawn beside dense
networks of other widths. Writes report.md, report.html (one file, pictures inside),
accuracy_flops.png and sweeps.png into DIR (default: outputs/report).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..config.arguments import command_parser
from ..config.compose import user_path
from ..errors import InputError
from ..files import make_folder, write_bytes
from ..plots.comparison import draw_accuracy_flops
from ..plots.sweeps import draw_sweeps, sweep_table
from .cells import measured_cells, published_tables
from .records import Record, Skipped, Sweep, read_records
from .render import Picture, Section, to_html, to_markdown
from .tables import all_figures, compare

PICTURE, SWEEPS = "accuracy_flops.png", "sweeps.png"


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Collect what was measured and write the report.

    Args:
        folders: with metrics.json files, at any depth.
        output: the report's folder; made if it is missing.

    Returns:
        The written files.

    Raises:
        InputError: for folders without a usable file, or an output that cannot be written.
    """
    if not folders:
        raise InputError("runs: missing, expected folders with metrics.json files")
    records = read_records(folders)
    make_folder(output)
    sections = compose(*records)
    files: dict[str, bytes] = {
        "report.md": to_markdown(sections).encode(),
        "report.html": to_html(sections).encode(),
    }
    files |= {s.picture.name: s.picture.png for s in sections if s.picture is not None}
    for name, content in files.items():
        write_bytes(output / name, content)
    for picture in (PICTURE, SWEEPS):
        if picture not in files:  # of an earlier report
            (output / picture).unlink(missing_ok=True)
    return [output / name for name in files]


def compose(
    records: Sequence[Record], skipped: Sequence[Skipped], sweeps: Sequence[Sweep]
) -> list[Section]:
    """The report's sections.

    Args:
        records: at least one.
        skipped: files that are named at the end.
        sweeps: of the dial; may be none.
    """
    measured = measured_cells(records)
    published = published_tables()
    tables = {table.title: compare(table, measured) for table in published}
    sections = [_introduction(records)]
    png = draw_accuracy_flops((cell for table in published for cell in table.cells), measured)
    if png is not None:
        sections.append(
            Section(
                "Accuracy against FLOPs",
                (
                    "Filled: measured. Hollow and dashed: published, for the methods that were "
                    "measured. Dense encoders, with 100 % of the FLOPs, stand side by side at the "
                    "right. Runs without the invariance loss, and students, are not drawn.",
                ),
                picture=Picture(PICTURE, png, "Accuracy against FLOPs, a panel for each data set"),
            )
        )
    if (png := draw_sweeps(sweeps, records)) is not None:
        table = sweep_table(sweeps)
        words = (
            "A line is one checkpoint's gated path, a square of its colour the dense path; grey: "
            "dense networks without gates, whose FLOPs are those of their width.",
        )
        picture = Picture(SWEEPS, png, "1-NN accuracy against FLOPs with the dial turned")
        sections.append(Section(table.title, (*table.notes, *words), (), picture, table))
    sections += [Section(t.title, t.notes, table=t) for t in tables.values() if t is not None]
    missing = [title for title, table in tables.items() if table is None]
    if missing:
        sections.append(
            Section("Not measured", (f"Tables without a measured figure: {'; '.join(missing)}.",))
        )
    flat = all_figures(records)
    sections.append(Section(flat.title, flat.notes, table=flat))
    if skipped:
        sections.append(
            Section(
                "Skipped files",
                (f"{len(skipped)} metrics.json gave nothing:",),
                tuple(f"{file.file}: {file.reason}" for file in skipped),
            )
        )
    return sections


def _introduction(records: Sequence[Record]) -> Section:
    files = len({record.file for record in records})
    return Section(
        "Published and measured figures",
        (
            f"{len(records)} measured figures from {files} files. A row says where its figures come "
            "from: “published” is what the paper prints, “measured” comes from the runs, with epochs "
            "and width of pre-training, and the number of images of the evaluation if it is not the "
            "whole data set. Whatever else differs between otherwise equal rows is named in them.",
            "Accuracies are top-1 in %. With n, they are means ± standard deviation (of a sample) over "
            "n pre-trainings that differ in the seed; without n, ± is over the linear classifiers of "
            "one pre-training. A FLOPs cut is 1 − share of the dense encoder's FLOPs, a mean if there "
            "are several runs. A dash: there is no such figure.",
        ),
    )


def parser() -> argparse.ArgumentParser:
    """What the command understands."""
    made = command_parser("main_report", __doc__)
    made.add_argument(
        "folders",
        nargs="*",
        type=user_path,
        metavar="RUN_DIR",
        help="folder with metrics.json files",
    )
    made.add_argument("--runs", nargs="+", type=user_path, default=[], metavar="RUN_DIR")
    made.add_argument(
        "--output",
        type=user_path,
        default=Path("outputs/report"),
        metavar="DIR",
        help="default: %(default)s",
    )
    return made
