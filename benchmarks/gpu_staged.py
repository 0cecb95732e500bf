"""Overlap on one card over a real wire: every exchange goes to the host's memory and back (transport/staged.py).

    python benchmarks/gpu_staged.py [--out FILE] [--cases qwen3,mixtral] [--ways serial,chunked(4)] [--ranks 8]
                                    [--timeline FILE.png]

A whole layer in bfloat16, forward and backward, with the bytes that one of --ranks ranks with equal loads sends:
(ranks - 1) / ranks of its rows. A row for each way: `serial` (T_serial, every exchange waited for where it starts),
`chunked(r)`, and `shortcut` (the layer beside OPS dense backbone ops, which are in its T_serial too); in each its time
beside T_serial and T_nocomm (exchanges replaced by copies on the card) of the same interleaved timing. overlap_eff is
the share of the exchanges that is hidden, `allowed` what the closed forms of moe_overlap/measure/overlap.py allow with
terms measured in serial steps, `share` of the two, with the target TARGET. Results are compared with the same way on
LocalTransport first, bit for bit; what differs has no time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from benchmarks import gpu_process, gpu_timing  # noqa: E402
from moe_overlap import Experts, MoELayer, ShortcutBlock  # noqa: E402
from moe_overlap.measure.overlap import chunked_backward, chunked_forward, overlap_eff, shortcut_bound  # noqa: E402
from moe_overlap.measure.picture import Panel, write_png  # noqa: E402
from moe_overlap.routing import LinearRouter  # noqa: E402
from moe_overlap.schedule.clocks import StreamClock  # noqa: E402
from moe_overlap.schedule.recorder import TimelineEvent, record  # noqa: E402
from moe_overlap.transport import LocalTransport, NoCommTransport, StagedTransport, Transport  # noqa: E402

DEVICE, DTYPE = "cuda", torch.bfloat16
OPS = 4
TARGET, MOST_SHARE = 0.9, 1.1
WAYS = ("serial", "chunked(2)", "chunked(4)", "chunked(8)", "shortcut")
DRAWN = ("serial", "chunked(4)", "shortcut")
RECORDED = 3
BACKWARD = ("Ct", "Dt")


@dataclass(frozen=True)
class Shape:
    """A layer of a public model, and how many tokens the rank has."""

    short: str
    name: str
    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int


SHAPES = (
    Shape("qwen3", "Qwen3-30B-A3B T=8192", tokens=8192, hidden=2048, ffn=768, experts=128, top_k=8),
    Shape("mixtral", "Mixtral-8x7B T=8192", tokens=8192, hidden=4096, ffn=14336, experts=8, top_k=2),
)


class Dense(nn.Module):
    """A backbone op: h + down(silu(gate h) * up h), three times as wide as h."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 6 * hidden, bias=False, device=DEVICE, dtype=DTYPE)
        self.down = nn.Linear(3 * hidden, hidden, bias=False, device=DEVICE, dtype=DTYPE)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return h + self.down(functional.silu(gate) * up)


class Parts:
    """What all ways of one shape share: weights, input, gradient of the output; and the wires."""

    def __init__(self, shape: Shape, ranks: int) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.router = LinearRouter(
            shape.hidden, shape.experts, shape.top_k, renormalize=True, device=DEVICE, dtype=DTYPE
        )
        self.experts = Experts(shape.hidden, shape.ffn, shape.experts, device=DEVICE, dtype=DTYPE)
        self.ops = [Dense(shape.hidden) for _ in range(OPS)]
        self.x, self.dout = (torch.randn(shape.tokens, shape.hidden, device=DEVICE, dtype=DTYPE) for _ in range(2))
        self.share = (ranks - 1) / ranks
        self.transports: dict[str, Transport] = {}

    def transport(self, link: str) -> Transport:
        """One for all layers of a link: they are alike to it."""
        if link not in self.transports:
            made: dict[str, Callable[[], Transport]] = {
                "staged": lambda: StagedTransport(DEVICE, share=self.share),
                "local": LocalTransport,
                "nocomm": lambda: NoCommTransport(LocalTransport()),
            }
            self.transports[link] = made[link]()
        return self.transports[link]

    def build(self, way: str, link: str, *, overlap: bool = True) -> nn.Module:
        shape = self.shape
        layer = MoELayer(
            shape.hidden, shape.ffn, shape.experts, shape.top_k, router=self.router, experts=self.experts,
            transport=self.transport(link), schedule="serial" if way == "shortcut" else way, overlap=overlap,
        )  # fmt: skip
        return ShortcutBlock(self.ops, layer, tap=0, slot=OPS // 2, overlap=overlap) if way == "shortcut" else layer


class Contender:
    """A model over one link, its forward and its backward."""

    def __init__(self, parts: Parts, way: str, link: str, *, overlap: bool = True) -> None:
        self._x, self._dout = parts.x, parts.dout
        self.transport = parts.transport(link)
        self.module = parts.build(way, link, overlap=overlap)
        self._names, self._parameters = zip(*self.module.named_parameters(), strict=True)

    def forward(self) -> tuple[torch.Tensor, Any]:
        x = self._x.detach().requires_grad_()
        out = self.module(x)
        return out, (x, out)

    def backward(self, saved: Any) -> tuple[torch.Tensor, ...]:
        """The gradients of x and of all parameters."""
        x, out = saved
        return torch.autograd.grad(out, [x, *self._parameters], self._dout)

    def once(self) -> dict[str, torch.Tensor]:
        """Every result, by its name."""
        out, saved = self.forward()
        return dict(zip(("y", "dx", *self._names), (out.detach(), *self.backward(saved)), strict=True))


def check(got: Contender, want: Contender) -> None:
    """Raises ValueError unless both give the same bits."""
    have, should = got.once(), want.once()
    wrong = [name for name in should if not torch.equal(_bits(have[name]), _bits(should[name]))]
    if wrong:
        raise ValueError(f"not the bits of local: {', '.join(wrong)}")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


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
    times = gpu_timing.two_phases({name: (one.forward, one.backward) for name, one in contenders.items()})
    total = {name: forward.median_s + backward.median_s for name, (forward, backward) in times.items()}
    mine = "serial" if way == "serial" else "overlapped"
    row: dict[str, Any] = {
        "ms": _ms(total[mine]),
        "forward_ms": _ms(times[mine][0].median_s),
        "backward_ms": _ms(times[mine][1].median_s),
        "serial_ms": _ms(total["serial"]),
        "nocomm_ms": _ms(total["nocomm"]),
        "host_ms": _ms(gpu_timing.host_s(contenders[mine].once)),
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
    source = torch.empty(count, dtype=torch.uint8, device=DEVICE)
    into, wire = torch.empty_like(source), transport.wire

    def once() -> None:
        wire.engine.current().wait_event(wire.send(into, source, parts.share, timing=False)[1])

    seconds = gpu_timing.once(once).median_s
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
    clock = StreamClock(torch.device(DEVICE))
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
    """Writes a row for everything that is tried of one shape: of what was found, or of why not. The others go on."""

    results: gpu_timing.Results
    about: dict[str, Any]
    end_s: float

    def tried(self, name: str, call: Callable[[], dict[str, Any]]) -> None:
        try:
            if time.monotonic() > self.end_s:
                raise TimeoutError("the time is over")
            row = call()
        except Exception as error:
            row = {"result": f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.results.row(kind="staged", implementation=name, **self.about, **row)


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


def main(argv: Sequence[str] | None = None) -> int:
    found = gpu_timing.options(__doc__.splitlines()[0], argv, cases=",".join(shape.short for shape in SHAPES),
                               ways=",".join(WAYS), ranks=8, timeline="")  # fmt: skip
    if reason := gpu_process.no_gpu():
        print(f"gpu_staged: not run: {reason}", file=sys.stderr)
        return 2
    results, ways = gpu_timing.Results(found.out), found.ways.split(",")
    drawn = [way for way in DRAWN if way in ways and found.timeline]
    panels: list[Panel] = []
    for shape in SHAPES:
        if shape.short in found.cases.split(","):
            rows = Rows(results, {"case": shape.name, "ranks": found.ranks}, found.end_s)
            panels += measure_shape(rows, shape, found.ranks, ways, drawn)
    if panels:
        try:
            write_png(
                Path(found.timeline), panels, title=f"One card, exchanges over PCIe, bytes of {found.ranks} ranks"
            )
        except Exception as error:  # the rows are there
            print(f"no timeline: {type(error).__name__}: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
