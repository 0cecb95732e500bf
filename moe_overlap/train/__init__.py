"""The real job: a decoder-only MoE language model trained on real text, expert-parallel, overlap on or off.

`main.py` is the command, `loop.py` the training of one rank, `model.py` the network, `text.py` the data,
`checkpoint.py` exact resume, `ranks.py` processes, `routing_file.py` routing for benchmarks.
"""

from moe_overlap.train.main import main

__all__ = ["main"]
