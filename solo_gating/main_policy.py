"""Which channels a gated encoder uses, and its dial: see `--help`, or `evaluate.tasks.policy`."""

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .cli import run
from .evaluate.tasks.policy import evaluate_policy


def main() -> None:
    """Entry point."""
    run(evaluate_policy, evaluation="policy")


if __name__ == "__main__":
    main()
