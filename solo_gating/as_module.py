"""`python solo_gating/main_pretrain.py`, as solo-learn's scripts are started.

Imported by an entry point that was started as a file, from the folder of the package, as what is
relative there has no package: runs the module instead, as `python -m solo_gating.main_pretrain`
does, and ends the process.
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "as_module":  # of no effect inside the package
    _file = Path(sys.modules["__main__"].__file__ or "").resolve()
    _folder = str(_file.parent.parent)
    sys.path[0] = _folder
    # Other processes, of DDP, are started as `-m`.
    _paths = [_folder, os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _paths))
    runpy.run_module(f"{_file.parent.name}.{_file.stem}", run_name="__main__", alter_sys=True)
    sys.exit()
