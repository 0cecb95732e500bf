"""Two streams through the same blocks: the bits of one after the other, in the order that was planned."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, RemoteAbort, aux_loss
from moe_overlap.layer.interleaved import Interleaved
from moe_overlap.schedule.recorder import record
from tests.layers import D, block_stack, executed, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits


class Causal(nn.Module):
    """Sums of all tokens so far, of the first half too: what attention is, as far as order goes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D, dtype=torch.float64)

    def forward(self, h, past):
        mine = torch.tanh(self.linear(h)).cumsum(dim=0)
        mine = mine if past is None else mine + past
        return h + 0.1 * mine, mine[-1:]


def stack(transport, *, blocks=2, **options):
    return block_stack(Interleaved, transport, blocks=blocks, **options)


def step(model, rank, how):
    first = tokens(9 + 3 * rank, seed=rank).requires_grad_()
    second = tokens(11 - rank, seed=7 + rank).requires_grad_()
    with record() as events:
        y, z = how(model, first, second)
        (y.square().sum() + 3 * z.square().sum() + aux_loss(model)).backward()
    return [y.detach(), z.detach(), first.grad, second.grad, *(p.grad for p in model.parameters())], events


HOW = {
    "interleaved": lambda model, *streams: model(*streams),
    "checkpointed": lambda model, *streams: checkpoint(model, *streams, use_reentrant=False),
    "in turn": lambda model, *streams: model.one_after_the_other(*streams),
}
FIRST = "one op"
CASES = {
    FIRST: {},
    "two ops, all early": {"ops": 2, "slot": 2, "backward_slot": 0},
    "three ops": {"ops": 3, "blocks": 3},
    "no ops": {"ops": 0},
    "auxiliary loss": {"layer": {"aux_loss_coef": 0.1}},
    "global balance": {"layer": {"aux_loss_coef": 0.1, "balance": "global"}},
    "deduplicated": {"layer": {"dedup": "on", "top_k": 4}},
    "halves of a sequence": {"op": Causal, "carry": True},
    "halves, two ops": {"op": Causal, "carry": True, "ops": 2, "slot": 0},
}


@pytest.mark.parametrize(("case", "ranks"), [*((case, 2) for case in CASES), (FIRST, 1), (FIRST, 3)])
def test_interleaved_has_the_bits_of_one_after_the_other(case, ranks):
    def rank(me, how, **options):
        return step(stack(me.transport(), **CASES[case], **options), me.rank, HOW[how])[0]

    def all_of(how, seed=0, **options):
        return virtual_world(ranks, seed=seed).run(lambda me: rank(me, how, **options))

    want = all_of("in turn")
    assert any(grad is not None and grad.abs().sum() > 0 for grad in want[0][4:])
    for seed, how, options in ((1, "interleaved", {}), (2, "interleaved", {"overlap": False}), (3, "checkpointed", {})):
        for got, results in zip(all_of(how, seed, **options), want, strict=True):
            for a, b in zip(got, results, strict=True):
                same_bits(a, b)


@pytest.mark.parametrize("by", ["tokens", "experts"])
def test_chunks_are_equal_to_tolerance_and_to_themselves_joined(by):
    def rank(me, how="interleaved", **options):
        return step(stack(me.transport(), **options), me.rank, HOW[how])[0]

    want = virtual_world(2).run(lambda me: rank(me, "in turn"))
    cut = {"chunks": 3, "by": by}
    got = virtual_world(2).run(lambda me: rank(me, **cut))
    joined = virtual_world(2).run(lambda me: rank(me, **cut, overlap=False))
    for a, b, c in zip(got, joined, want, strict=True):
        for one, other, exact in zip(a, b, c, strict=True):
            same_bits(one, other)
            close(one, exact)


def test_the_others_ops_stand_between_an_exchange_and_its_wait():
    def rank(me):
        return step(stack(me.transport(), slot=1, backward_slot=1), me.rank, HOW["interleaved"])[1]

    events = virtual_world(2).run(rank)[0]
    forward = ["P", "D0.wire", "B0", "D0.wait", "E0", "C0.wire", "C0.wait", "U"]
    assert executed(events, "forward") == forward * 3 + [one for one in forward if one != "B0"]
    backward = ["Ut", "Ct0.wire", "Ct0.wait", "Ed0", "Dt0.wire", "Ew0", "Bt0", "Dt0.wait", "Pt"]
    assert executed(events, "backward") == [one for one in backward if one != "Bt0"] + backward * 3


def test_a_model_of_one_stream_is_the_blocks_in_a_row():
    model = stack(None)
    h = tokens(9)
    want = h
    for block in model.blocks:
        g = block.ops[0](want)
        want = g + block.moe(block.norm(g))
    same_bits(model(h), want)


def test_auto_measures_each_window_and_has_the_same_numbers():
    def rank(me, how, **options):
        return step(stack(me.transport(), **options), me.rank, HOW[how])[0]

    want = virtual_world(2).run(lambda me: rank(me, "in turn"))
    for got, results in zip(
        virtual_world(2).run(lambda me: rank(me, "interleaved", schedule="auto")), want, strict=True
    ):
        for a, b in zip(got, results, strict=True):
            close(a, b)


def on_gloo():
    torch.set_num_threads(1)
    import torch.distributed as dist

    group = dist.group.WORLD
    rank = dist.get_rank()
    got = step(stack(None, layer={"group": group}), rank, HOW["interleaved"])[0]
    want = step(stack(None, layer={"group": group}), rank, HOW["in turn"])[0]
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gloo_ranks():
    assert gloo_pool(2).run(on_gloo) == [True, True]


def test_an_op_that_fails_is_heard_by_all():
    class Fails(nn.Module):
        def forward(self, h):
            raise OSError("no such thing")

    def rank(me):
        model = stack(me.transport())
        if me.rank == 1:
            model.blocks[1].ops[0] = Fails()
        with pytest.raises(OSError if me.rank else RemoteAbort, match="no such thing"):
            model(tokens(5), tokens(6))

    virtual_world(2).run(rank)


REFUSED = {
    "no blocks": lambda: Interleaved([]),
    "no block": lambda: Interleaved([nn.Linear(2, 2)]),
    "shared": lambda: stack(None, layer={"shared_expert_size": 8}),
    "schedule": lambda: stack(None, layer={"schedule": "chunked(2)"}),
    "auto": lambda: stack(None, layer={"schedule": "auto"}),
    "static": lambda: stack(None, layer={"mode": "static", "static_capacity": 1.5}),
    "slot": lambda: stack(None, slot=-1),
    "chunks": lambda: stack(None, chunks=0),
    "by": lambda: stack(None, by="rows"),
    "word": lambda: stack(None, schedule="serial"),
    "both": lambda: stack(None, schedule="auto", slot=1),
    "shape": lambda: stack(None, op=lambda: lambda h: h[:, :2])(tokens(3), tokens(3)),
    "pair": lambda: stack(None, carry=True, op=lambda: lambda h, past: h)(tokens(3), tokens(3)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    with pytest.raises(ConfigError) as caught:
        REFUSED[case]()
    assert caught.value.field and caught.value.expected
