"""Steps of the functional form on several ranks: "auto" calibrates once a transport, steps count from its opening."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_overlap import RemoteAbort, moe_forward
from moe_overlap.auto import auto as auto_module
from tests.auto.planted import cost_model, planted
from tests.layers import E, K, make, tokens
from tests.ranks import virtual_world
from tests.strategies import make_routing
from tests.tolerances import close, same_bits


class Rank:
    """One rank's arguments, all but the tokens."""

    def __init__(self, me):
        self.transport, self.rank = me.transport(), me.rank
        half = E // 2
        self.weights = [w.detach()[me.rank * half : (me.rank + 1) * half].clone().requires_grad_() for w in
                        make().expert_weights]  # fmt: skip

    def __call__(self, x, **options):
        ids, weights = make_routing("uniform", len(x), E, K, seed=self.rank, dtype=torch.float64)
        return moe_forward(x, ids, weights, *self.weights, transport=self.transport, **options)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_auto_chooses_once_and_gives_what_serial_gives(overlap, checkpointing, monkeypatch):
    chosen = []
    original = auto_module.AutoSchedule.calibrate

    def calibrate(self, *args, **kwargs):
        chosen.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(auto_module.AutoSchedule, "calibrate", calibrate)

    def rank(me):
        call, results = Rank(me), []
        for n in range(3):
            x = tokens(32, n).requires_grad_()
            options = {"schedule": "auto", "overlap": overlap}
            y = checkpoint(call, x, use_reentrant=False, **options) if checkpointing else call(x, **options)
            want = call(x, schedule="serial")
            close(y.detach(), want.detach())
            gradients = [torch.autograd.grad(one.square().sum(), [x, *call.weights]) for one in (y, want)]
            for got, expected in zip(*gradients, strict=True):
                close(got, expected)
            results.append(y.detach())
        return results

    with planted(cost_model()):
        virtual_world(2).run(rank)
    assert len(chosen) == 2, "once on each rank"


def test_auto_without_gradients_and_for_two_transports():
    def rank(me):
        calls = [Rank(me), Rank(me)]
        for call in calls:
            with torch.no_grad():
                close(call(tokens(16), schedule="auto"), call(tokens(16)))
            call(tokens(16), schedule="auto")

    with planted(cost_model()):
        virtual_world(2).run(rank)


def test_steps_count_from_the_opening():
    """Rank 0 fails after a step, when rank 1 is in the next one already: reopened, both begin anew, as layers do."""

    def rank(me):
        call = Rank(me)
        before = call(tokens(6)).detach()
        me.barrier()
        if me.rank == 0:
            call.transport.close("an error after the step")
        else:
            with pytest.raises(RemoteAbort, match="after the step"):
                call(tokens(6))
        call.transport.reopen()
        for _ in range(3):
            same_bits(call(tokens(6)).detach(), before)

    virtual_world(2).run(rank)


@pytest.mark.parametrize("schedule", ["auto", "serial"])
def test_one_rank_runs_its_ops_in_a_row_and_equals_the_executor(schedule):
    layer = make()
    x = tokens(9).requires_grad_()
    ids, weights = make_routing("with_unused", 9, E, K, seed=1, dtype=torch.float64)
    inline = moe_forward(x, ids, weights, *layer.expert_weights, schedule=schedule)
    executed = moe_forward(x, ids, weights, *layer.expert_weights, schedule="chunked(1)")
    same_bits(inline.detach(), executed.detach())
    assert "Keep" in type(inline.grad_fn).__name__ and "Stage" in type(executed.grad_fn).__name__
    inputs = [x, *layer.expert_weights]
    for got, want in zip(torch.autograd.grad(inline.square().sum(), inputs),
                         torch.autograd.grad(executed.square().sum(), inputs), strict=True):  # fmt: skip
        same_bits(got, want)
