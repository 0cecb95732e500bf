"""Staged loopback on played streams: the rows that left come back, whatever the streams do first."""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import pytest
import torch

from moe_overlap import MoELayer, ShortcutBlock
from moe_overlap.agreement.plan import RowLayout
from moe_overlap.errors import ConfigError, TransportClosed
from moe_overlap.measure.timeline import record
from moe_overlap.transport import LocalTransport, StagedTransport, staged
from tests.layers import D, make, tokens
from tests.tolerances import same_bits
from tests.transport.played import PlayedEngine
from tests.transport.worlds import F32, agreed, rows_of

LAYOUTS = (F32, RowLayout(width=5, dtype=torch.bfloat16), RowLayout(width=1, dtype=torch.float64))
SHARES = (0.0, 0.3, 7 / 8, 1.0, 2.5)


def played(monkeypatch: pytest.MonkeyPatch, seed: int = 0, **options: Any) -> StagedTransport:
    monkeypatch.setattr(staged, "Engine", partial(PlayedEngine, seed=seed))
    return StagedTransport(**options)


def exchanged(transport: StagedTransport, seed: int, layout: RowLayout) -> tuple[int, bool]:
    """(bytes, whether all came back right) of exchanges that are all under way at once, waited for in any order."""
    plan = agreed(transport, slots=3, seed=seed).chunked((1, 2, 3, 16)[seed % 4])
    drawn = random.Random(seed)
    works, num_bytes = [], 0
    for chunk in range(plan.chunks):
        for reverse in (False, True):
            rows = rows_of(0, plan, chunk, layout)
            out = torch.full_like(rows, 77) if drawn.random() < 0.5 else None
            works.append((rows, out, transport.start(rows, plan, layout, chunk, reverse=reverse, out=out)))
            num_bytes += staged.on_wire(rows.nbytes, transport.share)
    drawn.shuffle(works)
    right = True
    for rows, out, work in works:
        got = work.wait()
        assert work.done() and got is not rows and (out is None or got is out)
        right = right and torch.equal(got, rows)
    return num_bytes, right


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("piece_bytes", [1, 7, 64])
def test_what_left_comes_back(share: float, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(8):
        transport = played(monkeypatch, seed, share=share, piece_bytes=piece_bytes)
        num_bytes, right = exchanged(transport, seed, LAYOUTS[seed % 3])
        assert right
        assert transport.stats.payload_bytes == num_bytes and transport.stats.exchanges > 0


def test_streams_that_do_not_wait_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlayedEngine, "deaf", True)
    found = [exchanged(played(monkeypatch, seed, piece_bytes=7), seed, F32)[1] for seed in range(8)]
    assert not all(found)


def test_pieces_cover_what_is_to_be_sent_as_often_as_asked() -> None:
    for num_bytes, share, piece_bytes in ((0, 3.0, 4), (10, 0.0, 4), (10, 0.75, 4), (10, 1.5, 4), (12, 3.0, 4)):
        found = list(staged.pieces(num_bytes, share, piece_bytes))
        assert all(0 <= first < last <= min(num_bytes, first + piece_bytes) for first, last in found)
        assert sum(last - first for first, last in found) == round(num_bytes * share)
        times = [sum(first <= byte < last for first, last in found) for byte in range(num_bytes)]
        assert not times or times == sorted(times, reverse=True) and max(times) == math.ceil(share)


def test_the_journal_has_the_exchanges_in_order_on_a_wire_that_takes_them_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport = played(monkeypatch, 3, piece_bytes=7)
    transport.journal = []
    plan = agreed(transport, slots=3, seed=4).chunked(3)
    rows = [rows_of(0, plan, chunk, F32) for chunk in range(3)]
    works = [transport.start(rows[chunk], plan, F32, chunk, action=f"D{chunk}") for chunk in range(3)]
    for work in reversed(works):
        work.wait()
    assert [action for action, _, _ in transport.journal] == ["D0", "D1", "D2"]
    times = [(begin.last.at, end.last.at) for _, begin, end in transport.journal]
    assert all(begin < end for begin, end in times)
    assert times == sorted(times) and [end for _, end in times] == sorted(end for _, end in times)


def test_both_streams_wait_for_the_computing_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One behind the other. It is never late here: rows that are not there yet would be sent on a device alone."""
    transport = played(monkeypatch)
    plan = agreed(transport, slots=3, seed=4).chunked(1)
    transport.start(rows_of(0, plan, 0, F32), plan, F32, 0)
    engine = transport.wire.engine
    down, _ = engine.streams
    assert [stream.waited_for[0].of for stream in engine.streams] == [engine.current(), down]


def test_memory_is_kept_for_the_streams_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = played(monkeypatch)
    plan = agreed(transport, slots=3, seed=4).chunked(1)
    rows, out = rows_of(0, plan, 0, F32), torch.zeros(len(rows_of(0, plan, 0, F32)), 3)
    transport.start(rows, plan, F32, 0, out=out)
    assert {one.data_ptr() for one in transport.wire.engine.kept} == {rows.data_ptr(), out.data_ptr()}


@pytest.mark.parametrize(
    "field, options",
    [
        ("share", {"share": -0.1}),
        ("share", {"share": math.nan}),
        ("share", {"share": True}),
        ("share", {"share": "all"}),
        ("piece_bytes", {"piece_bytes": 0}),
        ("piece_bytes", {"piece_bytes": 1.5}),
        ("timeout_s", {"timeout_s": -1}),
    ],
)
def test_numbers_that_cannot_be_are_refused(field: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        played(monkeypatch, **options)
    assert caught.value.field == field


@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_without_a_cuda_device_there_is_no_wire(device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="a CUDA device") as caught:
        StagedTransport(device)
    assert caught.value.field == "device"


def test_rows_of_another_device_are_refused_and_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = played(monkeypatch)
    plan = agreed(transport, slots=3, seed=4).chunked(1)
    with pytest.raises(ConfigError, match="rows.device = 'meta': expected cpu"):
        transport.start(rows_of(0, plan, 0, F32).to("meta"), plan, F32, 0)
    assert transport.stats.exchanges == transport.stats.payload_bytes == 0


def test_what_is_closed_gives_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = played(monkeypatch)
    plan = agreed(transport, slots=3, seed=4).chunked(1)
    work = transport.start(rows_of(0, plan, 0, F32), plan, F32, 0)
    transport.close("enough")
    with pytest.raises(TransportClosed, match="enough"):
        work.wait()


def results(make_model: Any, transport: Any) -> list[torch.Tensor]:
    model = make_model(transport)
    x_TD = tokens(33, dtype=torch.float32).requires_grad_()
    y_TD = model(x_TD)
    y_TD.square().sum().backward()
    return [y_TD.detach(), x_TD.grad, *(parameter.grad for parameter in model.parameters())]


def layer(transport: Any, **options: Any) -> MoELayer:
    return make(transport, dtype=torch.float32, **options)


def shortcut(transport: Any, **options: Any) -> ShortcutBlock:
    moe = layer(transport)
    ops = [torch.nn.Linear(D, D) for _ in range(3)]
    return ShortcutBlock(ops, moe, tap=0, slot=1, **options)


MODELS = {
    "serial": (partial(layer, schedule="serial"), 4),
    "chunked(4)": (partial(layer, schedule="chunked(4)"), 16),
    "chunked(2,experts)": (partial(layer, schedule="chunked(2,experts)"), 8),
    "joined": (partial(layer, schedule="chunked(4)", overlap=False), 16),
    "shortcut": (shortcut, 4),
    "static": (partial(layer, schedule="chunked(2)", mode="static", static_capacity="no_drop"), 8),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [7 / 8, 2.0])
def test_a_layer_is_the_local_one_bit_for_bit_and_its_exchanges_run(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, exchanges = MODELS[name]
    transport = played(monkeypatch, 5, share=share, piece_bytes=300)
    got, want = results(model, transport), results(model, LocalTransport())
    assert len(got) == len(want) > 3
    for have, should in zip(got, want, strict=True):
        same_bits(have, should)
    assert transport.stats.exchanges == exchanges and transport.stats.payload_bytes > 0


def test_a_recorded_step_has_its_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = played(monkeypatch, 6)
    with record() as events:
        results(partial(layer, schedule="chunked(2)"), transport)
    wire = [event.action for event in events if event.lane == "wire" and event.action != "N"]
    assert sorted(wire) == ["C0", "C1", "Ct0", "Ct1", "D0", "D1", "Dt0", "Dt1"]
