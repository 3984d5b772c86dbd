"""UMAP of a checkpoint's features: see `--help`, or `evaluate.tasks.umap`."""

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .cli import run
from .evaluate.tasks.umap import evaluate_umap


def main() -> None:
    """Entry point."""
    run(evaluate_umap, evaluation="umap")


if __name__ == "__main__":
    main()
