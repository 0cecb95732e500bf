"""`moe-overlap bench`: measurements that anyone can repeat. `layer.py` is the command and `phase.py` its course,
`cases.py` what is timed, `timing.py` how, `check.py` what must be true before, `wires.py` what carries the rows,
`rows.py` what is reported, `slept.py` the mode in which compute sleeps; on one card it is `staged.py`, with
`staged_*.py` and `cuda_timing.py`. `overlap.py` sweeps it, with `overlap_*.py` and `shaped.py`. `balance.py` is another
command, with `balance_*.py`, `workloads.py` and `oracle.py`; `ops.py` the last, with `ops_*.py`."""

from __future__ import annotations

from collections.abc import Sequence

from moe_overlap.commands.parser import OneLineParser

COMMANDS = {
    "layer": "schedules of a Mixture-of-Experts block pair against each other",
    "overlap": "how much each schedule hides, over the share of communication; emulated link and real TCP",
    "balance": "copies of experts under skewed routing against none, and against balanced routing",
    "ops": "every fused op against plain PyTorch and torch.compile",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and return its exit status: 0, 1 (a correctness check failed) or 2 (bad input, one line)."""
    import sys

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        parser = OneLineParser(prog="moe-overlap bench", description="Measure.")
        commands = parser.add_subparsers(title="benchmarks", metavar="{" + ",".join(COMMANDS) + "}")
        for name, text in COMMANDS.items():
            commands.add_parser(name, help=text)
        parser.parse_args(words)
        parser.error(f"which benchmark? expected one of {', '.join(COMMANDS)}")
    if words[0] == "ops":
        from moe_overlap.commands.bench import ops

        return ops.main(words[1:])
    if words[0] == "balance":
        from moe_overlap.commands.bench import balance

        return balance.main(words[1:])
    if words[0] == "overlap":
        from moe_overlap.commands.bench import overlap

        return overlap.main(words[1:])
    from moe_overlap.commands.bench import layer

    return layer.main(words[1:])
