"""Context-coherent inference: the model of ordinary layers in a row, with one exchange a layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_overlap import CoherentLayer, MoELayer
from moe_overlap.placement import LocalFirst, Placement
from moe_overlap.placement.planners import affinity_layers
from moe_overlap.placement.topology import Topology
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.recorder import record
from tests.layer.coherents import COUNTS, Picky, brought, change, coherent, in_a_row, model
from tests.layers import D, E, F, make, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

WORD = 8
COPIED = Placement.of_ranks([[0, 1, 2, 3, 7], [4, 5, 6, 7, 0, 1]], homes=[0] * 4 + [1] * 4, selector=LocalFirst())
SPREAD = Placement.of_ranks([[7, 2], [], [0, 1, 3, 5, 6], [4]])
THREE = Placement.of_ranks([[5, 0, 1], [2, 3], [4, 6, 7]])

CASES = [
    (1, {}),
    (1, {"schedule": "chunked(3)", "picky": True}),
    (2, {}),
    (2, {"overlap": False, "shared_expert_size": F}),
    (2, {"placement": COPIED, "schedule": "chunked(2)"}),
    (2, {"placement": COPIED, "picky": True}),
    (2, {"schedule": "auto"}),
    (3, {"placement": THREE, "schedule": "chunked(3,experts)", "picky": True, "shared_expert_size": F}),
    (3, {"latent_size": 8, "schedule": "chunked(2,peers)"}),
    (3, {"weights_at": "input", "zero_experts": 3, "schedule": "chunked(5)", "overlap": False}),
    (4, {"placement": SPREAD, "zero_experts": 2, "latent_size": 8, "shared_expert_size": F}),
    (4, {"placement": SPREAD, "schedule": "chunked(16)", "activation": "gelu"}),
]


@pytest.mark.parametrize(("world", "options"), CASES, ids=[f"{w}-{'-'.join(o)}" for w, o in CASES])
def test_it_is_the_model_of_ordinary_layers(world, options):
    def rank(me):
        layers = model([me.transport() for _ in range(3)], me.rank, **options)
        x = brought(me.rank)
        with torch.no_grad():
            got, here = coherent(layers, x)
            close(got, in_a_row(layers, x))
        assert not torch.equal(got, x) or not len(x)
        return here

    here = virtual_world(world, seed=world).run(rank)
    owned = sorted((int(s), int(i)) for one in here for s, i in zip(one.source_N, one.index_N, strict=True))
    assert owned == [(rank, place) for rank in range(world) for place in range(COUNTS[rank])]
    assert world == 1 or any((one.source_N != rank).any() for rank, one in enumerate(here))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_of_rows_carries_its_identity(dtype):
    def rank(me):
        layers = model([me.transport()], me.rank, dtype=dtype, shared_expert_size=F)
        x = brought(me.rank, dtype).reshape(-1, 1, D)
        with torch.inference_mode():
            got, _ = coherent(layers, x)
            close(got, in_a_row(layers, x))

    virtual_world(3).run(rank)


def test_autocast_is_the_callers():
    def rank(me):
        layers = model([me.transport()], me.rank, dtype=torch.float32)
        x = brought(me.rank, torch.float32)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got, _ = coherent(layers, x)
            want = in_a_row(layers, x)
        assert got.dtype == torch.float32
        close(got, want, torch.bfloat16)

    virtual_world(2).run(rank)


@pytest.mark.parametrize("schedule", ["chunked(4)", "chunked(2,experts)", "chunked(2,peers)"])
def test_overlap_changes_no_bit(schedule):
    def rank(me):
        x = brought(me.rank)
        with torch.no_grad():
            on, off = (coherent(model([me.transport(), me.transport()], me.rank, schedule=schedule, overlap=overlap), x)
                       for overlap in (True, False))  # fmt: skip
        same_bits(on[0], off[0])

    virtual_world(3).run(rank)


def test_what_stays_without_a_residual_and_a_norm_is_the_result():
    def rank(me):
        ((layer, _),) = model([me.transport()], me.rank)
        step, x = CoherentLayer(layer, residual=False), brought(me.rank)
        with torch.no_grad():
            close(step.home(step(step.begin(x))), layer(x))

    virtual_world(2).run(rank)


def test_dense_parts_between_layers_see_rows_and_where_they_belong():
    def rank(me):
        layers = model([me.transport(), me.transport()], me.rank)
        x, scale = brought(me.rank), torch.tensor([0.5, 2.0], dtype=torch.float64)
        first, second = (CoherentLayer(layer, norm=norm) for layer, norm in layers)
        with torch.no_grad():
            here = first(first.begin(x))
            here = here.with_rows(here.h_ND * scale[here.source_N, None] + here.index_N[:, None])
            got = second.home(second(here))
            h = in_a_row(layers[:1], x) * scale[me.rank] + torch.arange(len(x))[:, None]
            close(got, in_a_row(layers[1:], h))

    virtual_world(2).run(rank)


class Copies:
    """A step rule: rank 1 has a copy of rank 0's first expert."""

    digest = 3

    def __call__(self, counts, base):
        experts = [[0, 1, 2, 3], [4, 5, 6, 7, 0]]
        return Placement.of_ranks(experts, homes=base.home_ranks, selector=LocalFirst())


def test_copies_are_fetched_when_they_are_not_valid():
    expert_bytes = 3 * F * D * 8

    def rank(me):
        (kept,) = model([me.transport()], me.rank, placement=COPIED)
        (stepwise,) = model([me.transport()], me.rank)
        stepwise[0].dispatcher.rule = Copies()
        x, sent = brought(me.rank), []
        with torch.no_grad():
            for one in (kept, stepwise):
                stats = one[0].transport.stats
                for _ in range(2):
                    before = stats.weight_bytes
                    close(coherent([one], x)[0], in_a_row([one], x))
                    sent.append(stats.weight_bytes - before)
        return sent

    # Kept ones are fetched once; those of a step in each of four steps, two of them of the ordinary layer.
    first, second = virtual_world(2).run(rank)
    assert first == [2 * expert_bytes, 0, 2 * expert_bytes, 2 * expert_bytes]
    assert second == [expert_bytes, 0, 0, 0]


def on_gloo(placed):
    rank = dist.get_rank()
    options = {"placement": COPIED, "schedule": "chunked(2)"} if placed else {"picky": True, "shared_expert_size": F}
    torch.manual_seed(3)
    layers = []
    for number in range(3):
        router = Picky(LinearRouter(D, E, 1, dtype=torch.float64)) if options.pop("picky", False) else None
        layer = MoELayer(D, F, E, 1, group=dist.group.WORLD, dtype=torch.float64, router=router, **options)
        norm = nn.LayerNorm(D, dtype=torch.float64)
        change(layer.router, number)
        change(layer.experts, 100 * number + rank)
        layers.append((layer, norm))
    x = brought(rank)
    with torch.no_grad():
        got, _ = coherent(layers, x)
        sent = [layer.transport.stats.payload_bytes for layer, _ in layers]
        close(got, in_a_row(layers, x))
    return sent


@pytest.mark.parametrize("placed", [False, True])
def test_two_gloo_ranks(placed):
    assert sum(map(sum, gloo_pool(2).run(on_gloo, placed))) > 0


class Traced(nn.Module):
    """Routes by a table: the first entry of a token's row is its number in it."""

    def __init__(self, ids):
        super().__init__()
        self.register_buffer("ids", torch.as_tensor(ids, dtype=torch.int32))
        self.top_k = 1

    def forward(self, x):
        ids = self.ids[x[:, :1].long()]
        return RoutingDecision(
            topk_ids_TK=ids,
            topk_weights_TK=torch.ones(ids.shape, dtype=torch.float64),
            tokens_per_expert_E=torch.bincount(ids[:, 0].long(), minlength=E),
            dropped_tokens=torch.zeros((), dtype=torch.int64),
            status=torch.zeros(1, dtype=torch.int32),
        )


def markov(keeps, layers, count, seed):
    """int64 [layers, count]: a token's next expert is a permutation of its last one with probability `keeps`, else any
    of them."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, E, count)]
    for _ in range(layers - 1):
        follow = rng.permutation(E)[ids[-1]]
        ids.append(np.where(rng.random(count) < keeps, follow, rng.integers(0, E, count)))
    return np.stack(ids)


@pytest.mark.parametrize(("world", "keeps"), [(2, 0.8), (4, 0.5)])
def test_affinity_leaves_the_closed_form_share_of_rows_local(world, keeps):
    """(1 - keeps) (1 - 1 / P) of the tokens leave in each layer but the first, once; in ordinary layers 1 - 1 / P do,
    and come back."""
    depth, count = 4, 12000
    trace = markov(keeps, depth, 2 * count, seed=world)
    # Planned from one half of the tokens, run with the other one.
    placements = affinity_layers(trace[:, ::2], E, Topology(world_size=world), slots=E // world)
    routed = trace[:, 1::2]

    def rank(me):
        each = count // world
        layers, one_way, both_ways = [], [], []
        for ids, placement in zip(routed, placements, strict=True):
            layer = make(me.transport(), router=Traced(ids), top_k=1, placement=placement)
            with torch.no_grad():
                w_in, w_out = layer.expert_weights
                w_in[:, :, 0], w_out[:, 0] = 0.0, 0.0  # no expert reads a token's number or changes it
            layers.append(CoherentLayer(layer))
        x = tokens(each, seed=me.rank)
        x[:, 0] = torch.arange(me.rank * each, (me.rank + 1) * each)
        h, here = x, layers[0].begin(x)
        with torch.no_grad():
            for step in layers:
                stats = step.layer.transport.stats
                here = step(here)
                assert (stats.exchanges, stats.agreements) == (1, 1)
                one_way.append(stats.payload_bytes)
                h = h + step.layer(h)
                assert (stats.exchanges, stats.agreements) == (3, 2)
                both_ways.append(stats.payload_bytes - one_way[-1])
                assert stats.row_meta_bytes == stats.weight_bytes == 0
            close(layers[-1].home(here), h)
        return one_way, both_ways

    one_way, both_ways = np.array(virtual_world(world).run(rank)).sum(axis=0)
    leave = one_way / (D * 8 + 2 * WORD) / count
    assert leave[0] == pytest.approx(1 - 1 / world, abs=0.015)
    assert leave[1:] == pytest.approx(np.full(depth - 1, (1 - keeps) * (1 - 1 / world)), abs=0.015)
    assert both_ways / (2 * D * 8) / count == pytest.approx(np.full(depth, 1 - 1 / world), abs=0.015)


def test_a_recorder_sees_a_dispatch_and_no_combine():
    def rank(me):
        ((layer, norm),) = model([me.transport()], me.rank, schedule="chunked(2)")
        step = CoherentLayer(layer, norm=norm)
        with torch.no_grad(), record() as events:
            step(step.begin(brought(me.rank)))
        seen = {event.action for event in events if event.rank == me.rank}
        assert seen >= {"P", "D0", "D1", "E0", "E1"} and not {"C0", "C1", "U"} & seen

    virtual_world(2).run(rank)
