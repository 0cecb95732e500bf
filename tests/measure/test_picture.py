"""The PNG and the Chrome trace of made-up timelines."""

from __future__ import annotations

import json

from moe_overlap.measure.picture import Panel, _queued, chrome_trace, kind_of, label_of, write_png, write_trace
from moe_overlap.measure.timeline import TimelineEvent

NAMES = {"B0": "mlp", "B1": "attn2", "B2": "shared"}


def panel(title: str, column: str) -> Panel:
    events = [
        TimelineEvent(rank, 1, "forward", action, lane, 5.0 + start, 5.0 + end)
        for rank in (0, 1)
        for action, lane, start, end in (
            ("attn1", "comp", 0.0, 0.004),
            ("P", "comp", 0.004, 0.005),
            ("N", "wire", 0.004, 0.0045),
            ("D0", "wire", 0.005, 0.015),
            ("B0", "comp", 0.005, 0.012),
            ("D0", "wait", 0.012, 0.015),
            ("E0", "comp", 0.015, 0.020),
        )
    ]
    return Panel(title=title, events=events, names=NAMES, column=column)


def test_labels_and_kinds():
    assert [label_of(a, NAMES) for a in ("D0", "B1", "Bt0", "Ed1", "Ew0", "Ut", "N", "attn1")] == [
        "D0", "attn2", "mlp'", "E1'", "W0", "U'", "N", "attn1"
    ]  # fmt: skip
    assert (label_of("mlp", NAMES, "backward"), label_of("mlp", NAMES, "forward")) == ("mlp'", "mlp")
    assert [kind_of(a, NAMES) for a in ("D0", "Ct1", "B1", "Bt0", "B2", "Ed1", "Ew0", "Ut", "B9")] == [
        "dispatch", "combine", "attention", "mlp", "shared", "experts", "wgrad", "rows", "op"
    ]  # fmt: skip


def test_the_trace_says_when_each_action_ran(tmp_path):
    write_trace(tmp_path / "trace.json", [panel("top2 serial", "infer")])
    trace = json.loads((tmp_path / "trace.json").read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == 14
    dispatch = next(event for event in spans if event["name"] == "D0")
    assert (dispatch["ts"], dispatch["dur"]) == (5000.0, 10000.0), "microseconds from the first event"
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert names == {"infer top2 serial rank 0", "infer top2 serial rank 1"}
    assert len({(event["pid"], event["tid"]) for event in spans}) == 6, "lanes of two ranks: compute, wire, wait"


def test_the_picture_is_a_png_with_any_number_of_panels(tmp_path):
    for i, panels in enumerate(([panel("a", "")], [panel("a", "infer"), panel("b", "infer"), panel("c", "train")])):
        path = tmp_path / "deep" / f"{i}.png"
        write_png(path, panels, title="measured")
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert chrome_trace([]) == {"traceEvents": [], "displayTimeUnit": "ms"}


def test_exchanges_that_wait_in_line_are_drawn_one_after_the_other():
    events = [TimelineEvent(0, 1, "forward", f"D{i}", "wire", 0.0, 1.0 + i) for i in range(3)]
    assert [(event.start_s, event.end_s) for event in _queued(events)] == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
