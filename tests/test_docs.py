"""README, docs and examples: their Python runs, their commands exist, their links lead somewhere."""

import importlib
import re
import runpy
import shlex
import shutil
from dataclasses import MISSING, fields
from unittest import mock

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from solo_gating import BACKBONES, GATED_METHODS, METHODS, BaseMethod
from solo_gating.backbones import create_backbone
from solo_gating.config.compose import composed
from solo_gating.config.gating import GatingConfig
from solo_gating.config.schema import EVALUATIONS, METHOD_KWARGS, OWN_METHOD_KWARGS, PRETRAINING
from solo_gating.flops import count_flops
from solo_gating.gates import GATES

from .support.helpers import ROOT

README = ROOT / "README.md"
GENERATED = ROOT / "docs/results/reproduction/report.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "research/README.md"])
WRITTEN = [page for page in PAGES if page != GENERATED]

# Of a network of width 8 for a range of budgets, its args.json beside it.
CHECKPOINT = ROOT / "tests/fixtures/before_gate_kinds/range/last.ckpt"

# At the end of a command: what keeps it from running here. The first two are not checked.
MARKS = ("network", "elsewhere", "hours", "minutes")

# Those that have no config: their keys are in their help.
WITHOUT_CONFIG = ("export", "benchmark", "benchmark_train", "benchmark_data", "report")


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """The code blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [code for kind, code in found if kind == language]


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def table_rows(page, heading):
    """The rows of the tables below a heading, up to the next one; without the first two of each."""
    text = prose(page)
    section = text[text.index(f"\n{heading}\n") :].split("\n## ")[1]
    rows = []
    for table in re.findall(r"(?:^\|.*\|\n)+", f"{section}\n", re.M):
        for line in table.splitlines()[2:]:
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


# Form


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_lines_and_words(page):
    text = page.read_text()
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert long == []
    assert re.findall(r"\b(?:of which|that of|is owed|are owed)\b", prose(page), re.I) == []


def slug(heading):
    """A heading's anchor, as GitHub makes it."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page):
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_paths_that_the_code_names_exist():
    sources = [
        *ROOT.glob("solo_gating/**/*.py"),
        *(file for kind in ("py", "sh", "md") for file in ROOT.glob(f"research/**/*.{kind}")),
        *ROOT.glob("configs/**/*.yaml"),
        *ROOT.glob("bash_scripts/**/*.sh"),
    ]
    for source in sources:
        for path in re.findall(r"\bdocs/[\w/]+\.\w+", source.read_text()):
            assert (ROOT / path).exists(), (name_of(source), path)


# Tables


def as_default(text, field):
    """What a default in the table says, as a value."""
    named = {"null": None, "2/3": 2 / 3, "the method's": (), "true": True, "false": False, "{}": {}}
    text = text.strip("`")
    return named[text] if text in named else type(field.default)(text)


def test_the_table_of_gating_is_the_dataclass():
    rows = table_rows(ROOT / "docs/guide/config_keys.md", "## The group `gating`")
    keys = [row[0].strip("`") for row in rows]
    assert keys == [field.name for field in fields(GatingConfig)]
    for field, row in zip(fields(GatingConfig), rows, strict=True):
        factory = field.default_factory
        default = field.default if factory is MISSING else factory()
        assert default == as_default(row[1], field), field.name


def known(key, table):
    """Whether a key is in a table of the schema, or in one of its groups, or is a group."""
    parts = key.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(name in table for name in above) or any(k.startswith(f"{key}.") for k in table)


def test_the_other_keys_exist():
    page = ROOT / "docs/guide/config_keys.md"
    for row in table_rows(page, "## Pre-training"):
        for key in re.findall(r"`([\w.]+)(?:=\w+|\.\*)?`", row[0]):
            if key == "optimization":
                assert (ROOT / "configs/optimization").is_dir()
            elif key.startswith("method_kwargs."):
                assert key.removeprefix("method_kwargs.") in METHOD_KWARGS
            else:
                assert known(key, PRETRAINING), key
    everything = {key for table in EVALUATIONS.values() for key in table}
    for row in table_rows(page, "## Evaluations"):
        for cell in row[:2] if row[0].startswith("`main_") or not row[0] else row[:1]:
            for key in re.findall(r"`([\w.]+)(?:=\w+)?`", cell):
                if not key.startswith("main_") and key != "dataset":
                    assert known(key, everything), key


@pytest.mark.parametrize("name", ["simreg_cifar100", "seed_cifar100", "us3l_cifar100"])
def test_the_keys_of_a_method_can_be_overridden_as_documented(name):
    cfg = composed(name, [])
    kwargs = {key for key, methods in OWN_METHOD_KWARGS.items() if cfg.method in methods}
    assert kwargs <= {*cfg.method_kwargs}
    if cfg.method in ("simreg", "seed"):
        assert {"policy", "hidden", "width"} <= {*cfg.backbone.kwargs}


def test_the_keys_of_gating_can_be_overridden_as_documented():
    assert {field.name for field in fields(GatingConfig)} == {
        *composed("byol_dual_cifar10", []).gating
    }
    assert "momentum_path" in composed("vicreg_dual_cifar10", []).gating


def test_the_readme_names_what_there_is():
    text = README.read_text()
    names = {}
    for row in ("methods", "with solo-learn ≥ 1.0.6", "backbones"):
        (line,) = re.findall(rf"^\| {row} \| (.*?) \|", text, re.M)
        names[row] = re.findall(r"`(\w+)`", line)
    gated, later = (
        {f"{name}_{kind}" for name in names[row] for kind in ("dual", "gated", "distilled")}
        for row in ("methods", "with solo-learn ≥ 1.0.6")
    )
    assert gated <= set(GATED_METHODS)
    assert "us3l" in text
    assert set(GATED_METHODS) - gated - {"us3l"} in (set(), later)
    plain = {name.removesuffix("_gated") for name in BACKBONES if name.endswith("_gated")}
    assert set(names["backbones"]) == plain
    row = re.compile(r"^\| `(\w+)`(?: \(default\))? \| .* \| .* \|$", re.M)
    kinds = row.findall((ROOT / "docs/guide/gate_kinds.md").read_text())
    assert set(kinds) == set(GATES)
    assert set(row.findall(text)) <= set(kinds)


# Python


@pytest.fixture
def as_ours():
    """Names that a block registers are forgotten."""
    with (
        mock.patch.dict(GATES),
        mock.patch.dict(METHODS),
        mock.patch.dict(GATED_METHODS),
        mock.patch.dict(BACKBONES),
        mock.patch.dict(BaseMethod._BACKBONES),
    ):
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs(page, as_ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOLO_GATING_ISA", "pytorch")  # building the kernel takes long
    run = tmp_path / "trained_models/vicreg_distilled/<run>"
    shutil.copytree(CHECKPOINT.parent, run)
    images = torch.randn(2, 3, 16, 16)
    names = {"__name__": "block", "images": images, "one": images, "other": images + 1}
    names |= {"unlabelled": torch.randn(32, 3, 16, 16), "labels": [0, 0]}
    for code in blocks(page, "python"):
        exec(compile(code, name_of(page), "exec"), names)


# Commands


def commands(page):
    """The commands of a page, each a line with its mark (or None)."""
    found = []
    for code in blocks(page, "bash"):
        for line in re.sub(r"\\\n\s*", " ", code).splitlines():
            command, _, comment = line.partition(" # ")
            mark = re.search(rf"\b({'|'.join(MARKS)})\b", comment)
            if command.strip():
                found.append((command.strip(), mark and mark[1]))
    return found


COMMANDS = [(page, *command) for page in WRITTEN for command in commands(page)]


@pytest.fixture
def own_configs(tmp_path):
    """The configs that a page shows, where it says that they are."""

    def write(page):
        for code in blocks(page, "yaml"):
            if path := re.match(r"# (\S+\.yaml)\n", code):
                file = tmp_path / path[1]
                file.parent.mkdir(exist_ok=True)
                file.write_text(code)

    return write


@pytest.mark.parametrize(
    ("page", "command", "mark"),
    COMMANDS,
    ids=[f"{name_of(page)}: {command[:60]}" for page, command, _ in COMMANDS],
)
def test_commands_exist(page, command, mark, call, own_configs):
    if mark in MARKS[:2]:
        return
    own_configs(page)
    for part in command.replace("$CKPT", str(CHECKPOINT)).split("&&"):
        check_command(shlex.split(part), call)


def check_command(words, call):
    while words and re.fullmatch(r"\w+=.*", words[0]):  # a variable
        words = words[1:]
    if not words:
        return
    program, *arguments = words
    if program in ("bash", "sbatch"):
        assert (ROOT / arguments[0]).is_file(), arguments[0]
    elif program == "python" and arguments[0] == "-m":
        check_module(arguments[1], arguments[2:], call)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
    else:
        pytest.fail(f"{program}: nothing is known of it; its line may end with a mark")


def check_module(name, arguments, call):
    module = importlib.import_module(name)
    kind = name.removeprefix("solo_gating.main_")
    if not name.startswith("solo_gating.main_"):
        assert callable(module.main)
        return
    if kind not in WITHOUT_CONFIG:
        if "-m" in arguments:  # of a sweep the first job
            arguments = [word.partition(",")[0] for word in arguments if word != "-m"]
        # Composed, every key looked up, and printed.
        shown = [] if {"--help", "--cfg"} & set(arguments) else ["--cfg", "job"]
        code, _, error = call(module, *arguments, *shown)
        assert code == 0, error
        return
    _, explanation, _ = call(module, "--help")
    words = set(re.findall(r"[a-z][\w-]*", explanation))
    for argument in arguments:
        key = re.match(r"--([a-z][\w-]*)|([a-z][\w.-]*)(?==)", argument)
        if key is None:
            continue
        option = key[1] or key[2]
        assert option in words or (
            "." in option and known(option, {**PRETRAINING, **EVALUATIONS["knn"]})
        ), option


# Examples


def test_the_training_loop_of_the_examples(tmp_path, capsys):
    digits = load_digits()
    for label in range(4):
        for number, image in enumerate(digits.images[digits.target == label][:9]):
            folder = tmp_path / ("train" if number < 6 else "test") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype("uint8")).resize((16, 16)).save(
                folder / f"{number}.png"
            )
    example = runpy.run_path(str(ROOT / "examples/vicreg_dual.py"))
    example["train"].__globals__["REST"] = 1
    torch.manual_seed(0)
    backbone = example["train"](tmp_path, epochs=2, width=4, batch=8)
    torch.manual_seed(0)
    fresh = create_backbone("resnet18_gated", width=4, stem="cifar")
    before, after = fresh.state_dict(), backbone.state_dict()
    assert not torch.equal(
        before["layer1.0.gate.expand.weight"], after["layer1.0.gate.expand.weight"]
    )
    assert capsys.readouterr().out.count("loss") == 2
    rows = example["evaluate"](backbone, tmp_path)
    assert rows["dense"][1] == count_flops(fresh, (12, 12)).dense
    assert rows["gated"][1] != rows["dense"][1]

    def features(part):
        images, labels = [], []
        for file in sorted((tmp_path / part).glob("*/*.png")):
            image = torch.tensor(
                list(
                    Image.open(file)
                    .convert("RGB")
                    .resize((12, 12), Image.Resampling.BILINEAR)
                    .getdata()
                )
            )
            images.append((image.reshape(12, 12, 3).permute(2, 0, 1) / 255 - 0.3) / 0.37)
            labels.append(int(file.parent.name))
        with torch.no_grad():
            return backbone(torch.stack(images)).numpy(), labels

    nearest = KNeighborsClassifier(1).fit(*features("train"))
    assert rows["dense"][0] == pytest.approx(100 * nearest.score(*features("test")), abs=0.01)


def test_the_drawing_says_what_it_shows():
    drawing = (ROOT / "docs/idea.svg").read_text()
    assert "<title" in drawing
    assert "prefers-color-scheme: dark" in drawing
