"""Pre-train: dense and gated encoders at once, or any solo-learn method: see `--help`, or `training.pretrain`."""

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .cli import run
from .training.pretrain import pretrain


def main() -> None:
    """Entry point."""
    run(pretrain)


if __name__ == "__main__":
    main()
