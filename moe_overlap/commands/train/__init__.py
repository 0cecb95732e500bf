"""The real job: a decoder-only MoE language model trained on real text, expert-parallel, overlap on or off.

`command.py` is the command line, `loop.py` the training of one rank, `model.py` the network, `text.py` the data,
`checkpoint.py` exact resume, `routing_file.py` routing for benchmarks.
"""

from moe_overlap.commands.train.command import main

__all__ = ["main"]
