"""A report of measured figures beside the published ones: see `--help`, or `report.run`."""

import sys

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .cli import one_sentence_errors
from .config.arguments import read_options
from .report.run import parser, write_report


def main() -> None:
    """Entry point."""
    with one_sentence_errors():
        options = read_options(parser(), sys.argv[1:])
        print("\n".join(map(str, write_report([*options.folders, *options.runs], options.output))))


if __name__ == "__main__":
    main()
