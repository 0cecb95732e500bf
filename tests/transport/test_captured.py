"""Staged exchanges and experts in host memory in a CUDA graph, played: what a graph does again, and what CUDA would
refuse (tests/transport/captured.py). On a card: tests/gpu/test_gpu_static.py."""

from __future__ import annotations

import random
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_overlap import MoELayer
from moe_overlap.errors import ConfigError
from moe_overlap.transport import LocalTransport, StagedTransport, host_link, staged
from moe_overlap.transport.host_link import CudaHostLink, EmulatedHostLink
from tests.layers import make, results, tokens
from tests.tolerances import close, same_bits
from tests.transport.captured import CapturedEngine, CudaRefuses, Graph
from tests.transport.worlds import F32, agreed, rows_of

STATIC = {"mode": "static", "static_capacity": "no_drop"}


def wire(monkeypatch: pytest.MonkeyPatch, seed: int = 0, **options: Any) -> StagedTransport:
    monkeypatch.setattr(staged, "Engine", partial(CapturedEngine, seed=seed))
    return StagedTransport(**options)


def link(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> CudaHostLink:
    monkeypatch.setattr(host_link, "Engine", partial(CapturedEngine, seed=seed))
    return CudaHostLink()


class Exchanges:
    """Some rows, and where they come back to, of every chunk of a plan."""

    def __init__(self, transport: StagedTransport, seed: int, *, chunks: int = 3) -> None:
        self.transport, self.drawn = transport, random.Random(seed)
        self.plan = agreed(transport, slots=3, seed=seed).chunked(chunks)
        self.rows = [rows_of(0, self.plan, chunk, F32) for chunk in range(chunks)]
        self.outs = [torch.zeros_like(one) for one in self.rows]

    def run(self) -> None:
        """All under way at once, and waited for in any order."""
        works = [self.transport.start(rows, self.plan, F32, chunk, out=out)
                 for chunk, (rows, out) in enumerate(zip(self.rows, self.outs, strict=True))]  # fmt: skip
        self.drawn.shuffle(works)
        for work in works:
            work.wait()

    def right(self) -> bool:
        return all(torch.equal(out, rows) for out, rows in zip(self.outs, self.rows, strict=True))

    def anew(self) -> None:
        """Other rows, where the old ones were."""
        for rows, out in zip(self.rows, self.outs, strict=True):
            rows.add_(1.0)
            out.zero_()


def captured(exchanges: Exchanges) -> Graph:
    engine: Any = exchanges.transport.wire.engine
    engine.begin()
    exchanges.run()
    return engine.end()


def replays_right(exchanges: Exchanges, graph: Graph, seeds: int = 6) -> bool:
    found = []
    for seed in range(seeds):
        exchanges.anew()
        graph.replay(seed)
        found.append(exchanges.right())
    return all(found)


@pytest.mark.parametrize("share", [1.0, 2.5])
@pytest.mark.parametrize("piece_bytes", [7, 64])
def test_a_graph_sends_what_is_there_at_each_replay(
    share: float, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between steps of the same wire, which are right as well; a second capture too."""
    for seed in range(4):
        exchanges = Exchanges(wire(monkeypatch, seed, share=share, piece_bytes=piece_bytes), seed)
        for _ in range(2):
            exchanges.run()
            assert exchanges.right()
            assert replays_right(exchanges, captured(exchanges))
        exchanges.anew()
        exchanges.run()
        assert exchanges.right()


def test_places_that_are_written_too_early_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = staged.Wire._begin_anew

    def without_emptied(one: staged.Wire) -> None:
        plain(one)
        for event in one._emptied:
            event.record = lambda stream: None

    monkeypatch.setattr(staged.Wire, "_begin_anew", without_emptied)
    found = []
    for seed in range(4):
        exchanges = Exchanges(wire(monkeypatch, seed, piece_bytes=7), seed)
        found.append(replays_right(exchanges, captured(exchanges)))
    assert not all(found)


def test_where_nothing_travels_both_streams_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges = Exchanges(wire(monkeypatch, share=0.0), 4)
    captured(exchanges)
    assert exchanges.right()


def test_the_pinned_places_of_a_graph_outlive_its_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "in_graphs", [])
    exchanges = Exchanges(wire(monkeypatch, piece_bytes=7), 4)
    exchanges.run()
    assert staged.in_graphs == []
    captured(exchanges)
    captured(exchanges)
    assert [one.numel() for one in staged.in_graphs] == [7] * staged.PLACES


def test_a_work_lets_go_of_its_rows_when_it_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph nothing else keeps them from whoever allocates next on the captured stream."""
    exchanges = Exchanges(wire(monkeypatch), 4)
    engine: Any = exchanges.transport.wire.engine
    engine.begin()
    work: Any = exchanges.transport.start(exchanges.rows[0], exchanges.plan, F32, 0)
    assert work._source.data_ptr() == exchanges.rows[0].data_ptr()
    assert work.wait() is work.wait() and work._source is None
    engine.end()


def test_what_a_graph_cannot_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges = Exchanges(wire(monkeypatch), 4)
    engine: Any = exchanges.transport.wire.engine
    engine.begin()
    work = exchanges.transport.start(exchanges.rows[0], exchanges.plan, F32, 0)
    with pytest.raises(ConfigError, match="a graph cannot be asked"):
        work.done()
    with pytest.raises(CudaRefuses, match="not joined"):
        engine.end()
    exchanges.transport.journal = []
    engine.begin()
    with pytest.raises(ConfigError, match="events have no times"):
        exchanges.transport.start(exchanges.rows[0], exchanges.plan, F32, 0)


def test_events_that_reach_into_a_graph_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges = Exchanges(wire(monkeypatch, piece_bytes=7), 4)
    exchanges.run()
    monkeypatch.setattr(staged.Wire, "_begin_anew", lambda wire: None)
    with pytest.raises(CudaRefuses, match="of another graph, or of none"):
        captured(exchanges)


def test_wires_that_share_streams_are_captured_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has 32 streams, which it gives out in turns."""
    engine = CapturedEngine(seed=1)
    streams = cycle([engine.stream(), engine.stream()])
    monkeypatch.setattr(engine, "stream", lambda: next(streams))
    monkeypatch.setattr(staged, "Engine", lambda device: engine)
    wires = [Exchanges(StagedTransport(piece_bytes=7), 4) for _ in range(2)]
    for _ in range(3):
        engine.begin()
        for one in wires:
            one.run()
        graph = engine.end()
        for seed in range(4):
            for one in wires:
                one.anew()
            graph.replay(seed)
            assert all(one.right() for one in wires)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("schedule", ["serial", "chunked(4)", "chunked(2,experts)"])
def test_a_static_step_over_the_wire_is_captured_whole(
    schedule: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, in one graph or one each; the bits are those of a step that is not captured.

    Local exchanges have these bits but in one chunk, where a local layer pads nothing: matmuls of other shapes.
    """
    transport = wire(monkeypatch, 5, share=7 / 8, piece_bytes=300)
    engine: Any = transport.wire.engine
    options = {"schedule": schedule, "overlap": overlap} | STATIC
    layer, plain = make(transport, **options), make(LocalTransport(), **options)
    want = results(layer, tokens(33))  # the first step agrees
    for have, should in zip(want, results(plain, tokens(33)), strict=True):
        (close if schedule == "serial" else same_bits)(have, should)
    layer.zero_grad()
    engine.begin()
    for have, should in zip(results(layer, tokens(33)), want, strict=True):
        same_bits(have, should)
    engine.end()
    engine.begin()
    y = layer(tokens(33).requires_grad_())
    assert engine.end().actions
    engine.begin()
    y.square().sum().backward()
    assert engine.end().actions
    layer.zero_grad()
    for have, should in zip(results(layer, tokens(33)), want, strict=True):
        same_bits(have, should)


def test_a_graph_before_the_first_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are pinned by a step before."""
    away = link(monkeypatch)
    layer = make(expert_offload=away, **STATIC)
    away._engine.begin()
    with pytest.raises(ConfigError, match="a step before the capture"):
        layer(tokens(9))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("schedule", ["serial", "chunked(4,experts)"])
def test_experts_come_up_in_a_graph_as_they_are_at_each_replay(
    schedule: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = link(monkeypatch, 3)
    options = {"schedule": schedule, "overlap": overlap} | STATIC
    layer = make(expert_offload=away, **options)
    with torch.no_grad():
        want = make(expert_offload=EmulatedHostLink(), **options)(tokens(13))
        layer(tokens(13))
        away._engine.begin()
        same_bits(layer(tokens(13)), want)
        graph = away._engine.end()
        memory = {slot.memory.data_ptr() for slot in away._slots}
        assert {one.data_ptr() for one in staged.in_graphs} >= memory
        for weight in layer.expert_weights:
            weight.fill_(2.0)
        graph.replay(0)
        last = torch.cat([slot.memory.view(torch.float64) for slot in away._slots])
        assert (last == 2.0).all()
        layer(tokens(13))


def test_replays_are_waited_for_where_the_rows_are_not_where_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    away = link(monkeypatch)
    layer = make(expert_offload=away, **STATIC)
    layer(tokens(13))
    layer.check_static()
    waited: list[torch.device] = []

    def current_stream(device: torch.device) -> Any:
        return SimpleNamespace(synchronize=lambda: waited.append(device))

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    away.device = torch.device("cuda", 3)
    layer.check_static()
    assert waited == [away.device]


def test_frozen_experts_are_captured_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    away = link(monkeypatch, 3)

    def frozen(offload: Any) -> MoELayer:
        layer = make(expert_offload=offload, schedule="chunked(4,experts)", **STATIC)
        for weight in layer.expert_weights:
            weight.requires_grad_(False)
        return layer

    def step(layer: MoELayer) -> list[torch.Tensor]:
        x = tokens(13).requires_grad_()
        layer(x).square().sum().backward()
        assert x.grad is not None
        return [x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]

    layer, plain = frozen(away), frozen(EmulatedHostLink())
    step(layer)
    layer.zero_grad()
    away._engine.begin()
    for have, should in zip(step(layer), step(plain), strict=True):
        same_bits(have, should)
    away._engine.end()


def test_gradients_of_experts_in_a_graph_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    away = link(monkeypatch)
    layer = make(expert_offload=away, **STATIC)
    results(layer, tokens(13))
    away._engine.begin()
    with pytest.raises(ConfigError, match="gradients of experts in a CUDA graph"):
        results(layer, tokens(13))
