"""Run a script of solo-learn's own with the plugin registered.

    python -m solo_gating [--path gated] [--threshold 0.4] [--budget 0.3] PATH/TO/main_linear.py \\
        [its arguments]

solo-learn's `main_pretrain.py`, `main_linear.py`, `main_knn.py`, `main_umap.py`, ... (modern line)
then know the methods and backbones of solo-gating by name. `--path gated` makes every backbone that
they build take its gated path where nothing else is said (default: dense), `--threshold` sets the
gates' threshold, `--budget` what they are told, if the network was trained for a range of budgets (its
args.json has it: backbone.kwargs.budget_range). A script may say so itself too, with
backbone.kwargs.path, backbone.kwargs.threshold, backbone.kwargs.budget.
"""

if not __package__:  # started as a file
    import as_module  # noqa: F401

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import solo_gating

from .backbones import PATHS, gated_backbones
from .solo_learn import BaseMethod
from .terminal import lasting_streams


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m solo_gating",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            f"methods:   {', '.join(sorted(solo_gating.GATED_METHODS))}\n"
            f"backbones: {', '.join(sorted(solo_gating.BACKBONES))}"
        ),
    )
    parser.add_argument("--path", choices=PATHS, default=argparse.SUPPRESS)
    parser.add_argument("--threshold", type=float, default=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=argparse.SUPPRESS)
    parser.add_argument("script", nargs="?")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    with lasting_streams():
        options = vars(parser.parse_args())
        name, arguments = options.pop("script"), options.pop("arguments")
        if name is None:
            parser.print_help()
            return
    script = Path(name)
    if not script.is_file():
        sys.exit(f"error: {str(script)!r} is not a file, expected the path of a Python script")
    before = dict(BaseMethod._BACKBONES), sys.argv, list(sys.path)
    try:
        for backbone in gated_backbones():
            BaseMethod._BACKBONES[backbone] = _with_options(before[0][backbone], options)
        sys.argv = [name, *arguments]
        sys.path.insert(0, str(script.resolve().parent))
        runpy.run_path(str(script), run_name="__main__")
    finally:  # the process may go on
        BaseMethod._BACKBONES.update(before[0])
        sys.argv, sys.path[:] = before[1:]


def _with_options(factory: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def build(*args: Any, **kwargs: Any) -> Any:
        for key, value in options.items():
            if kwargs.get(key, value) != value:
                sys.exit(
                    f"error: --{key}: got {value}, and backbone.kwargs.{key}={kwargs[key]}; "
                    "expected one of them"
                )
        return factory(*args, **(options | kwargs))

    return build


if __name__ == "__main__":
    main()
