"""k-nearest-neighbour accuracy of a checkpoint: see `--help`, or `evaluate.tasks.knn`."""

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .cli import run
from .evaluate.tasks.knn import evaluate_knn


def main() -> None:
    """Entry point."""
    run(evaluate_knn, evaluation="knn")


if __name__ == "__main__":
    main()
