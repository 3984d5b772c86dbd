"""Run a script of solo-learn's own with the plugin registered.

    python -m solo_gating PATH/TO/main_pretrain.py --config-path ... --config-name ... [key=value]

solo-learn's `main_pretrain.py`, `main_linear.py`, ... (modern line) then know the methods and
backbones of solo-gating by name.
"""

import runpy
import sys
from pathlib import Path

import solo_gating


def main() -> None:
    """Entry point."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        print("methods:  ", ", ".join(sorted(solo_gating.GATED_METHODS)))
        print("backbones:", ", ".join(sorted(solo_gating.BACKBONES)))
        return
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(f"error: {str(script)!r} is not a file, accepted is the path of a Python script")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
