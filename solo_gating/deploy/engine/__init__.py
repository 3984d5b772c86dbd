"""The engine that computes only the channels an image needs.

| file | what it does |
|---|---|
| `encoder.py` | `compile`, and the module that it gives |
| `fold.py` | a backbone's weights with BatchNorms folded into the convolutions |
| `library.py` | builds the kernel once, and keeps it in a cache folder |
| `pack.py` | folded weights in the order in which the kernel reads them |
| `fallback.py` | the same computation in PyTorch, where there is no compiler |
"""

from .encoder import CompiledEncoder, compile

__all__ = ["CompiledEncoder", "compile"]
