"""Random overrides end in a run or in one sentence; `python -m tests.fuzz` tries more of them."""

import random

import pytest

from .fuzz import COMMANDS, Fuzz


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(
    ("command", "cases"), [(name, 3) for name in COMMANDS] + [("main_pretrain", 12)]
)
def test_overrides_end_in_a_run_or_in_one_sentence(command, cases, fuzz):
    draw = random.Random(f"{command}, {cases} cases")
    outcomes = [fuzz.case(command, draw) for _ in range(cases)]
    assert not [(overrides, text) for overrides, outcome, text in outcomes if outcome == "trace"]
