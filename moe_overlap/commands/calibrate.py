"""`moe-overlap calibrate`: measure the cost model of a layer, keep it for schedule="auto", and say what would run.

It does what the first forward call of a layer with schedule="auto" does, for a layer of these sizes, ahead of time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_overlap import config
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.auto.cost_cache import clear
from moe_overlap.commands.parser import (
    MOST_THREADS,
    OneLineParser,
    TypedDefaults,
    check_count,
    check_output,
    check_timeout,
    flag_of,
)
from moe_overlap.errors import ConfigError, MoeTransportError
from moe_overlap.launch.launch import World, run, torchrun_world_size
from moe_overlap.launch.saying import one_line
from moe_overlap.layer.arguments import DEDUP
from moe_overlap.layer.layer import MoELayer
from moe_overlap.measure.files import write_atomically
from moe_overlap.transport.base import Transport
from moe_overlap.transport.emulated_link import EmulatedLinkTransport
from moe_overlap.transport.link import LinkSpec, NodeTopology
from moe_overlap.transport.process_group import ProcessGroupTransport

PROGRAM = "moe-overlap calibrate"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
PHASES = ("infer", "train")


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """The layer to measure: `tokens` of one rank, `experts` of all."""

    ranks: int = 2
    ranks_per_node: int = 1
    threads: int = 1
    tokens: int = 1024
    hidden: int = 512
    ffn: int = 2048
    experts: int = 8
    top_k: int = 2
    shared: int = 0
    dtype: str = "bf16"
    link: str = "none"
    device: str = "cpu"
    phase: str = "train"
    dedup: str = "off"
    out: str = ""
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        check_timeout(self.timeout_s)
        for name in "ranks_per_node tokens hidden ffn experts top_k".split():
            check_count(name, getattr(self, name))
        check_count("shared", self.shared, least=0)
        check_count("threads", self.threads, most=MOST_THREADS)
        check_count("ranks", self.ranks, least=2)  # one rank exchanges nothing
        if self.top_k > self.experts:
            raise ConfigError("--top-k", self.top_k, f"an integer from 1 to --experts ({self.experts})")
        if self.ranks % self.ranks_per_node:
            raise ConfigError("--ranks-per-node", self.ranks_per_node, f"a divisor of --ranks ({self.ranks})")
        if self.experts % self.ranks:
            raise ConfigError("--experts", self.experts, f"a multiple of --ranks ({self.ranks})")
        if self.dtype not in DTYPES:
            raise ConfigError("--dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if self.dedup not in DEDUP:
            raise ConfigError("--dedup", self.dedup, f"one of {', '.join(DEDUP)}")
        if self.phase not in PHASES:
            raise ConfigError("--phase", self.phase, f"one of {', '.join(PHASES)}")
        try:
            link = LinkSpec.parse(self.link)
        except ConfigError as error:
            raise ConfigError("--link", self.link, error.expected) from None
        if self.device not in ("cpu", "cuda"):
            raise ConfigError("--device", self.device, "cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device", self.device, f"cpu: torch {torch.__version__} sees no CUDA device")
        if self.device == "cuda" and link is not None:
            raise ConfigError("--link", self.link, "none on CUDA: only CPU ranks have an emulated link")
        if link is not None and self.ranks == self.ranks_per_node:
            expected = f"none with one node (--ranks-per-node {self.ranks_per_node}), over whose link nothing goes"
            raise ConfigError("--link", self.link, expected)
        if link is None and self.ranks_per_node != 1:
            expected = "1 without an emulated --link, whose nodes it says: a network is measured as it is"
            raise ConfigError("--ranks-per-node", self.ranks_per_node, expected)


HELP = {
    "ranks": "processes to spawn (under torchrun: its world size)",
    "ranks_per_node": "ranks that talk at full speed beside an emulated link",
    "threads": "threads per rank",
    "tokens": "tokens per rank",
    "hidden": "model width",
    "ffn": "width of an expert",
    "experts": "routed experts over all ranks",
    "top_k": "experts per token",
    "shared": "width of a shared expert; 0: none",
    "dtype": ", ".join(DTYPES),
    "device": "cpu (gloo) or cuda (NCCL, one device a rank)",
    "link": "none (the network that is there), or RATE[:LATENCY] of an emulated one",
    "phase": "infer: forward only; train: forward and backward",
    "dedup": "of the layer: off, on, auto; with on and auto, deduplicated steps are measured too",
    "out": "file for the cost model, which moe-overlap plan --cost-model reads",
    "timeout_s": "longest wait for another rank, seconds",
}


EXAMPLES = """examples:
  moe-overlap calibrate --link 400mbit:50us
  moe-overlap calibrate --clear
  torchrun --nproc-per-node 8 -m moe_overlap calibrate --device cuda"""


def parse(argv: Sequence[str], *, ranks: int | None = None) -> CalibrateOptions:
    """Options from the command line; ConfigError for a value out of range. `ranks` (torchrun's) wins over --ranks."""
    parser = OneLineParser(prog=PROGRAM, description="Measure the cost model that schedule='auto' uses.",
                           formatter_class=TypedDefaults, epilog=EXAMPLES)  # fmt: skip
    defaults = CalibrateOptions()
    for name, text in HELP.items():
        default = getattr(defaults, name)
        parser.add_argument(flag_of(name), type=type(default), default=default, help=text)
    parser.add_argument("--clear", action="store_true", help="alone: remove the cost models that were kept, and end")
    values = vars(parser.parse_args(argv))
    if values.pop("clear"):
        raise ConfigError("--clear", "beside other options", "no other option: it measures nothing")
    if ranks is not None:
        values["ranks"] = ranks
    return CalibrateOptions(**values)


def main(argv: Sequence[str]) -> int:
    """Calibrate on ranks it spawns, or on torchrun's; the exit status. ConfigError for bad input."""
    if list(argv) == ["--clear"]:
        print(f"removed {clear()} cost models from {config.cache_dir()}")
        return 0
    options = parse(argv, ranks=torchrun_world_size())
    if options.out and not config.torchrun("RANK"):  # rank 0 alone writes
        check_output("--out", options.out)
    cuda = options.device == "cuda"
    if cuda and torchrun_world_size() is None and options.ranks > torch.cuda.device_count():
        raise ConfigError("--ranks", options.ranks, f"at most the {torch.cuda.device_count()} CUDA devices here")
    return run(run_rank, argv, options.ranks, timeout_s=options.timeout_s, program=PROGRAM, cuda=cuda)


def run_rank(world: World, argv: Sequence[str]) -> int:
    """What every rank does; rank 0 prints."""
    options = parse(argv, ranks=world.size)
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        if world.local_rank >= (count := torch.cuda.device_count()):
            text = f"error: rank {world.rank}: no CUDA device for local rank {world.local_rank}, there are {count}"
            return _complain(world, text, 2, only_first=False)
        torch.cuda.set_device(world.local_rank)
    try:
        layer, seconds = calibrated(options, world)
    except ConfigError as error:
        return _complain(world, f"error: {error}", 2, only_first=True)
    except MoeTransportError as error:
        return _complain(world, f"error: rank {world.rank}: {error}", 1, only_first=False)
    if world.rank == 0:
        assert isinstance(layer.schedule, AutoSchedule)
        (schedule,) = layer.schedule.found.values()
        kept_in, not_kept = layer.schedule.kept_in, layer.schedule.not_kept
        print(layer.explain())
        print(f"\nready after {seconds:.1f} s; {f'not kept: {not_kept}' if kept_in is None else f'kept in {kept_in}'}")
        if options.out:
            write_atomically(Path(options.out), (json.dumps(schedule.model.to_json(), indent=1) + "\n").encode())
            print(f"wrote {options.out}")
    return 0


def calibrated(options: CalibrateOptions, world: World) -> tuple[MoELayer, float]:
    """(a layer after its first step under "auto", seconds of that step). Collective."""
    assert world.group is not None
    core = ProcessGroupTransport(world.group, timeout_s=options.timeout_s, device=options.device)
    transport: Transport = core
    link = LinkSpec.parse(options.link)
    if link is not None:
        topology = NodeTopology(world_size=world.size, ranks_per_node=options.ranks_per_node)
        transport = EmulatedLinkTransport(core, link, topology)
    torch.manual_seed(0)
    layer = MoELayer(options.hidden, options.ffn, options.experts, options.top_k, transport=transport, schedule="auto",
                     shared_expert_size=options.shared or None, dedup=options.dedup, device=options.device,
                     dtype=DTYPES[options.dtype])  # fmt: skip
    generator = torch.Generator().manual_seed(1 + world.rank)
    x_TD = torch.randn(options.tokens, options.hidden, generator=generator)
    x_TD = x_TD.to(options.device, DTYPES[options.dtype])
    train = options.phase == "train"
    start_s = time.perf_counter()
    with torch.set_grad_enabled(train):
        y_TD = layer(x_TD.requires_grad_(train))
        if train:
            y_TD.float().square().mean().backward()
    return layer, time.perf_counter() - start_s


def _complain(world: World, text: str, status: int, *, only_first: bool) -> int:
    if world.rank == 0 or not only_first:
        print(f"{PROGRAM}: {one_line(text)}", file=sys.stderr, flush=True)
    return status
