"""Turn a checkpoint into files that others can read.

python -m solo_gating.main_export --checkpoint PATH/last.ckpt --path dense --output DIR

--format torch        model.pt: a state dict for torchvision.models.resnet18 (without `fc`)
--format solo-learn   args.json and last.ckpt of the method without gates (vicreg for
                      vicreg_dual), which solo-learn's scripts read without this plugin
"""

import argparse
import io
from pathlib import Path
from typing import Any

import torch

from .cli import one_sentence_errors
from .deploy.dense import dense_state_dict, solo_learn_args, solo_learn_checkpoint
from .evaluate.encoder import load_encoder
from .files import write_bytes, write_json


def export(checkpoint: Path, form: str, output: Path) -> list[Path]:
    """Write the dense encoder of a checkpoint.

    Args:
        checkpoint: with `args.json` beside it.
        form: "torch" or "solo-learn".
        output: folder for the files.

    Returns:
        The files.

    Raises:
        InputError: for a checkpoint that cannot be used, or does not fit the format.
    """
    encoder = load_encoder(checkpoint)
    if form == "torch":
        file = output / "model.pt"
        _save(file, dense_state_dict(encoder))
        return [file]
    args, content = solo_learn_args(encoder), solo_learn_checkpoint(encoder)
    files = [output / "args.json", output / "last.ckpt"]
    write_json(files[0], args)
    _save(files[1], content)
    return files


def _save(file: Path, content: Any) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(file, buffer.getvalue())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--path", choices=("dense",), default="dense")
    parser.add_argument("--format", choices=("torch", "solo-learn"), default="torch")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    with one_sentence_errors():
        for file in export(options.checkpoint, options.format, options.output):
            print(file)


if __name__ == "__main__":
    main()
