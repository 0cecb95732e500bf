"""Experts in host memory: equal bits, fewer bytes on the device, errors for what does not go with it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from moe_overlap import MoELayer, ShortcutBlock
from moe_overlap.errors import ConfigError
from moe_overlap.placement import Placement
from moe_overlap.schedule.builders import agree_ahead, chunked, shared_expert
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.transport import host_link
from moe_overlap.transport.host_link import EmulatedHostLink, HostLink
from tests.layers import D, E, F, check_same, make, results, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.transport.played import PlayedEngine

EXPERT_BYTES = 3 * F * D * 8
SLOW = 40e6  # bytes a second: 0.23 ms an expert


@pytest.mark.parametrize("schedule", ["serial", "chunked(1)", "chunked(2,experts)", "chunked(3,experts)"])
@pytest.mark.parametrize("overlap", [True, False])
def test_one_rank_has_the_bits_of_experts_on_the_device(schedule, overlap):
    link = EmulatedHostLink(SLOW)
    layer = make(schedule=schedule, overlap=overlap, expert_offload=link)
    check_same(results(layer, tokens(21)), results(make(schedule=schedule, overlap=overlap), tokens(21)))
    assert link.fetched_bytes == 2 * E * EXPERT_BYTES and link.stored_bytes == E * EXPERT_BYTES


@pytest.mark.parametrize("chunks, groups", [(1, E), (2, E), (4, E // 2), (8, 2)])
def test_of_the_experts_two_groups_are_on_the_device(chunks, groups):
    link = EmulatedHostLink()
    layer = make(schedule=f"chunked({chunks},experts)", expert_offload=link)
    for _ in range(2):
        results(layer, tokens(9))
    assert link.device_bytes == groups * EXPERT_BYTES


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_the_same_bits_beside_exchanges(ranks):
    def rank(me):
        plain, away = (
            make(me.transport(), schedule="chunked(2,experts)", shared_expert_size=8, expert_offload=offload)
            for offload in (None, EmulatedHostLink(SLOW))
        )
        x = tokens(5 + 6 * me.rank, seed=me.rank)
        return results(plain, x), results(away, x)

    for plain, away in virtual_world(ranks).run(rank):
        check_same(plain, away)


def test_more_chunks_than_experts_of_a_rank_and_uneven_homes():
    placement = Placement.of_ranks([[0, 1, 2, 3, 4], [5, 6, 7]])

    def rank(me):
        both = []
        for offload in (None, "host"):
            layer = make(me.transport(), schedule="chunked(7,experts)", placement=placement, expert_offload=offload)
            both.append(results(layer, tokens(8, seed=me.rank)))
        return both

    for plain, away in virtual_world(2).run(rank):
        check_same(plain, away)


@pytest.mark.parametrize("ahead", [0, 1])
def test_under_a_shared_expert_and_the_agreement(ahead):
    schedule = agree_ahead(shared_expert(0, chunks=2, by="experts"), ahead)

    def rank(me):
        layers = (make(me.transport(), schedule=schedule, shared_expert_size=8, expert_offload=offload)
                  for offload in (None, "host"))  # fmt: skip
        return [results(layer, tokens(8, seed=me.rank)) for layer in layers]

    for plain, away in virtual_world(2).run(rank):
        check_same(plain, away)


def test_in_a_shortcuts_window():
    def rank(me):
        both = []
        for offload in (None, "host"):
            torch.manual_seed(5)
            ops = [torch.nn.Linear(D, D, dtype=torch.float64) for _ in range(3)]
            layer = make(me.transport(), expert_offload=offload)
            block = ShortcutBlock(ops, layer, tap=1, slot=1, chunks=2, by="experts")
            both.append(results(block, tokens(7, seed=me.rank)))
        return both

    for plain, away in virtual_world(2).run(rank):
        check_same(plain, away)


def test_a_checkpoint_and_two_backwards_of_one_graph():
    def twice(layer, x):
        y = checkpoint(layer, x, use_reentrant=False)
        return y + layer(x)

    def again(layer, x):
        y = layer(x)
        y.sum().backward(retain_graph=True)
        return y

    for call in (twice, again):
        layers = (make(schedule="chunked(2,experts)", expert_offload=offload) for offload in (None, "host"))
        plain, away = (results(layer, tokens(6), partial(call, layer)) for layer in layers)
        check_same(plain, away)


def test_frozen_experts_send_nothing_down_and_inference_fetches_once():
    link = EmulatedHostLink()
    layer = make(schedule="chunked(4,experts)", expert_offload=link)
    for weight in layer.expert_weights:
        weight.requires_grad_(False)
    x = tokens(6).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and link.stored_bytes == 0
    link.fetched_bytes = 0
    with torch.no_grad():
        layer(x)
    assert link.fetched_bytes == E * EXPERT_BYTES


def test_training_is_the_same_and_a_copy_of_the_layer_shares_the_link():
    def losses(offload):
        layer = make(schedule="chunked(2,experts)", expert_offload=offload)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            layer(tokens(9, seed=step)).square().mean().backward()
            optimizer.step()
        return layer

    plain, away = losses(None), losses("host")
    check_same(list(plain.state_dict().values()), list(away.state_dict().values()))
    assert copy.deepcopy(away).host_link is away.host_link


class Watched(EmulatedHostLink):
    """Says what was asked of it, in order, beside what computes."""

    def __init__(self):
        super().__init__()
        self.said = []

    def _copy(self, pairs, *, up, timing):
        self.said.append("up" if up else "down")
        return super()._copy(pairs, up=up, timing=timing)

    def wait(self, copy):
        self.said.append("wait")
        super().wait(copy)


def test_copies_start_two_groups_ahead_and_are_waited_for_at_once_without_overlap():
    said = {}
    for overlap in (True, False):
        link = Watched()
        with torch.no_grad():
            make(schedule="chunked(4,experts)", overlap=overlap, expert_offload=link)(tokens(9))
        said[overlap] = link.said
    assert said[True][:4] == ["up", "up", "wait", "up"]
    assert said[False][:4] == ["up", "wait", "up", "wait"]


def test_the_timeline_has_a_lane_for_copies_and_a_slow_link_is_waited_for():
    layer = make(schedule="chunked(2,experts)", expert_offload=EmulatedHostLink(SLOW))
    results(layer, tokens(9))
    copies = [event for event in layer.last_events if event.lane == "copy"]
    assert sorted(event.action for event in copies) == ["Hb0", "Hb1", "Hf0", "Hf1", "Hg0", "Hg1"]
    for event in copies:
        assert event.end_s - event.start_s >= 0.999 * E / 2 * EXPERT_BYTES / SLOW
    experts: dict[str, TimelineEvent] = {event.action: event for event in layer.last_events if event.lane == "comp"}
    ends = {event.action: event.end_s for event in copies}
    assert all(experts[f"E{c}"].end_s >= ends[f"Hf{c}"] and experts[f"Ed{c}"].end_s >= ends[f"Hb{c}"] for c in (0, 1))


def test_what_is_explained():
    layer = make(schedule="chunked(4,experts)", expert_offload=EmulatedHostLink(SLOW))
    assert "is known after a timed step" in layer.explain()
    results(layer, tokens(64))
    text = layer.explain()
    assert 'schedule="chunked(4,experts)", expert_offload="host"' in text
    assert f"{E * EXPERT_BYTES} bytes of weights" in text and "0.04 GB/s" in text and "this step had 16" in text
    assert "copy | Hf0" in text and "the optimizer's state" in text


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("expert_offload", {"expert_offload": "disk"}),
        ("schedule", {"schedule": "chunked(2)"}),
        ("dedup", {"dedup": "on"}),
        ("placement", {"placement": Placement.of_ranks([[0, 1, 2, 3, 4], [4, 5, 6, 7]], homes=[0] * 5 + [1] * 3)}),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_all_ranks(field, options):
    def rank(me):
        with pytest.raises(ConfigError) as caught:
            make(me.transport(), **({"expert_offload": "host"} | options))(tokens(4))
        return caught.value.field

    assert virtual_world(2).run(rank) == [field] * 2


@pytest.mark.parametrize("capacity", ["no_drop", 3.0])
@pytest.mark.parametrize("schedule", ["serial", "chunked(2,experts)", "chunked(3,experts)"])
def test_fixed_shapes_have_the_bits_of_experts_on_the_device(schedule, capacity):
    options = {"schedule": schedule, "mode": "static", "static_capacity": capacity}

    def rank(me):
        plain, away = (make(me.transport(), expert_offload=offload, **options) for offload in (None, "host"))
        for step in range(2):
            x = tokens(12, seed=2 * me.rank + step)
            check_same(results(plain, x), results(away, x))
        away.check_static()
        return away.host_link.device_bytes

    for ranks in (1, 2):
        groups = 1 if schedule == "serial" else int(schedule[8])
        held = min(2, groups) * -(-E // ranks // groups) * EXPERT_BYTES
        assert virtual_world(ranks).run(rank) == [held] * ranks


def test_a_schedule_beyond_the_limit_of_the_device_is_refused_by_all_ranks():
    def rank(me):
        found = []
        for groups, limit in ((2, E // 2), (2, E // 2 - 1), (4, 2)):  # of E / 2 experts of a rank
            link = EmulatedHostLink(device_limit_bytes=limit * EXPERT_BYTES)
            layer = make(me.transport(), schedule=f"chunked({groups},experts)", expert_offload=link)
            try:
                layer(tokens(4))
                found.append("ran")
            except ConfigError as error:
                found.append(error.field)
        return found

    assert virtual_world(2).run(rank) == [["ran", "schedule", "ran"]] * 2
    for limit in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="device_limit_bytes"):
            EmulatedHostLink(device_limit_bytes=limit)


@pytest.mark.parametrize("forward, backward, held", [(1, 2, E + E // 2), (4, 1, E + E // 4), (4, 2, E), (8, 8, 2)])
def test_the_limit_counts_the_slots_of_both_halves(forward, backward, held):
    """The slot of all experts serves as one of two groups, and there is another one beside it."""
    pair = chunked(forward, "experts", backward_chunks=backward)
    link = EmulatedHostLink(device_limit_bytes=held * EXPERT_BYTES)
    layer = make(schedule=pair, expert_offload=link)
    found = []
    for _ in range(3):
        x = tokens(9).requires_grad_()
        y = layer(x)
        found.append(link.device_bytes)
        y.sum().backward()
        found.append(link.device_bytes)
    assert max(found) == held * EXPERT_BYTES
    layer = make(schedule=pair, expert_offload=EmulatedHostLink(device_limit_bytes=held * EXPERT_BYTES - 1))
    with pytest.raises(ConfigError, match=f"not {held * EXPERT_BYTES}"):
        layer(tokens(9))


def test_autocast_to_another_dtype_and_a_link_of_another_device_are_refused():
    layer = make(dtype=torch.float32, expert_offload="host")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
        layer(tokens(4, dtype=torch.float32))
    link = HostLink()
    link.device = torch.device("meta")
    with pytest.raises(ConfigError, match="expert_offload"):
        make(expert_offload=link)


@pytest.mark.parametrize("whose", ["the layer's", "the experts'"])
@pytest.mark.parametrize("emptied", [False, True])
def test_weights_that_loading_puts_in_their_place_are_those_that_come_up(monkeypatch, whose, emptied):
    """On pinned memory: those that were there before are pinned no longer."""
    monkeypatch.setattr(host_link, "Engine", PlayedEngine)
    link = host_link.CudaHostLink()
    layer, other = make(schedule="chunked(2,experts)", expert_offload=link), make(schedule="chunked(2,experts)")
    layer(tokens(4))
    held = link.pinned_bytes
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    if emptied:
        layer.to_empty(device="cpu")
    state = {name: value.clone() for name, value in other.state_dict().items()}
    layer.load_state_dict(state, assign=whose == "the layer's")
    if whose == "the experts'":
        layer.experts.load_state_dict({name: v.clone() for name, v in other.experts.state_dict().items()}, assign=True)
    check_same(results(layer, tokens(6)), results(other, tokens(6)))
    assert all(map(link._engine.is_pinned, layer.expert_weights)) and link.pinned_bytes == held


def test_weights_put_elsewhere_are_refused_with_what_to_do():
    layer = make(expert_offload="host")
    first = layer.experts.gate_up_proj
    layer.experts.gate_up_proj = torch.nn.Parameter(first.detach().clone())
    with pytest.raises(ConfigError, match=r"experts\.w_in = .* by layer.load_state_dict\(..., assign=True\)"):
        layer(tokens(4))
    layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
    layer(tokens(4))
    layer.experts.to_empty(device="meta")
    with pytest.raises(ConfigError, match=r"experts\.w_in = 'weights on meta': .* layer\.experts\.cpu\(\)"):
        layer(tokens(4))


def sharded():
    """fully_shard over a mesh of this rank alone, which a layer without offload takes."""
    mesh = init_device_mesh("cpu", (1,))
    found = []
    for offload in (None, "host"):
        layer = fully_shard(make(dtype=torch.float32, expert_offload=offload), mesh=mesh)
        assert isinstance(layer, MoELayer)
        try:
            layer(tokens(4, dtype=torch.float32))
            found.append("ran")
        except ConfigError as error:
            found.append(error.field)
    return found


def test_experts_that_fsdp_has_sharded_are_refused():
    assert gloo_pool(1).run(sharded) == [["ran", "experts.w_in"]]
