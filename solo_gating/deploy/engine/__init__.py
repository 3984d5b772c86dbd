"""The engine that computes only the channels an image needs.

| file | what it does |
|---|---|
| `encoder.py` | `compile` and `load`, and the module that they give |
| `fold.py` | a backbone's weights with BatchNorms folded into the convolutions, as the runtime's network |
| `known.py` | what `fold` takes for granted is checked here |
| `fallback.py` | the kernel's computation in PyTorch, where there is no compiler |
| `integer.py` | the same in int8 |
| `whole.py` | a backbone as it is, for gates that do more than mask |

The kernel, and what runs it without PyTorch, is the package `solo_gating_runtime`.
"""

from .encoder import DTYPES, CompiledEncoder, compile, load

__all__ = ["DTYPES", "CompiledEncoder", "compile", "load"]
