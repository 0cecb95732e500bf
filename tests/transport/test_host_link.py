"""The link to the host's memory: slots that are used again, copies on played streams, limits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.transport import host_link
from moe_overlap.transport.host_link import CudaHostLink, EmulatedHostLink
from tests.layers import E, make, tokens
from tests.tolerances import same_bits
from tests.transport.played import PlayedEngine


def played(monkeypatch: pytest.MonkeyPatch, seed: int, **options: Any) -> CudaHostLink:
    monkeypatch.setattr(host_link, "Engine", partial(PlayedEngine, seed=seed))
    return CudaHostLink(**options)


def step_of(link: Any) -> list[torch.Tensor]:
    """y and the gradients of a layer of four groups of experts, after a step before it."""
    layer = make(schedule="chunked(4,experts)", expert_offload=link)
    for _ in range(2):
        layer.zero_grad()
        y = layer(tokens(13))
        y.square().sum().backward()
    return [y.detach(), *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]


def test_streams_that_come_late_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step_of(EmulatedHostLink())
    for seed in range(6):
        link = played(monkeypatch, seed)
        found = step_of(link)
        for one, other in zip(found, expected, strict=True):
            same_bits(one, other)
        assert link.device_bytes == 2 * link.fetched_bytes // (4 * E) * (E // 4)


def test_streams_that_do_not_wait_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step_of(EmulatedHostLink())
    monkeypatch.setattr(PlayedEngine, "deaf", True)
    monkeypatch.setattr(CudaHostLink, "wait", lambda link, copy: None)
    found = [step_of(played(monkeypatch, seed)) for seed in range(6)]
    assert not all(torch.equal(one, other) for step in found for one, other in zip(step, expected, strict=True))


def test_weights_are_pinned_once_and_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    link = played(monkeypatch, 0, limit_bytes=100)
    weight = torch.nn.Parameter(torch.arange(6.0))
    before = weight.detach().clone()
    for _ in range(2):
        link.pin(weight)
    assert link.pinned_bytes == 48 and torch.equal(weight, before)
    with pytest.raises(ConfigError, match=r"at most 100 pinned"):
        link.pin(torch.nn.Parameter(torch.zeros(8)))


def test_what_is_pinned_is_of_the_weights_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers come and go, and weights may be put in place of pinned ones."""
    link = played(monkeypatch, 0, limit_bytes=100)
    for _ in range(5):
        weight = torch.nn.Parameter(torch.zeros(8))
        for _ in range(3):
            link.pin(weight)
            assert link.pinned_bytes == 64
            weight.data = torch.ones(8)
    del weight
    assert link.pinned_bytes == 0


def test_after_a_step_the_host_may_change_the_weights_of_frozen_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no gradients that the host would wait for."""
    link = played(monkeypatch, 0)
    layer = make(schedule="chunked(4,experts)", expert_offload=link)
    for weight in layer.expert_weights:
        weight.requires_grad_(False)
    copied: list[Any] = []
    joined: list[Any] = []
    plain = CudaHostLink._copy

    def watched(one: CudaHostLink, pairs: Any, *, up: bool, timing: bool) -> Any:
        copied.append(plain(one, pairs, up=up, timing=timing))
        return copied[-1]

    monkeypatch.setattr(CudaHostLink, "_copy", watched)
    monkeypatch.setattr(CudaHostLink, "join", lambda one, copy: joined.append(copy))
    layer(tokens(13).requires_grad_()).sum().backward()
    assert copied[-1] in joined


def test_slots_are_used_again_and_small_ones_go() -> None:
    link = EmulatedHostLink()
    first = link.slot(100)
    link.give_back(first)
    assert link.slot(60) is first
    link.give_back(first)
    del first
    assert link.slot(200).memory.numel() == 200 and link.device_bytes == 200


def test_each_direction_of_an_emulated_link_takes_one_copy_after_the_other() -> None:
    link = EmulatedHostLink(1e6)
    into, source = torch.empty(1000, dtype=torch.uint8), torch.ones(1000, dtype=torch.uint8)
    first, second = (link.up([(into, source)], timing=True) for _ in range(2))
    other = link.down([(into, source)], timing=True)
    assert second.begin == first.end == pytest.approx(first.begin + 1e-3) and other.begin < first.end


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf"), True, "fast"])
def test_a_rate_that_is_none_is_refused(rate: Any) -> None:
    with pytest.raises(ConfigError, match="bytes_per_s"):
        EmulatedHostLink(rate)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_there_is_no_link_of_one() -> None:
    with pytest.raises(ConfigError, match="device"):
        CudaHostLink()
