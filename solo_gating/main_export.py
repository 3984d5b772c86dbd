"""Turn a checkpoint into a network that others can run: see `--help`, or `deploy.export`."""

import sys

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .cli import one_sentence_errors
from .config.arguments import read_options
from .config.compose import overridable
from .deploy.export import export, format_export, parser


def main() -> None:
    """Entry point."""
    with one_sentence_errors():
        print(format_export(export(read_options(parser(), sys.argv[1:], overridable("knn")))))


if __name__ == "__main__":
    main()
