"""The command line of `moe-overlap bench overlap`, as one frozen record."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from moe_overlap.commands.bench.cases import CASES
from moe_overlap.commands.bench.options import HELP as LAYER_HELP
from moe_overlap.commands.bench.options import LayerOptions, add_options
from moe_overlap.commands.bench.phases import PHASES
from moe_overlap.commands.bench.shaped import NODES
from moe_overlap.commands.parser import OneLineParser, TypedDefaults, flag_of
from moe_overlap.errors import ConfigError

WIRES = ("emulated", "tcp")
SCHEDULES = ("serial", "chunked", "expert_groups", "fastermoe", "lancet", "shared_expert", "shortcut")
PROGRAM = "moe-overlap bench overlap"


@dataclass(frozen=True, kw_only=True)
class OverlapOptions:
    """A sweep of `bench layer` over wires, routings, phases and shares. The other fields are those of LayerOptions.
    device: of the nodes that `shaped.torchrun` has made; links_of: the rows whose links are used again."""

    ranks: int = 2
    ranks_per_node: int = 1
    threads: int = 1
    tokens: int = 512
    hidden: int = 256
    ffn: int = 1024
    experts: int = 8
    top_k: int = 2
    dtype: str = "fp32"
    dedup: str = "off"
    schedules: tuple[str, ...] = SCHEDULES
    cases: tuple[str, ...] = CASES
    compute: str = "real"
    repeats: int = 7
    timeout_s: float = 120.0
    shares: tuple[str, ...] = ("0.2", "0.4", "0.6", "0.75")
    phases: tuple[str, ...] = PHASES
    routings: tuple[str, ...] = ("balanced", "zipf")
    wires: tuple[str, ...] = ("emulated",)
    links_of: str = ""
    out: str = "out/overlap"
    device: str = ""

    def __post_init__(self) -> None:
        for name, known in (("wires", WIRES), ("schedules", SCHEDULES)):
            chosen = getattr(self, name)
            if not chosen or not set(chosen) <= set(known):
                raise ConfigError(flag_of(name), ",".join(chosen), f"a comma-separated list out of {', '.join(known)}")
        if not self.routings:
            raise ConfigError("--routings", "", "a comma-separated list of what bench layer --routing takes")
        if not self.shares:
            raise ConfigError("--shares", "", "numbers between 0 and 1, comma-separated")
        if self.ranks == self.ranks_per_node:
            raise ConfigError("--ranks", self.ranks, "ranks of several nodes: more than --ranks-per-node")
        for share in self.share_numbers:
            self.layer(self.routings[0], share, self.out)
        if "tcp" in self.wires and self.ranks != NODES * self.ranks_per_node:
            expected = f"{NODES} x --ranks-per-node ({NODES * self.ranks_per_node}) with --wires tcp: it has two nodes"
            raise ConfigError("--ranks", self.ranks, expected)

    @property
    def share_numbers(self) -> tuple[float, ...]:
        """ConfigError for what is no number; its range is checked with the other options of a run."""
        found = []
        for text in self.shares:
            try:
                found.append(float(text))
            except ValueError:
                found.append(math.nan)
            if not 0.0 < found[-1] < 1.0:
                raise ConfigError("--shares", text, "numbers between 0 and 1, comma-separated (e.g. 0.2,0.5)")
        return tuple(found)

    def layer(self, routing: str, share: float, out: str) -> LayerOptions:
        """The options of `bench layer` for one point of the sweep, whose phase is chosen later."""
        names = {field.name for field in fields(LayerOptions)} & {field.name for field in fields(self)}
        values = {name: getattr(self, name) for name in names - {"out"}}
        return LayerOptions(**values, routing=routing, comm_share=share, out=out)

    def over(self, wire: str) -> OverlapOptions:
        """The same over one wire, in a folder of its own. "real" is still the file in the folder of the whole."""
        real = str(Path(self.out) / "routing.safetensors")
        routings = tuple(real if routing == "real" else routing for routing in self.routings)
        return replace(self, wires=(wire,), routings=routings, out=str(Path(self.out) / wire))

    def words(self) -> list[str]:
        """The command line that gives these options."""
        found = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != "":
                found.append(f"{flag_of(field.name)}={','.join(value) if isinstance(value, tuple) else value}")
        return found


HELP = {
    name: LAYER_HELP[name]
    for name in "ranks ranks_per_node threads tokens hidden ffn experts top_k dtype dedup cases compute repeats".split()
} | {
    "schedules": "builders to measure, comma-separated: " + ", ".join(SCHEDULES),
    "shares": "shares of communication in serial top2, comma-separated; for each the rate of the link is solved for",
    "phases": "comma-separated: " + ", ".join(PHASES),
    "routings": "comma-separated: balanced, uniform, zipf, real (OUT/routing.safetensors), files of --save-routing",
    "wires": "comma-separated: emulated; tcp (two nodes in network namespaces, rate by tc: needs root)",
    "links_of": "a results.jsonl of this command, whose links are used instead of --shares",
    "out": "folder for results.jsonl, speedup.png, and by wire timeline.png, trace.json and waits.jsonl",
    "timeout_s": LAYER_HELP["timeout_s"],
}
EXAMPLES = """examples:
  moe-overlap bench overlap --shares 0.3,0.6 --phases infer,train --repeats 5
  moe-overlap bench overlap --wires emulated,tcp --routings balanced --cases top2,scmoe_pos2
  moe-overlap bench overlap --wires tcp --ranks 4 --ranks-per-node 2 --compute slept"""


def parse(argv: Sequence[str], *, ranks: int | None = None) -> OverlapOptions:
    """Options from the command line; ConfigError for a value out of range. `ranks` (torchrun's) wins over --ranks."""
    parser = OneLineParser(
        prog=PROGRAM,
        description="How much of the communication each schedule hides, over the share of it.",
        formatter_class=TypedDefaults,
        epilog=EXAMPLES,
    )
    add_options(parser, OverlapOptions(), HELP)
    parser.add_argument("--device", default="", help=argparse.SUPPRESS)  # from shaped.torchrun
    values = vars(parser.parse_args(argv))
    if ranks is not None:
        values["ranks"] = ranks
    found = OverlapOptions(**values)
    layer = found.layer(found.routings[0], found.share_numbers[0], found.out)
    if found.schedules != SCHEDULES:
        layer.check_schedules()
    if found.cases != CASES:
        layer.check_cases()
    return found
