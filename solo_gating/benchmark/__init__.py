"""Measured side by side: training steps, inference, and making images ready.

| file | what it does |
|---|---|
| `training/`, `inference/`, `data.py` | one for each of the commands |
| `timing.py` | calls what is compared in turns; medians over rounds |
| `machine.py` | processor, versions, threads |
"""
