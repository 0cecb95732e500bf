"""Rows that travel in a narrower dtype than they are computed in."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import ConfigError, PlanMismatch
from tests.layers import make, tokens
from tests.ranks import virtual_world
from tests.tolerances import same_bits


def step(me, payload, overlap=True, schedule="chunked(2)", dedup="off", dtype=torch.float32):
    layer = make(me.transport(), dtype=dtype, payload_dtype=payload, schedule=schedule, overlap=overlap, dedup=dedup)
    x = tokens(24, seed=me.rank, dtype=dtype).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())], layer.stats().payload_bytes


@pytest.mark.parametrize("schedule", ["serial", "chunked(4)", "chunked(2,experts)"])
@pytest.mark.parametrize("dedup", ["off", "on"])
def test_half_the_bytes_and_an_error_of_the_roundings(dedup, schedule):
    whole = virtual_world(2).run(lambda me: step(me, None, schedule=schedule, dedup=dedup))
    half = virtual_world(2).run(lambda me: step(me, torch.bfloat16, schedule=schedule, dedup=dedup))
    joined = virtual_world(2).run(lambda me: step(me, torch.bfloat16, False, schedule=schedule, dedup=dedup))
    for (exact, bytes_whole), (rounded, bytes_half), (off, _) in zip(whole, half, joined, strict=True):
        assert 2 * bytes_half == bytes_whole > 0
        differ = 0
        for a, b, c in zip(exact, rounded, off, strict=True):
            same_bits(b, c)
            error = (a - b).abs().max() / a.abs().max()
            assert error < 2**-6, error  # a few roundings of 2^-9
            differ += int(error > 0)
        assert differ == len(exact)


def test_other_rows_travel_as_they_are():
    for dtype in (torch.float64, torch.bfloat16):
        plain = virtual_world(2).run(lambda me, dtype=dtype: step(me, None, dtype=dtype))
        asked = virtual_world(2).run(lambda me, dtype=dtype: step(me, torch.bfloat16, dtype=dtype))
        for (a, bytes_a), (b, bytes_b) in zip(plain, asked, strict=True):
            assert bytes_a == bytes_b
            for one, other in zip(a, b, strict=True):
                same_bits(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float32, "bf16"])
def test_a_payload_that_cannot_hold_the_rows_is_refused(dtype):
    with pytest.raises(ConfigError, match="payload_dtype") as caught:
        make(payload_dtype=dtype)
    assert caught.value.field == "payload_dtype"


def test_ranks_that_disagree_send_nothing():
    def check(me):
        layer = make(me.transport(), dtype=torch.float32, payload_dtype=torch.bfloat16 if me.rank else None)
        with pytest.raises(PlanMismatch, match="config_digest"):
            layer(tokens(4, dtype=torch.float32))
        assert layer.transport.stats.payload_bytes == 0

    virtual_world(2).run(check)
