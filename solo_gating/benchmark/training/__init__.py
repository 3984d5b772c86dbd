"""How long training steps take, beside solo-learn's.

| file | what it does |
|---|---|
| `run.py` | the command |
| `step.py` | one optimiser step of a method on a random batch, as a recipe configures it |
| `memory.py` | the largest number of bytes that a step holds |
| `peak.py` | a step's operations, and how many a matrix product does per second |
| `parts.py` | how long the parts of a gated step take that a dense step has not |
"""
