"""How fast images are made ready for training: see `--help`, or `benchmark.data`."""

import sys

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .benchmark.data import benchmark_data, parser
from .cli import one_sentence_errors
from .config.arguments import read_options
from .config.compose import overridable


def main() -> None:
    """Entry point."""
    with one_sentence_errors():
        options = read_options(parser(), sys.argv[1:], overridable())
        benchmark_data(options)
        print(options.output / "benchmark_data.json")


if __name__ == "__main__":
    main()
