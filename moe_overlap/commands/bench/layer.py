"""`moe-overlap bench layer`: from the command line to rows, a picture and a trace.

Per phase: solve for the link (with --comm-share), find each shortcut's best slot, check every row, measure every
exchange alone, then time all rows interleaved. `--device cuda` is another course (`staged.py`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_overlap import config
from moe_overlap.commands.bench import staged
from moe_overlap.commands.bench.options import LayerOptions, given_options, parse
from moe_overlap.commands.bench.phase import CheckFailed, measure_phase
from moe_overlap.commands.bench.routing import load, read_file, routing_file
from moe_overlap.commands.bench.setting import Setting
from moe_overlap.commands.parser import fresh_folder
from moe_overlap.errors import ConfigError, MoeTransportError
from moe_overlap.launch.launch import World, run, torchrun_world_size
from moe_overlap.launch.saying import one_line
from moe_overlap.measure.picture import Panel, write_png, write_trace
from moe_overlap.measure.report import LEGEND, Row, print_table, verdict, write_jsonl

PROGRAM = "moe-overlap bench layer"
EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
ROWS = "results.jsonl"
OUTPUTS = (ROWS, "timeline.png", "trace.json")


def main(argv: Sequence[str]) -> int:
    """Run the benchmark on ranks it spawns, or on torchrun's; the exit status. ConfigError for bad input."""
    if staged.is_asked(given_options(argv)):
        return staged.main(argv)
    options = parse(argv, ranks=torchrun_world_size())
    path = routing_file(options.routing, options.out)
    if path is not None:
        read_file(path, experts=options.experts, top_k=options.top_k)
    if not config.torchrun("RANK"):  # rank 0 alone writes
        fresh_folder("--out", options.out, OUTPUTS)
    return run(run_rank, argv, options.ranks, timeout_s=options.timeout_s, program=PROGRAM)


def run_rank(world: World, argv: Sequence[str]) -> int:
    """What every rank does. What a user can act on becomes one line on stderr, of rank 0 where all ranks know it."""
    options = parse(argv, ranks=world.size)
    return on_rank(world, PROGRAM, options.threads, lambda: _run(options, world))


def on_rank(world: World, program: str, threads: int, body: Callable[[], int]) -> int:
    """The status of `body`, run with so many threads, or that of the error that it says in a line."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def complain(text: str, status: int, *, only_first: bool) -> int:
        if world.rank == 0 or not only_first:
            print(f"{program}: {one_line(text)}", file=sys.stderr, flush=True)
        return status

    try:
        return body()
    except CheckFailed as error:
        return complain(f"correctness: {error}", EXIT_FAILED, only_first=True)
    except ConfigError as error:
        return complain(f"error: {error}", EXIT_BAD_INPUT, only_first=True)
    except MoeTransportError as error:
        return complain(f"error: rank {world.rank}: {error}", EXIT_FAILED, only_first=False)
    finally:
        torch.set_num_threads(threads_before)


def _run(options: LayerOptions, world: World) -> int:
    out = Path(options.out)
    setting = Setting.build(options, world, load_routing(options, world.rank), say_of(world, PROGRAM))
    rows: list[dict[str, Any]] = []
    panels: list[Panel] = []
    for phase in options.phases:
        result = measure_phase(setting, phase)
        rows += result.rows
        panels += result.panels
        if world.rank == 0:  # what was measured is there, however the run ends
            write_jsonl(out / ROWS, rows)
    if world.rank == 0:
        _publish(options, out, rows, panels)
    return 0


def _publish(options: LayerOptions, out: Path, rows: Sequence[Row], panels: Sequence[Panel]) -> None:
    write_trace(out / "trace.json", panels)
    links = "; ".join(dict.fromkeys(f"{row['phase']}: link {row['link']}" for row in rows))
    sizes = f"{options.ranks} rank(s), {options.tokens} tokens each, D {options.hidden}, F {options.ffn}"
    title = f"One block pair, {sizes}, {options.dtype}, compute {options.compute}\n{links}"
    write_png(out / "timeline.png", panels, title=title.replace("\n", ", measured\n"))
    print_table(rows, title=title)
    shares = {row["phase"]: row["comm_share"] for row in rows}
    for phase, share in shares.items():
        if share is not None:
            print(f"{phase}: communication is {share:.0%} of serial top2")
    print(LEGEND)
    print(f"wrote {', '.join(str(out / name) for name in OUTPUTS)}")
    print("\n".join(verdict(rows)))


def load_routing(options: LayerOptions, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [T, top_k], weights [T, top_k]) of this rank's tokens."""
    return load(
        options.routing,
        out=options.out,
        tokens=options.tokens,
        experts=options.experts,
        top_k=options.top_k,
        rank=rank,
        ranks=options.ranks,
    )


def say_of(world: World, program: str) -> Callable[[str], None]:
    """Progress on stderr, from rank 0, with the seconds since the ranks were ready."""
    begin_s = time.perf_counter()

    def say(text: str) -> None:
        if world.rank == 0:
            print(f"{program} [{time.perf_counter() - begin_s:5.1f} s] {text}", file=sys.stderr, flush=True)

    return say
