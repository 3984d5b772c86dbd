"""How fast images are made ready for training: see `--help`, or `benchmark.data`."""

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .benchmark.data import benchmark_data, parser
from .cli import one_sentence_errors


def main() -> None:
    """Entry point."""
    with one_sentence_errors():
        # Overrides may stand between the options.
        options = parser().parse_intermixed_args()
        benchmark_data(options)
        print(options.output / "benchmark_data.json")


if __name__ == "__main__":
    main()
