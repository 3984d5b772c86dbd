"""Runs gated encoders on CPUs: needs NumPy and a C++ compiler, and neither PyTorch nor solo-gating.

    import solo_gating_runtime

    encoder = solo_gating_runtime.load("encoder.sgx")
    features = encoder(images)  # B × C × H × W float32, normalised as in training → B × F

| file | what it does |
|---|---|
| `encoder.py` | `load`, and what it gives |
| `network.py` | what an encoder computes, as NumPy arrays |
| `file.py` | the same as bytes: the format of .sgx files |
| `library.py` | builds the kernel once for each instruction set and dtype, and keeps it in a cache folder |
| `kernel/` | the C++ kernel |
"""

from .encoder import Encoder, load
from .errors import InputError
from .library import BuildError

__all__ = ["BuildError", "Encoder", "InputError", "load"]
