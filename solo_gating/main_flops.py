"""FLOPs and parameters of a backbone: see `--help`, or `report.flops`."""

if not __package__:  # started as a file
    import as_module  # noqa: F401

from .cli import run
from .report.flops import report_flops


def main() -> None:
    """Entry point."""
    run(report_flops, checkpoint="flops.checkpoint")


if __name__ == "__main__":
    main()
