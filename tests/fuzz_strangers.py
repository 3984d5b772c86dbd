"""Odd args.json and damaged checkpoints, from a seed: each is refused in one sentence, or harmless.

python -m tests.fuzz_strangers --seed 1 --number 300
"""

import argparse
import collections
import json
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from solo_gating import InputError
from solo_gating.checkpoints.reading import read_checkpoint
from solo_gating.evaluate.evaluation import prepare_evaluation

SECRET = "a secret of the environment"
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 1.5, 10**9, 10**400, float("nan"), float("inf"), 1e300),
    *(
        "",
        "x",
        "3",
        "???",
        "${oc.env:FUZZ_SECRET}",
        "${name}",
        "${",
        "x/../../../../x",
        "\0",
        "\ud800",
    ),
    *(
        "a" * 10_000,
        [],
        [None],
        [[]],
        [1, "x"],
        {},
        {"x": None},
        {"": {}},
        {"_target_": "os.getcwd"},
    ),
    *([{}], [1, 2, 3], [0.1, 0.9], ["gated"], {"weights": "DEFAULT"}, {"pretrained": True}),
)


def changed_args(args: dict[str, Any], seed: int) -> bytes:
    """An args.json that is odd in one to three places, or as a text."""
    pick = random.Random(seed)
    content = json.loads(json.dumps(args))
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        place, name = _place(content, pick)
        if pick.random() < 0.15:
            del place[name]
        else:
            place[name] = pick.choice(_ODD)
    text = json.dumps(content)
    if pick.random() < 0.8:
        return text.encode()
    return pick.choice(_TEXTS)(text, pick)


def _place(content: Any, pick: random.Random) -> tuple[Any, Any]:
    """A list or object somewhere in an object, and the index or key of a part of it."""
    name = pick.choice(list(content) if isinstance(content, dict) else range(len(content)))
    deeper = isinstance(content[name], (dict, list)) and len(content[name])
    return _place(content[name], pick) if deeper and pick.random() < 0.8 else (content, name)


def _cut(text: str, pick: random.Random) -> bytes:
    return text[: pick.randrange(len(text))].encode()


def _with_byte(text: str, pick: random.Random) -> bytes:
    content = bytearray(text.encode())
    content[pick.randrange(len(content))] = pick.randrange(256)
    return bytes(content)


_TEXTS: tuple[Callable[[str, random.Random], bytes], ...] = (
    _cut,
    _with_byte,
    lambda text, pick: b"\xef\xbb\xbf" + text.encode(),
    lambda text, pick: text.encode("utf-16"),
    lambda text, pick: text.encode() + b" " * 2**24,
    lambda text, pick: ('{"data": {}, ' + text[1:]).encode(),
    lambda text, pick: (text[:-1] + ', "x": ' + "[" * 300 + "]" * 300 + "}").encode(),
    lambda text, pick: b"[" * 200_000,
    lambda text, pick: (text[:-1] + ', "seed": ' + "9" * 5000 + "}").encode(),
)


def outcome_of_args(cfg: Any, checkpoint: Path, content: bytes) -> str:
    """What an evaluation makes of an args.json: "sentence", "accepted" or "stack trace".

    Args:
        cfg: of an evaluation of the checkpoint; stays as it is.
        checkpoint: in a folder of its own.
        content: of the args.json beside it.
    """
    (checkpoint.parent / "args.json").write_bytes(content)

    def use() -> str:
        changed = cfg.copy()
        changed.features = "projector" if len(content) % 2 else "backbone"
        evaluation = prepare_evaluation(changed, "knn", ("k",), ("val",))
        found = json.dumps([evaluation.encoder.description(), evaluation.settings], allow_nan=False)
        assert SECRET not in found
        assert evaluation.folder.resolve().parent == checkpoint.parent.resolve() / "evaluation"
        evaluation.extract("val", evaluation.paths[0])
        return "accepted"

    return _outcome(use)


def damaged(content: bytes, seed: int) -> bytes:
    """A file that was cut, or in which a few bits are others."""
    pick = random.Random(seed)
    if pick.random() < 0.3:
        return content[: pick.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(pick.choice((1, 1, 1, 8))):
        # Half of them where the zip's own tables are, which are short.
        start = pick.choice((0, len(content) - 8000))
        changed[pick.randrange(max(start, 0), len(content))] ^= 1 << pick.randrange(8)
    return bytes(changed)


def outcome_of_checkpoint(file: Path, content: bytes, whole: dict[str, Any]) -> str:
    """What becomes of a damaged checkpoint: "sentence", "unchanged", or what must not be.

    Args:
        file: that it is written to.
        content: of the file.
        whole: the `state_dict` that was in it before.
    """
    file.write_bytes(content)

    def use() -> str:
        state = read_checkpoint(file, "checkpoint")["state_dict"]
        same = list(state) == list(whole) and all(map(torch.equal, state.values(), whole.values()))
        return "unchanged" if same else "other weights"

    return _outcome(use)


def _outcome(use: Callable[[], str]) -> str:
    try:
        return use()
    except InputError as error:
        message = str(error)
        if "\n" in message or len(message) >= 1500 or "weights_only" in message:
            return f"no such sentence: {message}"
        return "sentence"
    except Exception:
        return f"stack trace: {traceback.format_exc()}"


def main() -> None:
    """Fuzz a tiny run, and count what becomes of it."""
    from .test_evaluation import evaluation_config, run_config, save_run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=300, help="of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = save_run(run_config(Path(folder)), Path(folder))
        args = json.loads((Path(folder) / "args.json").read_text())
        whole = run.checkpoint.read_bytes()
        state = read_checkpoint(run.checkpoint, "checkpoint")["state_dict"]
        cfg = evaluation_config("knn", run.checkpoint)
        counts: collections.Counter[str] = collections.Counter()
        for seed in range(options.seed * options.number, (options.seed + 1) * options.number):
            broken = Path(folder) / "broken.ckpt"
            for kind, outcome in (
                ("args", outcome_of_args(cfg, run.checkpoint, changed_args(args, seed))),
                ("checkpoint", outcome_of_checkpoint(broken, damaged(whole, seed), state)),
            ):
                word, _, trace = outcome.partition(":")
                counts[f"{kind}: {word}"] += 1
                if word not in ("sentence", "accepted", "unchanged"):
                    print(f"{kind}, seed {seed}: {word}{trace}")  # noqa: T201
        print(dict(counts))  # noqa: T201
        shutil.rmtree(Path(folder) / "evaluation", ignore_errors=True)


if __name__ == "__main__":
    main()
