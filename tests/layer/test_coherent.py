"""Context-coherent inference: the model of ordinary layers in a row, with one exchange a layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_overlap import CoherentLayer, MoELayer, RoutingRecorder
from moe_overlap.errors import ConfigError, MoeTransportError, PlanMismatch, TransportTimeout
from moe_overlap.placement import LocalFirst, Placement
from moe_overlap.placement.planners import affinity_layers
from moe_overlap.placement.topology import Topology
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.recorder import record
from tests.layers import D, E, F, make, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

WORD = 8
COUNTS = (13, 0, 7, 30)  # tokens of each rank
COPIED = Placement.of_ranks([[0, 1, 2, 3, 7], [4, 5, 6, 7, 0, 1]], homes=[0] * 4 + [1] * 4, selector=LocalFirst())
SPREAD = Placement.of_ranks([[7, 2], [], [0, 1, 3, 5, 6], [4]])
THREE = Placement.of_ranks([[5, 0, 1], [2, 3], [4, 6, 7]])


class Picky(nn.Module):
    """A router that gives no expert to a token whose first entry is above a limit."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.top_k = inner, 1

    def forward(self, x):
        decision = self.inner(x)
        refused = x[:, :1] > 0.3
        return replace(decision, topk_ids_TK=decision.topk_ids_TK.masked_fill(refused, -1),
                       topk_weights_TK=decision.topk_weights_TK.masked_fill(refused, 0.0))  # fmt: skip


def change(module, seed):
    """Other weights than those that every layer of the tests starts with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.add_(drawn.to(parameter.dtype), alpha=0.3)


def model(transports, rank, *, picky=False, zero_experts=0, **options):
    """[(layer, norm)]: the same router and norm on all ranks, experts of their own."""
    found = []
    for number, transport in enumerate(transports):
        options.setdefault("dtype", torch.float64)
        if zero_experts:
            options["router"] = LinearRouter(D, E, 1, zero_experts=zero_experts, dtype=options["dtype"])
        elif picky:
            options["router"] = Picky(LinearRouter(D, E, 1, dtype=options["dtype"]))
        layer = make(transport, **{"top_k": 1, **options})
        norm = nn.LayerNorm(D, dtype=options["dtype"])
        for part in (layer.router, layer.shared_expert, layer.latent_in, layer.latent_out, norm):
            if part is not None:
                change(part, number)
        change(layer.experts, 100 * number + rank)
        found.append((layer, norm))
    return found


def in_a_row(layers, x):
    """The ordinary way: every row comes home in each layer."""
    for layer, norm in layers:
        x = x + layer(norm(x))
    return x


def coherent(layers, x):
    """The same with one exchange a layer."""
    steps = [CoherentLayer(layer, norm=norm) for layer, norm in layers]
    here = steps[0].begin(x)
    for step in steps:
        here = step(here)
    return steps[-1].home(here), here


def brought(rank, dtype=torch.float64):
    return tokens(COUNTS[rank], seed=rank).to(dtype)


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


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("top_k", {"top_k": 2}),
        ("dedup", {"dedup": "on"}),
        ("dedup", {"dedup": "auto"}),
        ("dedup", {"dedup": "on", "hierarchical": True, "ranks_per_node": 2}),
        ("mode", {"mode": "static", "static_capacity": "no_drop"}),
        ("expert_offload", {"expert_offload": "host", "schedule": "chunked(2,experts)"}),
        ("payload_dtype", {"payload_dtype": torch.bfloat16}),
    ],
)
def test_layers_that_cannot_are_refused(field, options):
    def rank(me):
        with pytest.raises(ConfigError) as caught:
            CoherentLayer(make(me.transport(), **{"top_k": 1, **options}))
        return caught.value.field

    assert virtual_world(4).run(rank) == [field] * 4


def test_other_mistakes_of_construction():
    layer = make(top_k=1)
    for field, call in (
        ("layer", lambda: CoherentLayer(nn.Linear(2, 2))),
        ("norm", lambda: CoherentLayer(layer, norm=3)),
        ("x", lambda: CoherentLayer(layer).begin(3.0)),
        ("h_ND", lambda: CoherentLayer(layer).begin(tokens(3)).with_rows(tokens(4))),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.field == field


def refusing(me, call, step):
    """What a step of which rank 1 alone is wrong raises here, and that the layer goes on afterwards."""
    good = step.begin(brought(me.rank))
    before = replace(step.layer.transport.stats)
    with pytest.raises(ConfigError) as caught:
        call() if me.rank == 1 else step(good)
    after = step.layer.transport.stats
    assert (after.exchanges, after.payload_bytes) == (before.exchanges, before.payload_bytes)
    close(step.home(step(good)), in_a_row([(step.layer, step.norm)], brought(me.rank)))
    return caught.value.field


@pytest.mark.parametrize(
    "mistake",
    ["gradients", "tokens", "tokens.rank", "norm", "tokens.h_ND", "tokens.source_N", "x.dtype", "replay"],
)
def test_one_rank_that_refuses_makes_all_refuse_and_nothing_is_sent(mistake):
    def rank(me):
        ((layer, norm),) = model([me.transport()], me.rank)
        step = CoherentLayer(layer, norm=norm)
        good = step.begin(brought(me.rank))

        def call():
            if mistake == "gradients":
                with torch.enable_grad():
                    step(good)
            elif mistake == "norm":
                CoherentLayer(layer, norm=lambda h: h[:, 1:])(good)
            elif mistake == "replay":
                with RoutingRecorder(layer):
                    step(good)
            else:
                bad = {"tokens": 3, "tokens.rank": replace(good, rank=0), "tokens.h_ND": step.begin(tokens(3)[:, :3]),
                       "tokens.source_N": replace(good, index_N=good.index_N.int()),
                       "x.dtype": step.begin(tokens(3).to(torch.complex64))}  # fmt: skip
                CoherentLayer(layer, norm=lambda h: norm(h.real.double()))(bad[mistake])

        with torch.no_grad():
            return refusing(me, call, step)

    assert virtual_world(2).run(rank)[1] == mistake


def test_rows_that_are_missing_or_twice_at_the_end_are_said_on_all_ranks():
    def rank(me):
        ((layer, norm),) = model([me.transport()], me.rank)
        step = CoherentLayer(layer, norm=norm)
        with torch.no_grad():
            here = step(step.begin(brought(me.rank)))
            lost = replace(here, h_ND=here.h_ND[1:], source_N=here.source_N[1:], index_N=here.index_N[1:])
            with pytest.raises(ConfigError, match="tokens = .*each once"):
                step.home(lost if me.rank == 0 else here)
            places = here.index_N.clone()
            own = (here.source_N == 0).nonzero()
            if me.rank == 0:
                places[own[0]] = places[own[1]]
            with pytest.raises(ConfigError, match="of rank 0, some of them twice.*each once"):
                step.home(replace(here, index_N=places))
            with pytest.raises(ConfigError, match="tokens = .*each once"):
                step.home(replace(here, source_N=here.source_N + 2 * (me.rank == 0)))
            with pytest.raises(ConfigError, match="one dtype"):
                step.home(replace(here, h_ND=here.h_ND.float()) if me.rank == 0 else here)
            close(step.home(here), in_a_row([(layer, norm)], brought(me.rank)))

    virtual_world(2).run(rank)


def test_a_rank_that_calls_the_layer_itself_is_a_mismatch():
    def rank(me):
        ((layer, _),) = model([me.transport()], me.rank)
        step, x = CoherentLayer(layer), brought(me.rank)
        with torch.no_grad(), pytest.raises(PlanMismatch, match="schedule_digest"):
            step(step.begin(x)) if me.rank else layer(x)
        layer.transport.reopen()
        with torch.no_grad(), pytest.raises(PlanMismatch):
            step.home(step.begin(x)) if me.rank else layer(x)

    virtual_world(2).run(rank)


@pytest.mark.parametrize("where", ["norm", "shared_expert", "home"])
def test_a_rank_that_fails_after_the_agreement_closes_the_transport(where):
    """The others learn of it at once; after reopen() all goes on."""

    def rank(me):
        ((layer, norm),) = model([me.transport()], me.rank, shared_expert_size=F)
        calls = []

        def fails(h):
            calls.append(h)
            if me.rank == 1 and len(calls) == 2 and where == "norm":  # on the experts' side
                raise KeyboardInterrupt
            return norm(h)

        step = CoherentLayer(layer, norm=fails)
        down = layer.shared_expert.down
        if me.rank == 1 and where == "shared_expert":
            layer.shared_expert.down = nn.Identity()
        with torch.no_grad():
            with pytest.raises((KeyboardInterrupt, ConfigError, MoeTransportError)) as caught:
                here = step(step.begin(brought(me.rank)))
                step.home("nothing" if me.rank == 1 and where == "home" else here)
            layer.shared_expert.down = down
            with pytest.raises(MoeTransportError):
                step.home(step.begin(brought(me.rank)))
            layer.transport.reopen()
            close(step.home(step(step.begin(brought(me.rank)))), in_a_row([(layer, norm)], brought(me.rank)))
        return caught.type.__name__

    names = virtual_world(2).run(rank)
    assert names[0] == "RemoteAbort"
    assert names[1] == ("KeyboardInterrupt" if where == "norm" else "ConfigError")


@pytest.mark.parametrize("stops", ["step", "home"])
def test_nobody_waits_for_ever_for_a_rank_that_does_not_come(stops):
    def rank(me):
        ((layer, norm),) = model([me.transport()], me.rank)
        step = CoherentLayer(layer, norm=norm)
        with torch.no_grad():
            here = step.begin(brought(me.rank))
            if me.rank == 1 and stops == "step":
                return
            here = step(here) if stops == "home" else here
            if me.rank == 1:
                return
            with pytest.raises(TransportTimeout) as caught:
                step.home(here) if stops == "home" else step(here)
            assert (caught.value.rank, caught.value.peer) == (0, 1)

    virtual_world(2).run(rank)
