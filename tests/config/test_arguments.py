"""Hydra's grammar at the command line: flags anywhere, paths as typed, sweeps to their end."""

import argparse
import json

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from solo_gating import (
    InputError,
    main_benchmark,
    main_benchmark_data,
    main_benchmark_train,
    main_export,
    main_flops,
    main_knn,
    main_policy,
    main_report,
)
from solo_gating.config.arguments import (
    as_typed,
    command_parser,
    flags_to_overrides,
    quoted,
    read_arguments,
    read_options,
    todays_name,
)
from solo_gating.config.compose import composed

from ..test_cli import assert_one_sentence

TINY = ["--config-name", "vicreg_dual_digits", "backbone.kwargs.width=4", "data.num_classes=10"]
PATHS = [
    *("my data ünï 日本", "it's mine", "run [1]", "a=b", "vicreg-ep=0.ckpt", "100% {x}", "$HOME"),
    *("back\\slash", "ends\\", "\\'", "comma, semi;", "[a]", "{a}", "2024", "007", "1e3", "true"),
    *("a:b", "#1", "x~y", "(a)", "a'b'c", "tab\there", "!&|<>*?"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["checkpoint.dir", "+name", "checkpoint", "pretrained"])
def test_paths_and_names_are_what_was_typed(path, key):
    (override,) = read_arguments([f"{key}={path}"]).parsed()
    assert override.value() == path


@pytest.mark.parametrize("path", [*PATHS, '"a"', "'a'"])
def test_a_quoted_text_is_the_text(path):
    assert OverridesParser.create().parse_override(f"key={quoted(path)}").value() == path


def test_paths_of_a_sweep_are_separated_by_commas():
    typed = ["-m", "checkpoint=a-ep=0.ckpt,it's,c"]
    (override,) = read_arguments(typed).parsed()
    assert list(
        override.sweep_iterator(transformer=lambda value: getattr(value, "text", value))
    ) == [
        "a-ep=0.ckpt",
        "it's",
        "c",
    ]


def test_lists_and_null_are_what_they_are_to_hydra():
    arguments = read_arguments(["data.train_path=[a.npz,b.npz]", "data.val_path=null"])
    assert [override.value() for override in arguments.parsed()] == [["a.npz", "b.npz"], None]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (
            ["a=1", "-m", "b=2", "--config-name", "x"],
            ["--multirun", "--config-name=x", "a=1", "b=2"],
        ),
        (["a=1", "--cfg", "job", "--resolve"], ["--cfg=job", "--resolve", "a=1"]),
        (
            ["a=1", "-cn", "x", "-c", "all", "-p", "g"],
            ["--cfg=all", "--package=g", "--config-name=x", "a=1"],
        ),
        (["--info", "a=1"], ["--info=all", "a=1"]),
        (["a=1", "--info", "plugins"], ["--info=plugins", "a=1"]),
        (["--hydra-help"], ["--hydra-help"]),
        (["~a", "+b=1", "++c=2", "d@e=f"], ["~a", "+b=1", "++c=2", "d@e=f"]),
    ],
)
def test_flags_may_stand_anywhere(typed, expected):
    arguments = read_arguments(typed)
    assert sorted(arguments.to_list()) == sorted(expected)
    assert read_arguments(arguments.to_list()) == arguments


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["last.ckpt"], "got 'last.ckpt', expected key=value"),
        (["seed=a=b"], "quoted for the shell and for Hydra"),
        (["--config-name"], "expected one argument"),
        (["--config-dir", "absent"], "--config-dir: 'absent' is not a folder"),
        (["-cp", "absent"], "--config-path: 'absent' is not a folder"),
    ],
)
def test_what_is_no_argument_is_refused(typed, words):
    with pytest.raises(InputError, match=words):
        read_arguments(typed).parsed()


def test_a_flag_and_an_override_that_disagree_are_refused():
    assert flags_to_overrides(["--calibrate", "0.3", "calibrate=0.3"]) == ["calibrate=0.3"] * 2
    for typed in (["--calibrate=0.3", "calibrate=0.5"], ["calibrate=0.3", "--calibrate", "0.5"]):
        with pytest.raises(InputError, match=r"--calibrate: got 0.[35], and calibrate=0.[35]"):
            flags_to_overrides(typed)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--checkpoint", "a=b.ckpt", "--output=it's"], ["checkpoint=a=b.ckpt", "output=it's"]),
        (["--data.val_path", "x", "--threshold", "-0.5"], ["data.val_path=x", "threshold=-0.5"]),
        (["--max-epochs", "3"], ["max_epochs=3"]),
        (["x", "--sweep", "--k", "1", "y"], ["x", "sweep=true", "k=1", "y"]),
        (["--help"], ["--help"]),
        (["--sweep", "false", "-m"], ["sweep=false", "-m"]),
        (["--config-name", "x", "--cfg", "job"], ["--config-name", "x", "--cfg", "job"]),
        (["--config-dir=x", "--multirun"], ["--config-dir=x", "--multirun"]),
    ],
)
def test_every_key_may_be_a_flag(typed, expected):
    assert flags_to_overrides(typed, {"sweep"}) == expected


@pytest.mark.parametrize("typed", [["--calibrate"], ["--calibrate", "--sweep"], ["--calibrate="]])
def test_a_flag_without_a_value_is_refused(typed):
    with pytest.raises(InputError, match="--calibrate: needs a value"):
        flags_to_overrides(typed, {"sweep"})


def command():
    parser = command_parser("main_none", None)
    parser.add_argument("--checkpoint")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5])
    parser.add_argument("--memory-format", choices=("contiguous", "channels_last"))
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--normalize", action="store_true")
    parser.add_argument("--seconds", type=float, default=20.0)
    return parser


def with_overrides():
    parser = command()
    parser.add_argument("overrides", nargs="*")
    return parser


@pytest.mark.parametrize(
    "typed",
    [
        "checkpoint=a=b.ckpt densities=[0.1,0.3] memory_format=contiguous random=true seconds=3",
        "--checkpoint a=b.ckpt --densities 0.1 0.3 --memory-format contiguous --random --seconds 3",
        "--densities 0.1 0.3 checkpoint=a=b.ckpt --random=true --memory_format=contiguous seconds=3",
        "seconds=3 --random memory_format=contiguous densities=[0.1,0.3] --checkpoint=a=b.ckpt",
        "seconds=3 --random random=true --densities 0.1 0.3 --densities 0.1 0.3 memory_format=contiguous"
        " checkpoint=a=b.ckpt checkpoint=a=b.ckpt",
    ],
)
def test_options_are_keys_and_flags_alike(typed):
    expected = argparse.Namespace(
        checkpoint="a=b.ckpt",
        densities=[0.1, 0.3],
        memory_format="contiguous",
        random=True,
        normalize=False,
        seconds=3.0,
    )
    assert read_options(command(), typed.split()) == expected


def test_what_is_not_given_has_its_default():
    typed = ["checkpoint=null", "seconds=null", "random=false", "densities=0.2"]
    found = read_options(command(), typed)
    assert (found.checkpoint, found.seconds, found.random) == (None, 20.0, False)
    assert found.densities == [0.2]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["densites=0.1"], "densites: no such key, the nearest is densities"),
        (["--densites", "0.1"], "--densites: no such key, the nearest is --densities"),
        (["random=yes"], "random: got 'yes', expected true or false"),
        (["--checkpoint"], "--checkpoint: needs a value"),
        (["--densities", "--random"], "--densities: needs a value"),
        (["densities=[]"], "--densities: needs a value"),
        (["seconds=soon"], "--seconds: invalid float value: 'soon'"),
        (["memory_format=x"], "invalid choice: 'x'"),
        (["seconds=1", "--seconds", "2"], "seconds: got 1, and 2; expected one of them"),
        (["stray"], "got 'stray', expected key=value"),
    ],
)
def test_what_no_option_takes_is_refused(typed, words):
    with pytest.raises(InputError, match=words):
        read_options(command(), typed)


def test_keys_of_a_config_stand_among_the_options():
    known = ["data.val_path", "augmentations", "dataset"]
    typed = ["--densities", "0.1", "data.val_path=a", "--dataset", "x", "+new=1", "~dataset=y"]
    found = read_options(with_overrides(), [*typed, "augmentations.0.crop_size=8"], known)
    assert found.densities == [0.1]
    assert found.overrides == [
        *("data.val_path=a", "dataset=x", "+new=1", "~dataset=y", "augmentations.0.crop_size=8"),
    ]
    with pytest.raises(
        InputError, match=r"data.val_paths: no such key, the nearest is data.val_path"
    ):
        read_options(with_overrides(), ["data.val_paths=x"], known)


def test_an_earlier_name_is_told_once(capsys):
    known = {"checkpoint", "normalize"}
    assert todays_name("pretrained_feature_extractor", known) == "checkpoint"
    line = "pretrained_feature_extractor is called checkpoint now; the earlier name still works\n"
    assert capsys.readouterr() == ("", line)
    assert [todays_name(key, known) for key in ("normalize", "neighbours", "seed")] == [
        *("normalize", "neighbours", "seed"),
    ]
    typed = ["pretrained_feature_extractor=x", "--normalise"]
    found = read_options(command(), typed)
    assert (found.checkpoint, found.normalize) == ("x", True)
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    "flags", [["--cfg", "job"], ["--help"], ["--cfg", "job", "--resolve"], ["--info", "config"]]
)
def test_flags_after_overrides_do_what_hydra_says(flags, call):
    code, stdout, stderr = call(main_flops, *TINY, "gating.target_budget=0.25", *flags)
    assert code == 0, stderr
    assert "target_budget: 0.25" in stdout


def test_flags_after_overrides_of_an_evaluation(call):
    code, stdout, _ = call(main_knn, "checkpoint=a=b", "--cfg", "job")
    assert code == 0
    assert "checkpoint: a=b" in stdout


@pytest.mark.parametrize(
    ("module", "typed", "words"),
    [
        (main_knn, "--chekpoint x", "chekpoint: no such key, the nearest is checkpoint"),
        (main_knn, "checkpoint=x --normalise --foo 1", "foo: no such key"),
        (main_report, "outptu=x .", "outptu: no such key, the nearest is output"),
        (main_report, "output=x", "runs: missing"),
        (
            main_export,
            "checkpoint=x output=y fromat=onnx",
            "fromat: no such key, the nearest is format",
        ),
        (main_export, "checkpoint=x output=y", "checkpoint: 'x' is not a file"),
        (
            main_benchmark,
            "random=true widht=8 output=y",
            "widht: no such key, the nearest is width",
        ),
        (main_benchmark, "--random --widht 8 --output y", "the nearest is --width"),
        (main_benchmark, "random=true output=y data.val_path=a", "only with checkpoint=..."),
        (main_benchmark_train, "methods=[vicreg_dua] output=y", "methods: got 'vicreg_dua'"),
        (
            main_benchmark_data,
            "--config-name vicreg_dual_cifar10 output=y dta.format=npz",
            "dta.format: no such key, the nearest is data.format",
        ),
    ],
)
def test_a_mistake_is_one_sentence_in_every_command(module, typed, words, call, tmp_path):
    code, _, stderr = call(module, *typed.split())
    assert_one_sentence(code, stderr, words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.nun_workers=1"], "data.nun_workers: no such key, the nearest is data.num_workers"),
        (["+nonsense=1"], "nonsense: no such key"),
        (["+limit_train_batch=1"], "the nearest is limit_train_batches"),
        (["viewss=digits"], "viewss: no such key, the nearest is views"),
        (["views=digit"], "Could not find 'views/digit'"),
        (["seed=1,2"], "Ambiguous value"),
        (["-r", "-m"], "Only one of --run"),
        (["seed=${absent}"], "seed: its interpolation cannot be resolved"),
        (["name=../../up"], "name: got '../../up'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words, call, tmp_path):
    code, _, stderr = call(main_flops, *TINY, *arguments)
    assert_one_sentence(code, stderr, words)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_does_not_exist_is_told_with_the_nearest(call):
    code, _, stderr = call(main_flops, "--config-name", "vicreg_dual_cifar1000")
    assert_one_sentence(code, stderr, "--config-name", "the nearest is vicreg_dual_cifar100")


@pytest.fixture
def own_config(tmp_path):
    folder = tmp_path / "my configs"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "defaults:\n  - vicreg_dual_digits\n  - _self_\nname: mine\nbackbone: {kwargs: {width: 4}}\n"
    )
    return folder


@pytest.mark.parametrize(
    ("flag", "absolute"), [("--config-path", False), ("-cp", True), ("--config-dir", False)]
)
def test_a_config_of_one_s_own_extends_a_shipped_one(flag, absolute, own_config, call, tmp_path):
    folder = str(own_config if absolute else own_config.name)
    code, _, stderr = call(main_flops, flag, folder, "--config-name", "mine")
    assert code == 0, stderr
    assert (tmp_path / "outputs/flops/mine/metrics.json").is_file()


def test_a_config_of_one_s_own_comes_before_a_shipped_one(own_config, call):
    (own_config / "mine.yaml").rename(own_config / "vicreg_dual_cifar10.yaml")
    flags = ["--config-path", "my configs", "--config-name", "vicreg_dual_cifar10", "--cfg", "job"]
    code, stdout, stderr = call(main_flops, *flags)
    assert code == 0, stderr
    assert "name: mine" in stdout


# Sweeps


def test_a_sweep_s_failing_job_does_not_stop_the_others(call, tmp_path):
    budgets = "gating.target_budget=2,0.5,0.25"
    code, _, stderr = call(main_flops, *TINY, budgets, "-m", "name=${gating.target_budget}")
    assert code == 2
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "gating.target_budget: got 2" in errors[0]
    assert "1 of the sweep's 3 jobs failed: 0 (gating.target_budget=2)" in errors[1]
    assert len(errors) == 2
    shares = [
        json.loads(file.read_text())["flops"]["share"]
        for file in sorted((tmp_path / "outputs/flops").glob("*/metrics.json"))
    ]
    assert shares == pytest.approx([0.25, 0.5])


def test_an_error_of_the_program_does_not_stop_a_sweep(call, monkeypatch, capsys):
    counted = []

    def broken(cfg):
        counted.append(cfg.seed)
        if cfg.seed == 1:
            raise ZeroDivisionError("a fault")

    monkeypatch.setattr(main_flops, "report_flops", broken)
    code, _, stderr = call(main_flops, *TINY, "-m", "seed=1,2")
    assert counted == [1, 2]
    assert code == 1
    assert "ZeroDivisionError: a fault" in stderr
    assert "1 of the sweep's 2 jobs failed: 0 (seed=1)" in stderr


def test_ctrl_c_ends_a_sweep(call, monkeypatch):
    counted = []

    def interrupted(cfg):
        counted.append(cfg.seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(main_flops, "report_flops", interrupted)
    code, _, _ = call(main_flops, *TINY, "-m", "seed=1,2")
    assert (code, counted) == (130, [1])


# Other entry points


@pytest.mark.parametrize(
    ("override", "option"),
    [
        ("crop_size=8", "resolution alone"),
        ("+threshold=1", "threshold=... alone"),
        ("+budget=1", "budget=... alone"),
    ],
)
def test_an_option_s_override_is_refused(override, option, call):
    code, _, stderr = call(main_export, "--checkpoint", "x", "--output", "y", override)
    assert_one_sentence(code, stderr, f"got {override}", option)


def test_a_flag_of_the_policy_and_an_override_are_one_setting(call):
    arguments = ["checkpoint=x", "--calibrate", "0.3", "threshold=0.5"]
    code, _, stderr = call(main_policy, *arguments)
    assert_one_sentence(code, stderr, "threshold: got 0.5", "calibrate")


def test_arguments_of_a_kind_of_gates_need_no_plus():
    cfg = composed("vicreg_dual_digits", ["gating.gate_kwargs.bias=4", "gating.gate=channel"])
    assert cfg.gating.gate_kwargs == {"bias": 4}
    assert as_typed("+gating.gate_kwargs.bias=4") == "+gating.gate_kwargs.bias=4"
    assert as_typed("gating.reduction=4") == "gating.reduction=4"
