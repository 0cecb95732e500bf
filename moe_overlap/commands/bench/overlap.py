"""`moe-overlap bench overlap`, the overlap laboratory: every builder over the share of communication, in each phase,
under several routings, over an emulated link and over real shaped TCP.

A point of the sweep is one phase of `bench layer` (`measure_phase`), with all its checks: the link is solved for, rows
are compared bit for bit with overlap off and with float64, and timed interleaved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_overlap.commands.bench.layer import load_routing, on_rank, say_of
from moe_overlap.commands.bench.overlap_options import PROGRAM, OverlapOptions, parse
from moe_overlap.commands.bench.overlap_picture import write_speedup
from moe_overlap.commands.bench.overlap_report import agreement, summary, wait_rows
from moe_overlap.commands.bench.phase import measure_phase
from moe_overlap.commands.bench.routing import read_file, routing_file
from moe_overlap.commands.bench.setting import Setting
from moe_overlap.commands.bench.shaped import DEVICE, torchrun, unavailable
from moe_overlap.commands.parser import fresh_folder
from moe_overlap.errors import ConfigError
from moe_overlap.launch.launch import World, run, torchrun_world_size
from moe_overlap.measure.files import read_regular
from moe_overlap.measure.picture import Panel, write_png, write_trace
from moe_overlap.measure.report import read_jsonl, write_jsonl
from moe_overlap.transport.link import LinkSpec

ROWS, WAITS = "results.jsonl", "waits.jsonl"
OF_A_WIRE = (ROWS, WAITS, "timeline.png", "trace.json", "speedup.png")
OF_ALL = (ROWS, "speedup.png")
MOST_BYTES = 1 << 26  # of --links-of
SHOWN_SHARE = 0.5  # of the timeline: that of the nearest point


def main(argv: Sequence[str]) -> int:
    """Run the sweep over each wire in turn; the exit status. ConfigError for bad input."""
    options = parse(argv, ranks=torchrun_world_size())
    check_routings(options)
    read_links(options)
    if torchrun_world_size() is not None:
        if options.wires != ("tcp" if options.device else "emulated",):
            raise ConfigError("--wires", ",".join(options.wires), "emulated under torchrun")
        return run(run_rank, argv, options.ranks, timeout_s=options.timeout_s, program=PROGRAM)
    if options.device:
        raise ConfigError("--device", options.device, "nothing: it is for the processes that this command starts")
    check_kept(options)
    out = fresh_folder("--out", options.out, OF_ALL)
    done: list[str] = []
    rows: list[dict[str, Any]] = []
    for wire in options.wires:
        status = _run_wire(options, wire, same_links="emulated" in done)
        if status:
            return status
        if (out / wire / ROWS).is_file():
            done.append(wire)
            rows += read_jsonl(out / wire / ROWS)
        write_jsonl(out / ROWS, rows)
    if rows:
        write_speedup(out / "speedup.png", rows)
        print("\n".join([*summary(rows), *agreement(rows), f"wrote {out / ROWS}, {out / 'speedup.png'}"]))
    return 0


def _run_wire(options: OverlapOptions, wire: str, *, same_links: bool) -> int:
    """One wire, in new processes. `same_links`: those of the emulated run."""
    part = options.over(wire)
    fresh_folder("--out", part.out, OF_A_WIRE)
    if wire == "emulated":
        return run(run_rank, part.words(), part.ranks, timeout_s=part.timeout_s, program=PROGRAM)
    reason = unavailable()
    if reason is not None:
        print(f"{wire}: skipped: {reason}")
        return 0
    if same_links and not part.links_of:
        part = replace(part, links_of=str(Path(options.out) / "emulated" / ROWS))
    words = ["bench", "overlap", *replace(part, device=DEVICE).words()]
    return torchrun(words, ranks_per_node=part.ranks_per_node, threads=part.threads)


def run_rank(world: World, argv: Sequence[str]) -> int:
    """What every rank does over one wire."""
    options = parse(argv, ranks=world.size)
    return on_rank(world, PROGRAM, options.threads, lambda: _sweep(options, world))


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is asked of one measurement: a share, or the link that gave it elsewhere ("": to be solved for)."""

    share: float
    link: str = ""


Links = dict[tuple[str, str], list[Point]]


def check_routings(options: OverlapOptions) -> None:
    """ConfigError for a file that is missing or made for something else."""
    for routing in options.routings:
        path = routing_file(routing, options.out)
        try:
            if path is not None:
                read_file(path, experts=options.experts, top_k=options.top_k)
        except ConfigError as error:
            raise ConfigError("--routings", error.value, error.expected) from None


def check_kept(options: OverlapOptions) -> None:
    """ConfigError where the links are those of a file that this run replaces."""
    replaced = [Path(options.out) / ROWS, *(Path(options.out) / wire / ROWS for wire in options.wires)]
    if options.links_of and os.path.realpath(options.links_of) in map(os.path.realpath, replaced):
        raise ConfigError("--links-of", options.links_of, f"a file that --out {options.out} does not replace")


def read_links(options: OverlapOptions) -> Links | None:
    """By routing and phase, the links of --links-of; None without. ConfigError for a file that is none of ours."""
    if not options.links_of:
        return None
    expected = "a results.jsonl of bench overlap"
    found: Links = {}
    try:
        lines = read_regular(Path(options.links_of), most_bytes=MOST_BYTES).decode().splitlines()
        for row in map(json.loads, lines):
            if isinstance(row["asked_share"], bool):
                raise ValueError("asked_share")
            point = Point(share=float(row["asked_share"]), link=row["link"].partition(" ")[2])
            options.layer("balanced", point.share, options.out)
            LinkSpec.parse(point.link)
            points = found.setdefault((str(row["routing"]), str(row["phase"])), [])
            points += [point] if point not in points else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise ConfigError("--links-of", options.links_of, f"{expected} ({type(error).__name__})") from None
    for routing in options.routings:
        for phase in options.phases:
            if (Path(routing).name, phase) not in found:
                raise ConfigError("--links-of", options.links_of, f"{expected} with {phase} under routing {routing}")
    return found


def _points(options: OverlapOptions, links: Links | None) -> Iterator[tuple[str, str, Point]]:
    for routing in options.routings:
        for phase in options.phases:
            asked = [Point(share=share) for share in options.share_numbers]
            for point in asked if links is None else links[Path(routing).name, phase]:
                yield routing, phase, point


def _sweep(options: OverlapOptions, world: World) -> int:
    say, links = say_of(world, PROGRAM), read_links(options)
    (wire,) = options.wires
    rows: list[dict[str, Any]] = []
    waits: list[dict[str, Any]] = []
    shown: dict[str, tuple[float, list[Panel]]] = {}
    setting: Setting | None = None
    for routing, phase, point in _points(options, links):
        one = options.layer(routing, point.share, options.out)
        if point.link:
            one = replace(one, comm_share=None, link=point.link)
        if setting is None or setting.options.routing != routing:
            setting = Setting.build(one, world, load_routing(one, world.rank), say)
        setting.options = one
        say(f"{wire}, {Path(routing).name}: {phase} at a share of {point.share:.0%}")
        result = measure_phase(setting, phase)
        where = {"wire": wire, "asked_share": point.share}
        rows += [{**row, **where} for row in result.rows]
        waits += wait_rows(result, {**where, "routing": Path(routing).name, "phase": phase})
        if world.rank == 0:  # what was measured is there, however the sweep ends
            write_jsonl(Path(options.out) / ROWS, rows)
            write_jsonl(Path(options.out) / WAITS, waits)
        far = abs(point.share - SHOWN_SHARE)
        if routing == options.routings[0] and far < shown.get(phase, (2.0, []))[0]:
            shown[phase] = far, result.panels
    if world.rank == 0:
        _publish(Path(options.out), rows, [panel for _, panels in shown.values() for panel in panels])
    return 0


def _publish(out: Path, rows: list[dict[str, Any]], panels: list[Panel]) -> None:
    write_trace(out / "trace.json", panels)
    first = rows[0]
    title = (
        f"One block pair, {first['ranks']} ranks, {first['tokens']} tokens each, D {first['hidden']}, "
        f"F {first['ffn']}, routing {first['routing']}, measured over: {first['wire']}"
    )
    write_png(out / "timeline.png", panels, title=title)
    write_speedup(out / "speedup.png", rows)
