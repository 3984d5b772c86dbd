"""How fast encoders run on this CPU: see `--help`, or `benchmark.inference.run`."""

import sys

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .benchmark.inference.machine import restart_restricted_to
from .benchmark.inference.run import benchmark, parser
from .cli import one_sentence_errors
from .config.arguments import read_options
from .config.compose import overridable


def main() -> None:
    """Entry point."""
    with one_sentence_errors():
        options = read_options(parser(), sys.argv[1:], overridable("knn"))
        if options.isa is not None:
            restart_restricted_to(options.isa)
        benchmark(options)
        print(options.output / "benchmark.json", options.output / "benchmark.png", sep="\n")


if __name__ == "__main__":
    main()
