"""The rows of `moe-overlap bench layer --device cuda --link staged`: every way checked, timed, beside its bound.

A row for each way: `serial` (T_serial, every exchange waited for where it starts), `chunked(r)`, and `shortcut` (the
layer beside OPS dense backbone ops, which are in its T_serial too); in each its time beside T_serial and T_nocomm
(exchanges replaced by copies on the card) of the same interleaved timing. overlap_eff is the share of the exchanges
that is hidden, `allowed` what the closed forms of `measure/overlap.py` allow with terms measured in serial steps,
`share` of the two, with the target TARGET. Results are compared with the same way on LocalTransport first, bit for bit;
what differs has no time.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_overlap.commands.bench import cuda_timing, staged_ways
from moe_overlap.commands.bench.staged_ways import Contender, Parts, Shape, check
from moe_overlap.measure.overlap import chunked_backward, chunked_forward, overlap_eff, shortcut_bound
from moe_overlap.measure.picture import Panel, write_png
from moe_overlap.schedule.clocks import StreamClock
from moe_overlap.schedule.recorder import TimelineEvent, record
from moe_overlap.transport import StagedTransport

TARGET, MOST_SHARE = 0.9, 1.1
RECORDED = 3
BACKWARD = ("Ct", "Dt")


def terms(serial: Contender) -> dict[str, float]:
    """Seconds of each kind of action of a joined step, by verb: exchanges, experts, backbone ops; medians of steps."""
    steps: list[dict[str, float]] = []
    for _ in range(RECORDED):
        with record() as events:
            serial.once()
        step: dict[str, float] = {}
        for event in events:
            if event.lane != "wire":
                verb = event.action.rstrip("0123456789")
                step[verb] = step.get(verb, 0.0) + event.end_s - event.start_s
        steps.append(step)
    return {verb: statistics.median(step.get(verb, 0.0) for step in steps) for verb in steps[0]}


def bounds(way: str, found: dict[str, float]) -> tuple[float, float]:
    """(forward, backward): how much shorter than serial no schedule of this way can be, in seconds."""
    dispatch, experts, combine = (found[verb] for verb in ("D", "E", "C"))
    back, dgrad, wgrad, forth = (found[verb] for verb in ("Ct", "Ed", "Ew", "Dt"))
    forward, backward = dispatch + experts + combine, back + dgrad + wgrad + forth
    if way == "shortcut":
        ops, ops_back = found["B"], found["Bt"]
        least = shortcut_bound(experts, ops, dispatch, combine)
        least_back = max(ops_back + dgrad + wgrad, back + dgrad + forth)
        return forward + ops - least, backward + ops_back - least_back
    r = int(way.removeprefix("chunked(").rstrip(")"))
    least = chunked_forward(r, (dispatch + combine) / 2 / r, experts / r)
    least_back = chunked_backward(r, (back + forth) / 2 / r, dgrad / r, wgrad / r)
    return forward - least, backward - least_back


def measure(parts: Parts, way: str) -> dict[str, Any]:
    """The row of one way, its results checked."""
    base = "shortcut" if way == "shortcut" else "serial"
    serial, nocomm = (Contender(parts, base, link, overlap=False) for link in ("staged", "nocomm"))
    check(serial, nocomm)
    contenders = {"serial": serial, "nocomm": nocomm}
    if way != "serial":
        contenders["overlapped"] = Contender(parts, way, "staged")
        check(contenders["overlapped"], Contender(parts, way, "local"))
        contenders["chunks_nocomm"] = Contender(parts, way, "nocomm")
    times = cuda_timing.two_phases({name: (one.forward, one.backward) for name, one in contenders.items()})
    total = {name: forward.median_s + backward.median_s for name, (forward, backward) in times.items()}
    mine = "serial" if way == "serial" else "overlapped"
    row: dict[str, Any] = {
        "ms": _ms(total[mine]),
        "forward_ms": _ms(times[mine][0].median_s),
        "backward_ms": _ms(times[mine][1].median_s),
        "serial_ms": _ms(total["serial"]),
        "nocomm_ms": _ms(total["nocomm"]),
        "host_ms": _ms(cuda_timing.host_s(contenders[mine].once)),
    }
    if way == "serial":
        return row | {"terms_ms": {verb: _ms(seconds) for verb, seconds in terms(serial).items()}}
    gains = bounds(way, terms(serial))
    achieved = overlap_eff(total[mine], total["serial"], total["nocomm"])
    allowed = overlap_eff(total["serial"] - sum(gains), total["serial"], total["nocomm"])
    row |= {"chunks_nocomm_ms": _ms(total["chunks_nocomm"]), "bound_ms": _ms(total["serial"] - sum(gains))}
    if achieved is None or not allowed or allowed <= 0:
        return row | {"overlap_eff": None, "note": "serial is not slower than nocomm: nothing to hide"}
    share = achieved / allowed
    row |= {"overlap_eff": round(achieved, 3), "allowed": round(allowed, 3), "share": round(share, 3), "target": TARGET}
    if share > MOST_SHARE:  # no proof of anything
        return row | {"note": "better than its bound: the terms are not those of the steps that were timed"}
    return row | {"met": share >= TARGET}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def link(parts: Parts) -> dict[str, Any]:
    """What the wire takes: one exchange of all rows of the shape, alone."""
    transport = parts.transport("staged")
    assert isinstance(transport, StagedTransport)
    count = parts.shape.tokens * parts.shape.top_k * parts.shape.hidden * parts.x.element_size()
    source = torch.empty(count, dtype=torch.uint8, device=staged_ways.DEVICE)
    into, wire = torch.empty_like(source), transport.wire

    def once() -> None:
        wire.engine.current().wait_event(wire.send(into, source, parts.share, timing=False)[1])

    seconds = cuda_timing.once(once).median_s
    return {
        "ms": _ms(seconds),
        "bytes": round(count * parts.share),
        "bytes_per_s": round(count * parts.share / seconds),
    }


def panel(parts: Parts, way: str) -> Panel:
    """One recorded step, its exchanges as the wire had them."""
    one = Contender(parts, way, "staged", overlap=way != "serial")
    transport = parts.transport("staged")
    assert isinstance(transport, StagedTransport)
    one.once()
    clock = StreamClock(torch.device(staged_ways.DEVICE))
    transport.journal = []
    try:
        with record() as events:
            one.once()
        wire = [
            TimelineEvent(0, 0, "backward" if action.startswith(BACKWARD) else "forward", action, "wire",
                          clock.seconds(begin), clock.seconds(end))
            for action, begin, end in transport.journal
        ]  # fmt: skip
    finally:
        transport.journal = None
    return Panel(title=way, events=[*(e for e in events if e.lane != "wire"), *wire], column=parts.shape.name)


@dataclass
class Rows:
    """Writes a row for everything that is tried of one shape: of what was found, or of why not. The others go on.
    end_s: on time.monotonic, after which nothing new is begun."""

    write: Callable[..., None]
    about: dict[str, Any]
    end_s: float

    def tried(self, name: str, call: Callable[[], dict[str, Any]]) -> None:
        try:
            if time.monotonic() > self.end_s:
                raise TimeoutError("the time is over")
            row = call()
        except Exception as error:
            row = {"result": f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.write(kind="staged", implementation=name, **self.about, **row)


def measure_shape(rows: Rows, shape: Shape, ranks: int, ways: Sequence[str], drawn: Sequence[str]) -> list[Panel]:
    """All rows of one shape; the panels of the ways that are drawn."""
    made: list[Parts] = []
    panels: list[Panel] = []

    def first() -> dict[str, Any]:
        made.append(Parts(shape, ranks))
        return link(made[0])

    def draw(way: str) -> dict[str, Any]:
        panels.append(panel(made[0], way))
        return {"events": len(panels[-1].events)}

    rows.tried("link", first)
    for way in ways if made else ():
        rows.tried(way, partial(measure, made[0], way))
    for way in drawn if made else ():
        rows.tried(f"timeline of {way}", partial(draw, way))
    return panels


def measure_shapes(
    write: Callable[..., None],
    *,
    cases: Sequence[str],
    ways: Sequence[str],
    ranks: int,
    picture: Path | None = None,
    end_s: float = math.inf,
) -> None:
    """Every way of every shape named, with the bytes of one of `ranks` ranks. write: takes a row as keywords. picture:
    where the steps of some ways are drawn."""
    drawn = [way for way in staged_ways.DRAWN if way in ways and picture is not None]
    panels: list[Panel] = []
    for shape in staged_ways.SHAPES:
        if shape.short in cases:
            rows = Rows(write, {"case": shape.name, "ranks": ranks}, end_s)
            panels += measure_shape(rows, shape, ranks, ways, drawn)
    if panels and picture is not None:
        try:
            write_png(picture, panels, title=f"One card, exchanges over PCIe, bytes of {ranks} ranks")
        except Exception as error:  # the rows are there
            print(f"no timeline: {type(error).__name__}: {error}", file=sys.stderr)
