"""Importing the package changes nothing of the process that a user could notice."""

import ast
import importlib
import json
import subprocess
import sys

from .support.helpers import ROOT, package_environment

_IMPORT_ALL = """
import importlib, json, logging, os, pkgutil, random, signal, sys, warnings
import matplotlib
matplotlib.use("svg")  # stands for a notebook's own
import lightning.pytorch, numpy, sklearn, torch, torchmetrics  # they set some variables

def state():
    return {
        "backend": matplotlib.get_backend(),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "random": [random.random(), numpy.random.rand(), torch.rand(1).item()],
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "level": logging.getLogger().level,
        "arguments": sys.argv,
    }

def seeded():
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)

seeded()
before = state()
seeded()
import solo_gating
names = [m.name for m in pkgutil.walk_packages(solo_gating.__path__, "solo_gating.")]
for name in names:
    if name not in ("solo_gating.__main__", "solo_gating.as_module") and ".solo_learn." not in name:
        importlib.import_module(name)
after = state()
print(json.dumps([len(names), before, after]))
"""


def test_importing_every_module_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL],
        capture_output=True,
        text=True,
        timeout=300,
        env=package_environment(),
    )
    assert done.returncode == 0, done.stderr
    modules, before, after = json.loads(done.stdout.splitlines()[-1])
    assert modules > 50
    assert before["backend"].lower() == "svg"
    assert after == before


# What a room may know: itself, and those below it.
ORDER = (
    *("errors", "checks", "budgets", "transfer", "texts", "terminal", "distributed", "randomness"),
    *("files", "policies", "process_state", "gates", "backbones", "flops", "losses", "solo_learn"),
)


def test_no_room_imports_the_command_line_or_a_room_that_imports_it():
    """Rooms import downwards, apart from imports inside functions."""
    package = ROOT / "solo_gating"
    imports: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        room, *_ = file.relative_to(package).with_suffix("").parts
        if room.startswith(("main_", "__")) or room == "as_module":
            continue
        depth = len(file.relative_to(package).parts)
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level == depth and node.module:
                imports.setdefault(room, set()).add(node.module.partition(".")[0])
    commands = {room for room, known in imports.items() if "cli" in known and room != "cli"}
    assert commands <= {"data"}  # data/digits.py is a command
    for room in ORDER:
        above = imports.get(room, set()) - set(ORDER[: ORDER.index(room)]) - {room}
        assert not above, (room, above)


def test_scripts_import_what_there_is():
    """Those that no test runs, too."""
    for folder in ("research", "examples", "bash_scripts"):
        for file in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "solo_gating"
                ):
                    module = importlib.import_module(node.module)
                    missing = [one.name for one in node.names if not hasattr(module, one.name)]
                    assert not missing, (file.name, node.module, missing)
