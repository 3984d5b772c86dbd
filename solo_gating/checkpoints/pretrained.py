"""A dense encoder that exists, as a start: solo-learn's checkpoints, torchvision's weights, our own."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..backbones import ResNet, TwoPathResNet, convolutions
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
    kwargs = "backbone.name, backbone.kwargs.width and backbone.kwargs.stem"
    _, found = resnet_weights(file, key)
    weights = dense_weights(backbone, found, f"{key}: {str(file)!r}", f"the network of {kwargs}")
    backbone.load_state_dict(weights, strict=False)
    for block in backbone.gated_blocks:
        for (_, _, norm), gated in zip(convolutions(block), block.gated_norms, strict=True):
            if gated is not norm:  # of a gate that scales it has no weights
                known, own = norm.state_dict(), gated.state_dict()
                gated.load_state_dict({name: known[name] for name in own})


def resnet_weights(file: str | Path, key: str) -> tuple[str, dict[str, Tensor]]:
    """The weights of a file's ResNet, and whatever else has its prefix, under torchvision's names.

    Args:
        file: as for `load_pretrained`.
        key: that names the file, for messages.

    Returns:
        The prefix, and the weights without it.

    Raises:
        InputError: for a file without a ResNet.
    """
    found = read_weights(file, key)
    prefix = next((p for p in _PREFIXES if f"{p}conv1.weight" in found), None)
    if prefix is None:
        raise InputError(
            f"{key}: {str(file)!r} has no weights of a ResNet (conv1.weight), expected a checkpoint of "
            "solo-learn or of this package, or a state dict of torchvision's"
        )
    return prefix, {n.removeprefix(prefix): v for n, v in found.items() if n.startswith(prefix)}


def dense_weights(
    backbone: ResNet, weights: Mapping[str, Tensor], where: str, network: str
) -> dict[str, Tensor]:
    """Those that are the dense path's, all of them.

    Args:
        backbone: may be on the device "meta".
        weights: from `resnet_weights`.
        where: the key and the file, for messages.
        network: what the backbone is, for messages.

    Raises:
        InputError: for weights of another architecture, or such that are no weights.
    """
    ours = backbone.dense_state_dict()
    gated = {name for name in backbone.state_dict() if name not in ours}
    for name in weights:
        its_own = name in gated or ".gate" in name  # of a gated encoder, whatever its gates are
        if name.startswith(_FIRST) and name not in ours and not its_own:
            raise InputError(f"{where} has {name}, which {network} lacks")
    dense = {}
    for name, value in ours.items():
        if name not in weights:
            if name.endswith("num_batches_tracked"):  # which files of old lack
                dense[name] = torch.zeros_like(value, device="cpu")
                continue
            raise InputError(f"{where} lacks {name} of {network}")
        shape, expected = tuple(weights[name].shape), tuple(value.shape)
        if shape != expected:
            key, _, file = where.partition(": ")
            raise InputError(
                f"{key}: {name} of {file} is {shape}, expected {expected} by {network}"
            )
        if reason := no_weight(name, weights[name], value.dtype):
            raise InputError(f"{where} cannot be used: {name} {reason}")
        dense[name] = weights[name]
    return dense
