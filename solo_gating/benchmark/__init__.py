"""What the benchmarks share, and the one of training; `deploy.benchmark` is the one of inference.

| file | what it does |
|---|---|
| `timing.py` | calls what is compared in turns; medians over rounds |
| `machine.py` | processor, versions, threads |
| `step.py` | one optimiser step of a method on a random batch, as a recipe configures it |
| `memory.py` | the largest number of bytes that a step holds |
| `peak.py` | a step's operations, and how many a matrix product does per second |
| `parts.py` | how long the parts of a gated step take that a dense step has not |
"""
