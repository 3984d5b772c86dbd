"""Importing the package changes nothing of the process that a user could notice."""

import json
import subprocess
import sys

from .support.helpers import package_environment

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
