"""A dense encoder that exists, as a start: solo-learn's checkpoints, torchvision's weights, our own."""

from pathlib import Path

from torch import Tensor

from ..backbones import TwoPathResNet, convolutions
from ..errors import InputError
from .reading import no_weight, read_weights

# In front of a backbone's names: Lightning's of either line, a momentum method's own wrapper, none.
_PREFIXES = ("backbone.", "encoder.", "module.backbone.", "module.encoder_q.", "module.", "")
# What heads and classifiers are called in files that are no more than a ResNet.
_FIRST = ("conv1.", "bn1.", "layer")


def load_pretrained(backbone: TwoPathResNet, file: str | Path, key: str = "pretrained") -> None:
    """Give a gated backbone the weights of a dense encoder; its gated BatchNorms begin as the dense ones.

    Args:
        backbone: whose weights are replaced, except those of its gates.
        file: a checkpoint of this package or of solo-learn, or a state dict with torchvision's names;
            weights of heads, gates and momentum encoders in it are left out.
        key: that names the file, for messages.

    Raises:
        InputError: for a file that is none of these, or of another architecture.
    """
    weights = _dense_weights(backbone, file, key)
    backbone.load_state_dict(weights, strict=False)
    for block in backbone.gated_blocks:
        for (_, _, norm), gated in zip(convolutions(block), block.gated_norms, strict=True):
            if gated is not norm:  # of a gate that scales it has no weights
                known, own = norm.state_dict(), gated.state_dict()
                gated.load_state_dict({key: known[key] for key in own})


def _dense_weights(backbone: TwoPathResNet, file: str | Path, key: str) -> dict[str, Tensor]:
    found, ours = read_weights(file, key), backbone.dense_state_dict()
    prefix = next((p for p in _PREFIXES if f"{p}conv1.weight" in found), None)
    if prefix is None:
        raise InputError(
            f"{key}: {str(file)!r} has no weights of a ResNet (conv1.weight), expected a checkpoint of "
            "solo-learn or of this package, or a state dict of torchvision's"
        )
    weights = {name.removeprefix(prefix): v for name, v in found.items() if name.startswith(prefix)}
    kwargs = "backbone.name, backbone.kwargs.width and backbone.kwargs.stem"
    gated = {name for name in backbone.state_dict() if name not in ours}
    for name in weights:
        its_own = name in gated or ".gate" in name  # of a gated encoder, whatever its gates are
        if name.startswith(_FIRST) and name not in ours and not its_own:
            raise InputError(
                f"{key}: {str(file)!r} has {name}, which the network of {kwargs} lacks"
            )
    for name, value in ours.items():
        if name not in weights:
            if name.endswith("num_batches_tracked"):  # which files of old lack
                weights[name] = value
                continue
            raise InputError(f"{key}: {str(file)!r} lacks {name} of the network of {kwargs}")
        shape, expected = tuple(weights[name].shape), tuple(value.shape)
        if shape != expected:
            raise InputError(
                f"{key}: {name} of {str(file)!r} is {shape}, expected {expected} by {kwargs}"
            )
        if reason := no_weight(name, weights[name], value.dtype):
            raise InputError(f"{key}: {str(file)!r} cannot be used: {name} {reason}")
    return {name: weights[name] for name in ours}
