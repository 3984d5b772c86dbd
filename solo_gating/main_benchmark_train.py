"""How long training steps take: see `--help`, or `benchmark.training.run`."""

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .benchmark.training.run import benchmark_train, parser
from .cli import one_sentence_errors


def main() -> None:
    """Entry point."""
    with one_sentence_errors():
        options = parser().parse_args()
        benchmark_train(options)
        print(options.output / "benchmark_train.json")


if __name__ == "__main__":
    main()
