"""Staged loopback on a card: real streams, real pinned memory. Its logic is tested in tests/transport."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_overlap import MoELayer, ShortcutBlock
from moe_overlap.agreement.plan import ChunkPlan, RowLayout
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.errors import ConfigError
from moe_overlap.transport import LocalTransport, StagedTransport, Transport
from tests.tolerances import same_bits
from tests.transport.worlds import agreed, rows_of

pytestmark = pytest.mark.gpu

LAYOUT = RowLayout(width=1024, dtype=torch.float32)
LATE_CYCLES = 20_000_000
"""Some ten milliseconds."""
SCHEDULES = ("serial", "chunked(4)", "chunked(2,experts)")


def plan_and_rows(transport: Transport, seed: int = 4, chunks: int = 4) -> tuple[ChunkPlan, list[torch.Tensor]]:
    plan = agreed(transport, slots=3, seed=seed).chunked(chunks)
    return plan, [rows_of(0, plan, chunk, LAYOUT) for chunk in range(chunks)]


@pytest.mark.parametrize("share", [0.0, 7 / 8, 1.0, 2.5])
@pytest.mark.parametrize("piece_bytes", [1000, 1 << 20])
def test_what_left_comes_back(share: float, piece_bytes: int) -> None:
    transport = StagedTransport(share=share, piece_bytes=piece_bytes)
    for seed in range(6):
        plan, rows = plan_and_rows(transport, seed, (1, 2, 4, 16)[seed % 4])
        works = []
        for chunk, want in enumerate(rows):
            out = torch.full_like(want, 77, device="cuda") if chunk % 2 else None
            works.append(transport.start(want.cuda(), plan, LAYOUT, chunk, out=out))  # which nobody else holds
            torch.full_like(want, -1, device="cuda")  # would take the memory of the rows if it were free
        for work, want in reversed(list(zip(works, rows, strict=True))):
            assert torch.equal(work.wait().cpu(), want)
            assert work.done() and work.wait() is work.wait()


def test_rows_that_are_late_on_the_stream_are_waited_for_and_the_host_is_not() -> None:
    transport = StagedTransport(piece_bytes=1 << 16)
    plan, rows = plan_and_rows(transport)
    want = [one.cuda() for one in rows]
    late = [torch.zeros_like(one) for one in want]
    transport.start(want[0], plan, LAYOUT, 0).wait()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(LATE_CYCLES)
        for into, source in zip(late, want, strict=True):
            into.copy_(source)
        works = [transport.start(one, plan, LAYOUT, chunk) for chunk, one in enumerate(late)]
        begun = [work.done() for work in works]
        got = [work.wait().clone() for work in works]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(begun), "the wire did not wait for the rows"
    for have, should in zip(got, want, strict=True):
        assert torch.equal(have, should)


def results(model: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(300, 256, generator=generator).to("cuda", dtype) for _ in range(2))
    x.requires_grad_()
    y = model(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def layer(transport: Transport, dtype: torch.dtype, **options: Any) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(256, 128, 8, 2, transport=transport, dtype=dtype, device="cuda", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_layer_is_the_local_one_bit_for_bit(schedule: str, dtype: torch.dtype) -> None:
    transport = StagedTransport(share=7 / 8, piece_bytes=1 << 15)
    joined = results(layer(StagedTransport(), dtype, schedule=schedule, overlap=False), dtype)
    model = layer(transport, dtype, schedule=schedule)
    # One rank and one chunk over `local` are ops in a row, which the executor is not.
    want = joined if schedule == "serial" else results(layer(LocalTransport(), dtype, schedule=schedule), dtype)
    for _ in range(3):  # memory is used again
        for have, off, should in zip(results(model, dtype), joined, want, strict=True):
            same_bits(have, should)
            same_bits(have, off)
        model.zero_grad()
    assert transport.stats.payload_bytes > 0


def test_a_shortcut_is_the_local_one_bit_for_bit() -> None:
    def block(transport: Transport) -> ShortcutBlock:
        moe = layer(transport, torch.bfloat16)
        ops = [torch.nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        return ShortcutBlock(ops, moe, tap=0, slot=1)

    got, want = (results(block(one), torch.bfloat16) for one in (StagedTransport(share=2.0), LocalTransport()))
    for have, should in zip(got, want, strict=True):
        same_bits(have, should)


def test_a_static_layer_is_the_local_one_bit_for_bit() -> None:
    options = {"schedule": "chunked(2)", "mode": "static", "static_capacity": "no_drop"}
    got, want = (
        results(layer(one, torch.bfloat16, **options), torch.bfloat16) for one in (StagedTransport(), LocalTransport())
    )
    for have, should in zip(got, want, strict=True):
        same_bits(have, should)


@pytest.mark.parametrize("offload", [None, "host"])
def test_auto_measures_the_wire_and_has_the_bits_of_what_it_chose(offload: str | None) -> None:
    model = layer(StagedTransport(), torch.bfloat16, schedule="auto", expert_offload=offload)
    results(model, torch.bfloat16)
    model.zero_grad()
    got = results(model, torch.bfloat16)
    assert isinstance(model.schedule, AutoSchedule)
    (planned,) = model.schedule.found.values()
    assert planned.model.exchange["inter"](300 * 2 * 256 * 2) > 0
    pair = replace(planned.planned(model.last_exchange).pair, name="as chosen")
    fixed = layer(StagedTransport(), torch.bfloat16, schedule=pair, expert_offload=offload)
    for have, should in zip(got, results(fixed, torch.bfloat16), strict=True):
        same_bits(have, should)
    assert "on one rank, over its wire to itself" in model.explain()


def test_rows_of_the_host_are_refused() -> None:
    transport = StagedTransport()
    plan, rows = plan_and_rows(transport)
    with pytest.raises(ConfigError, match="rows.device = 'cpu'"):
        transport.start(rows[0], plan, LAYOUT, 0)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="one of the"):
        StagedTransport("cuda:99")
