"""The link that `bench layer --comm-share` solves for, from planted times."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_overlap import ConfigError
from moe_overlap.commands.bench import wires
from moe_overlap.measure.overlap import comm_share

PAYLOAD = 4_000_000
NOCOMM_S = 0.010
LATENCY_S = 50e-6


class Planted:
    """A runner and its wires: a serial step takes what the link says, and `beside_s` that no formula knows."""

    def __init__(self, beside_s, disturbed_s=0.0):
        self.world, self.phase = SimpleNamespace(rank=0, size=2), "infer"
        self.core = self.nocomm = "without the link"
        self.link = "the link"
        self.beside_s, self.disturbed_s = beside_s, disturbed_s
        self.spec = None

    def emulate(self, link, ranks_per_node):
        self.spec = link

    def serial_s(self):
        return NOCOMM_S + 2 * LATENCY_S + PAYLOAD / self.spec.bytes_per_s + self.beside_s

    def interleave(self, variants, repeats, warmup=0):
        disturbed_s, self.disturbed_s = self.disturbed_s, 0.0 if self.spec else self.disturbed_s
        times = [NOCOMM_S if one.transport == self.nocomm else self.serial_s() + disturbed_s for one in variants]
        return [SimpleNamespace(time_s=[time_s] * n) for time_s, n in zip(times, repeats, strict=True)]


def solve(monkeypatch, planted, share, rounds=8):
    monkeypatch.setattr(wires, "link_bytes", lambda *_: PAYLOAD)
    monkeypatch.setattr(wires, "plan_of", lambda *_: None)
    monkeypatch.setattr(wires, "Variant", SimpleNamespace)
    model = SimpleNamespace(sizes=SimpleNamespace(hidden=8), dtype=torch.float32, as_asked=lambda pair: pair)
    return wires.solve_link(planted, model, planted, share=share, latency_s=LATENCY_S, ranks_per_node=1, rounds=rounds)


@pytest.mark.parametrize("share", [0.15, 0.6, 0.9])
@pytest.mark.parametrize("beside_s", [0.0, 0.0007])
@pytest.mark.parametrize("disturbed_s", [0.0, 5.0])
def test_the_link_has_the_share_that_was_asked_for(monkeypatch, share, beside_s, disturbed_s):
    """Also where a step takes longer than its bytes, and where one measurement was disturbed."""
    planted = Planted(beside_s, disturbed_s)
    link = solve(monkeypatch, planted, share)
    assert link == planted.spec and link.latency_s == LATENCY_S
    assert abs(comm_share(planted.serial_s(), NOCOMM_S) - share) <= wires.SHARE_TOLERANCE


def test_latency_alone_may_be_too_much(monkeypatch):
    with pytest.raises(ConfigError, match="a larger share"):
        solve(monkeypatch, Planted(0.0), 0.005)
