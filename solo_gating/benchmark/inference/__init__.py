"""How fast encoders are on this CPU, beside PyTorch, ONNX Runtime and OpenVINO.

| file | what it does |
|---|---|
| `run.py` | the command: cases one after another, figures and the picture |
| `cases.py` | encoders whose gates choose a wanted share of the channels, and images |
| `sources.py` | these encoders and images for each resolution and batch: random, or of a checkpoint |
| `engines.py` | makes an engine ready for a network, a batch and a number of threads, in each precision |
| `measure.py` | one case: which engines take part, checks of their features, rows of figures |
| `table.py` | rows as text |
| `advice.py` | what to pick, from the rows |
| `machine.py` | what the CPU can, and keeps all engines to an instruction set |
"""
