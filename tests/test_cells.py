"""The scripts of many runs, with an interpreter that only pretends: what counts as finished."""

import os
import re
import stat
import subprocess

import pytest

from .support.helpers import ROOT

# Writes what a run or an evaluation writes. BECOMES says what becomes of pre-trainings.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
for word in "$@"; do
    case $word in
    checkpoint.dir=*) run=${word#*=}/method/run ;;
    output=*) results=${word#*=} ;;
    esac
done
case "$*" in
*main_pretrain* | *ablations.py*)
    mkdir -p "$run" && touch "$run/last.ckpt"
    case $BECOMES in
    whole) echo '{"finished": true, "raw": {"knn_top1": 1, "knn_top1_1_per_class": 1},
 "untrained": {"knn_top1": 1, "knn_top1_1_per_class": 1}}' >"$run/metrics.json" ;;
    limited) echo '{"finished": false}' >"$run/metrics.json" ;;
    nothing) ;;
    *) exit "$BECOMES" ;;
    esac
    ;;
*main_knn* | *main_linear* | *main_policy*) mkdir -p "$results" && echo '{}' >"$results/metrics.json" ;;
*"study.py evaluate"*) echo '{}' >"$4" ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Runs a script: exit code, what it printed, and what it called."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    data = tmp_path / "cifar100"
    data.mkdir()
    for name in ("train.npz", "test.npz"):
        (data / name).touch()

    def run(name, *arguments, becomes, at=None, **environment):
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(ROOT / name), *map(str, arguments)],
            env={
                **os.environ,
                "PYTHON": str(python),
                "CALLS": str(calls),
                "BECOMES": str(becomes),
                "OUT": str(tmp_path / "out"),
                "DATA": str(data),
                **environment,
            },
            cwd=at,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr, calls.read_text()

    return run


ONE_CELL = ["--datasets", "cifar100", "--budgets", "0.3", "--out", "OUT"]
COMMANDS = {
    "bash_scripts/reproduce/table3.sh": ONE_CELL,
    "bash_scripts/reproduce/table4.sh": ONE_CELL,
    "bash_scripts/gpu/cifar100.sh": ["600", "DATA"],
    "bash_scripts/validate_cifar.sh": ["DATA"],
    "research/every_budget.sh": ["digits"],
}
EVALUATIONS = ("main_knn", "main_linear", "main_policy", "study.py evaluate", "validation_table")


@pytest.mark.parametrize("name", COMMANDS)
def test_only_a_run_that_says_so_is_finished(name, script, tmp_path):
    """Killed, stopped by a limit, or ended without a result: none is evaluated, none stays so."""
    paths = {"OUT": tmp_path / "out", "DATA": tmp_path / "cifar100"}
    command = [name, *(paths.get(word, word) for word in COMMANDS[name])]
    short = {"RUNS": "0.3", "VARIANTS": "fixed_0.3", "SEEDS": "0"}
    for becomes in (143, 130, 1, "nothing", "limited"):
        code, printed, calls = script(*command, becomes=becomes, **short)
        assert code != 0, (becomes, printed)
        assert not any(evaluation in calls for evaluation in EVALUATIONS), becomes
    code, printed, calls = script(*command, becomes="whole", **short)
    assert code == 0, printed
    assert "main_pretrain" in calls or "ablations.py" in calls
    assert any(evaluation in calls for evaluation in EVALUATIONS)
    code, printed, calls = script(*command, becomes=1, **short)
    assert code == 0, printed  # nothing is repeated
    assert "main_pretrain" not in calls
    assert "ablations.py" not in calls
    assert "main_knn" not in calls
    assert "main_policy" not in calls


def test_an_evaluation_of_an_earlier_state_is_made_again(script, tmp_path):
    command = [
        "bash_scripts/reproduce/table4.sh",
        *COMMANDS["bash_scripts/reproduce/table4.sh"][:-1],
        tmp_path / "out",
    ]
    assert script(*command, becomes="whole")[0] == 0
    (checkpoint,) = (tmp_path / "out").glob("vicreg_dual-*/method/run/last.ckpt")
    file = tmp_path / "out" / "vicreg_dual-cifar100-0.3" / "knn-cifar100" / "metrics.json"
    os.utime(checkpoint, (file.stat().st_mtime + 10,) * 2)
    calls = script(*command, becomes=1)[2]
    assert calls.count("main_knn") == 1


def test_students_follow_the_policy_of_their_budget_s_gated_run(script, tmp_path):
    out, teacher = tmp_path / "out", tmp_path / "moco.pth.tar"
    teacher.touch()
    command = ["bash_scripts/reproduce/table3.sh", *ONE_CELL[:-1], out]
    code, printed, calls = script(
        *command, becomes="whole", SEED_TEACHER="moco.pth.tar", at=tmp_path
    )
    assert code == 0, printed
    called = [call for call in calls.splitlines() if "main_report" not in call]
    assert [re.search(r"main_(\w+).*?(\w+)-cifar100", call).groups() for call in called] == [
        ("pretrain", "vicreg"),
        ("pretrain", "vicreg_dual"),
        ("knn", "vicreg_dual"),
        ("policy", "vicreg_dual"),
        ("pretrain", "simreg"),
        ("knn", "simreg"),
        ("pretrain", "seed"),
        ("knn", "seed"),
    ]
    widths = f"backbone.kwargs.policy={out}/vicreg_dual-cifar100-0.3/policy-cifar100/policy.json"
    simreg, seed = called[4], called[6]
    assert f"{widths} method_kwargs.teacher={out}/vicreg-cifar100/method/run/last.ckpt" in simreg
    assert f"{widths} method_kwargs.teacher={teacher}" in seed
    assert all("normalize=true" in call for call in called if "main_knn" in call)
