"""Steps on a CUDA device are timed by events on its stream. Here the host plays the stream: an event keeps the time."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.measure.timeline import record
from moe_overlap.schedule import clocks
from tests.auto.planted import OPS, SHAPES, build, layer_of, step
from tests.layers import make, tokens
from tests.ranks import virtual_world

OFFSET_S = 1e4
"""Of the stream's clock against the host's."""


class Event:
    """As torch.cuda.Event: its time can be asked for only once the stream has passed it."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.passed, self.at_s = False, 0.0

    def record(self, stream: object) -> None:
        assert stream == "the stream"
        self.at_s = time.perf_counter() + OFFSET_S

    def synchronize(self) -> None:
        assert self.at_s, "recorded"
        self.passed = True

    def elapsed_time(self, later: Event) -> float:
        assert self.passed and later.passed
        return 1e3 * (later.at_s - self.at_s)


@contextmanager
def on_a_stream():
    """Every step believes that its rows are on a CUDA device."""

    def clock_for(device):
        return find(torch.device("cuda"))

    find = clocks.clock_for
    with (
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch.cuda, "current_stream", lambda device: "the stream"),
        mock.patch("moe_overlap.schedule.backward.clock_for", clock_for),
        mock.patch("moe_overlap.auto.probes.clock_for", clock_for),
    ):
        yield


def told(events):
    return [(event.step, event.phase, event.action, event.lane) for event in events]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stream_tells_the_same_story_as_the_host(shape, overlap):
    def rank(me):
        model = build(shape, me.transport(), "chunked(2)" if shape == "layer" else "serial", overlap=overlap)
        begin_s = time.perf_counter()
        with record() as events:
            step(model, me.rank)
            seen = len(events)
        assert begin_s <= min(event.start_s for event in events), "the stream's times, on the host's scale"
        assert max(event.end_s for event in events) <= time.perf_counter()
        assert all(event.start_s <= event.end_s for event in events)
        return told(events), told(layer_of(model).last_events), seen

    found = {}
    for name, context in (("stream", on_a_stream()), ("host", nullcontext())):
        with context:
            found[name] = virtual_world(2, seed=3).run(rank)
    for (recorded, kept, seen), (want, want_kept, want_seen) in zip(found["stream"], found["host"], strict=True):
        assert recorded == want and kept == want_kept
        assert {lane for *_, lane in recorded} == {"comp", "wire", "wait"}
        assert seen == 0 and want_seen == len(want), "a stream's times are known at the end of the recording"


def test_a_step_on_a_stream_is_timed_inside_record_only():
    def rank(me):
        model = build("layer", me.transport(), "serial")
        step(model, me.rank)
        with record() as events:
            pass
        return layer_of(model).last_events, events, layer_of(model).explain()

    with on_a_stream():
        for kept, events, text in virtual_world(2).run(rank):
            assert kept == events == []
            assert "inside moe_overlap.measure.timeline.record()" in text


def test_a_backward_in_another_thread_is_recorded_where_its_forward_was():
    """On CUDA the engine runs backward in a thread of its own."""
    model = make(schedule="chunked(2)")
    with on_a_stream(), record() as events:
        loss = model(tokens(7).requires_grad_()).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join(30)
    assert not thread.is_alive()
    assert {event.phase for event in events} == {"forward", "backward"}


def test_a_recording_that_is_over_takes_no_more():
    model = make(schedule="chunked(2)")
    with on_a_stream():
        with record() as events:
            loss = model(tokens(7).requires_grad_()).sum()
        forward = list(events)
        loss.backward()
    assert events == forward and forward
    assert {event.phase for event in model.last_events} == {"forward", "backward"}


def test_auto_calibrates_by_the_stream():
    def rank(me):
        model = build("block", me.transport())
        step(model, me.rank)
        found = model.schedule.found
        (planned,) = found.values()
        return planned.model

    with on_a_stream():
        first, second = virtual_world(2).run(rank)
    assert first == second
    assert len(first.backbone_s) == OPS and all(0 < seconds < 1 for seconds in first.backbone_s)
    assert first.experts(8) > 0 and first.experts_dgrad(8) > 0 and first.permute.beta_s > 0


def test_a_step_in_a_graph_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert clocks.clock_for(torch.device("cuda")) is None
    with record(), pytest.raises(ConfigError, match="events in a graph have no times"):
        clocks.clock_for(torch.device("cuda"))
