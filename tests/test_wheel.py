"""The wheel: what is installed is complete, and runs solo-learn's scripts."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

SCRIPT = """
import sys
from pathlib import Path
import beside
from solo.methods import METHODS
assert beside.VALUE == 41 and "vicreg_dual" in METHODS
assert __name__ == "__main__" and sys.argv[2:] == ["--config-name", "x"]
import solo_gating
from hydra import compose, initialize_config_dir
from solo_gating.config.compose import EVALUATIONS, config_names
from solo_gating.config.defaults import configs_folder
from solo_gating.config.pretraining import prepare_config

site = Path(sys.argv[1])
assert Path(solo_gating.__file__).is_relative_to(site), solo_gating.__file__
assert configs_folder().is_relative_to(site), configs_folder()
with initialize_config_dir(str(configs_folder()), version_base="1.2"):
    cfg = prepare_config(compose("vicreg_dual_cifar100"))
evaluations = [name for kind in EVALUATIONS for name in config_names(kind)]
print(cfg.gating.target_budget, "run", *config_names(), *evaluations)
"""


def test_an_installed_wheel_has_its_configs_and_runs_solo_learn_s_scripts(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("solo_gating", "solo_gating_runtime", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("solo_gating-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    shutil.rmtree(source)

    packages = ("solo_gating", "solo_gating_runtime")
    modules = {str(f.relative_to(ROOT)) for name in packages for f in (ROOT / name).rglob("*.py")}
    configs = {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.yaml")}
    assert modules <= names
    assert {f"solo_gating/{file}" for file in configs} <= names
    assert "solo_gating/report/published.json" in names
    sources = (ROOT / "solo_gating_runtime/kernel").rglob("*.*")
    assert {str(file.relative_to(ROOT)) for file in sources} <= names
    # Older ones run the code of a checkpoint in solo-learn's scripts.
    metadata = next(name for name in names if name.endswith("METADATA"))
    requirements = (site / metadata).read_text(encoding="utf-8").splitlines()
    assert {"Requires-Dist: torch>=2.6", "Requires-Dist: torchvision>=0.21"} <= set(requirements)
    tops = {name.split("/")[0] for name in names}
    assert tops == {*packages, wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}

    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p not in ("", ".")]
    path = os.pathsep.join([str(site), *(p for p in others if Path(p) != ROOT)])
    script = tmp_path / "scripts" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    (script.parent / "beside.py").write_text("VALUE = 41\n")
    result = subprocess.run(
        [sys.executable, "-m", "solo_gating", script, site, "--config-name", "x"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    budget, *found = result.stdout.split()
    assert budget == "0.5"
    assert sorted(found) == sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
