"""Linear evaluation of a checkpoint: see `--help`, or `evaluate.tasks.linear`."""

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .cli import run
from .evaluate.tasks.linear import evaluate_linear


def main() -> None:
    """Entry point."""
    run(evaluate_linear, evaluation="linear")


if __name__ == "__main__":
    main()
