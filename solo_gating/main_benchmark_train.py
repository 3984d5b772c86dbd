"""How long training steps take: see `--help`, or `benchmark.training.run`."""

import sys

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .benchmark.training.run import benchmark_train, parser
from .cli import one_sentence_errors
from .config.arguments import read_options


def main() -> None:
    """Entry point."""
    with one_sentence_errors():
        options = read_options(parser(), sys.argv[1:])
        benchmark_train(options)
        print(options.output / "benchmark_train.json")


if __name__ == "__main__":
    main()
