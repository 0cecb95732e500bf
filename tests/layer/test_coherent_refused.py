"""Context-coherent inference: what is refused, on which ranks, and what is left behind when a rank fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from moe_overlap import CoherentLayer, RoutingRecorder
from moe_overlap.errors import ConfigError, MoeTransportError, PlanMismatch, TransportTimeout
from tests.layer.coherents import brought, in_a_row, model
from tests.layers import F, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close


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
            layer.shared_expert.down = nn.Sequential(down, nn.Flatten(0))
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
