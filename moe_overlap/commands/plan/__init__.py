"""`moe-overlap plan`: which schedule wins on a cluster, from numbers alone, before it is rented.

`options.py` is the command line, `machine.py` turns figures of a machine into a cost model, `sweep.py` asks the planner
at many bandwidths and numbers of ranks, `picture.py` draws it and `command.py` says it. No tensor, no process group.
"""

from moe_overlap.commands.plan.command import main

__all__ = ["main"]
