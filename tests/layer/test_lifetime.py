"""What outlives a call: steps and their buffers are freed, and a layer works on after errors."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, MoELayer, RemoteAbort, ShortcutBlock, moe_forward
from moe_overlap.schedule.run import Step
from moe_overlap.transport.local import LocalTransport
from tests.ranks import virtual_world
from tests.tolerances import same_bits

D, F, E, K = 16, 24, 8, 2


def make(transport=None, **options):
    torch.manual_seed(3)
    return MoELayer(D, F, E, K, transport=transport, **{"dtype": torch.float64, "schedule": "chunked(2)", **options})


def tokens(count=6, seed=0):
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def alive(monkeypatch):
    """The steps that exist."""
    made = weakref.WeakSet()

    class Counted(Step):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.add(self)

    monkeypatch.setattr("moe_overlap.layer.layer.Step", Counted)
    monkeypatch.setattr("moe_overlap.layer.functional.Step", Counted)
    return made


def trained(layer):
    layer(tokens().requires_grad_()).sum().backward()


def only_forward(layer):
    layer(tokens().requires_grad_())


def checkpointed(layer):
    """The recompute ends inside the last action, as nothing after it is saved."""
    checkpoint(layer, tokens().requires_grad_(), use_reentrant=False).sum().backward()


def refused(layer):
    with pytest.raises(ConfigError):
        layer(tokens() * float("nan"))


def failed_in_the_middle(layer):
    layer.shared_expert.forward = None
    with pytest.raises(TypeError):
        layer(tokens())
    layer.transport.reopen()


def part_of_the_gradients(layer):
    """The router's weight needs Ut only: the entry's backward, which frees the buffers, never runs."""
    torch.autograd.grad(layer(tokens().requires_grad_()).sum(), layer.router.weight)


@pytest.mark.parametrize(
    "use", [trained, only_forward, checkpointed, refused, failed_in_the_middle, part_of_the_gradients]
)
def test_steps_do_not_pile_up(use, alive):
    layer = make(shared_expert_size=F)
    for _ in range(8):
        use(layer)
    gc.collect()
    assert len(alive) <= 2, "the layer itself may hold the last call"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_of_a_block_and_of_tickets_do_not_pile_up(checkpointing, alive):
    block = ShortcutBlock([nn.Linear(D, D, dtype=torch.float64), torch.tanh], make(schedule="serial"), tap=0, slot=1)
    for _ in range(8):
        x = tokens().requires_grad_()
        y = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        ticket = block.moe.begin(y)
        block.moe.run_experts(ticket)
        block.moe.finish(ticket).sum().backward()
    del ticket
    gc.collect()
    assert len(alive) <= 2


def bad_logits(me, layer):
    with pytest.raises(ConfigError, match="logits"):
        layer(tokens().requires_grad_() * (float("nan") if me.rank == 0 else 1))


def a_router_that_raises(me, layer):
    layer.router.forward = None
    with pytest.raises(TypeError):
        layer(tokens().requires_grad_())
    del layer.router.forward
    me.barrier()  # all have heard it: who reopens breaks off what others still wait for
    layer.transport.reopen()


def a_peer_that_gives_up(me, layer):
    me.barrier()  # nobody is in the step before it
    if me.rank == 0:
        layer.transport.close("it gave up")
    else:
        with pytest.raises(RemoteAbort):
            layer(tokens().requires_grad_())
    layer.transport.reopen()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("use", [bad_logits, a_router_that_raises, a_peer_that_gives_up])
def test_steps_that_ranks_do_not_agree_on_do_not_pile_up(use, overlap, alive):
    def rank(me):
        layer = make(me.transport(), overlap=overlap)
        for _ in range(8):
            trained(layer)
            use(me, layer)
        trained(layer)
        me.barrier()
        gc.collect()
        return len(alive)

    assert max(virtual_world(2).run(rank)) <= 2, "each layer may hold its last call"


def test_steps_of_the_functional_form_with_bad_ids_do_not_pile_up(alive):
    ids, weights = torch.arange(12, dtype=torch.int32).reshape(6, K) % E, torch.ones(6, K, dtype=torch.float64)

    def rank(me):
        transport, w = me.transport(), [one.detach().requires_grad_() for one in make(me.transport()).expert_weights]
        for _ in range(8):
            with pytest.raises(ConfigError):
                moe_forward(tokens().requires_grad_(), ids + E * me.rank, weights, *w, transport=transport)
        me.barrier()
        gc.collect()
        return len(alive)

    assert max(virtual_world(2).run(rank)) <= 2


def test_a_step_after_its_forward_does_not_hold_cast_weights():
    """Under autocast these are copies: they must not stay until the next call."""
    layer = make(dtype=torch.float32)
    before = {id(o) for o in gc.get_objects() if type(o) is torch.Tensor}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(tokens().float().requires_grad_())
    y.sum().backward()
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and id(o) not in before]
    copies = [o for o in tensors if o.dtype == torch.bfloat16 and o.dim() == 3]
    assert not copies


def test_one_rank_whose_loss_reaches_the_input_only_and_whose_output_is_gone():
    layer = make(aux_loss_coef=0.1)
    x = tokens().requires_grad_()
    layer(x)
    layer.take_aux_loss().backward()
    assert x.grad.any() and layer.router.weight.grad.any()
    assert all(weight.grad is None for weight in layer.expert_weights)


def test_buffers_of_an_unfinished_backward_are_not_taken_for_those_of_the_next():
    layer = make(transport=LocalTransport(), aux_loss_coef=0.1)
    x = tokens().requires_grad_()
    y = layer(x)
    torch.autograd.grad(y.sum(), layer.router.weight, retain_graph=True)
    layer.take_aux_loss().backward()
    for weight in layer.expert_weights:
        assert not weight.grad.any(), "the auxiliary loss does not depend on the experts"
    del y


# ---------------------------------------------------------------- after errors


def test_steps_are_counted_from_the_opening():
    """Rank 0 fails after a step, when rank 1 is in the next one already: reopened, both begin anew."""

    def rank(me):
        layer = make(me.transport())
        before = layer(tokens())
        me.barrier()
        if me.rank == 0:
            layer.transport.close("an error after the step")
        else:
            with pytest.raises(RemoteAbort, match="after the step"):
                layer(tokens())
        layer.transport.reopen()
        same_bits(layer(tokens()), before)

    virtual_world(2).run(rank)


def test_a_failed_or_lost_ticket_does_not_block_the_layer():
    def rank(me, lost):
        layer = make(me.transport())
        ticket = layer.begin(tokens())
        me.barrier()
        if lost:
            layer.transport.close("an error of the caller between the stages")
            del ticket
        else:
            layer.transport.close("an error elsewhere")
            with pytest.raises(RuntimeError, match="error"):
                layer.run_experts(ticket)
            with pytest.raises(RuntimeError, match="this ticket is failed"):
                layer.finish(ticket)
        layer.transport.reopen()
        again = layer.begin(tokens())
        layer.run_experts(again)
        same_bits(layer.finish(again), layer(tokens()))

    for lost in (False, True):
        virtual_world(2).run(lambda me, lost=lost: rank(me, lost))


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_a_layer_can_be_copied_after_a_call(schedule):
    def rank(me):
        layer = make(me.transport(), schedule=schedule, aux_loss_coef=0.1)
        y = layer(tokens().requires_grad_())
        twin = copy.deepcopy(layer)
        assert twin.transport is layer.transport and twin.take_aux_loss() is None
        assert all(a is not b for a, b in zip(twin.parameters(), layer.parameters(), strict=True))
        same_bits(twin(tokens()), y)
        y.sum().backward()
        assert twin.experts.down_proj.grad is None and layer.experts.down_proj.grad is not None

    virtual_world(2).run(rank)
    copy.deepcopy(make(schedule=schedule))(tokens())


def test_a_copy_does_not_wait_for_the_ticket_of_the_layer():
    def rank(me):
        layer = make(me.transport())
        want = layer(tokens())
        ticket = layer.begin(tokens())
        twin = copy.deepcopy(layer)
        with pytest.raises(RuntimeError, match="finish it"):
            layer.begin(tokens())
        other = twin.begin(tokens())
        for owner, one in ((layer, ticket), (twin, other)):
            owner.run_experts(one)
            same_bits(owner.finish(one), want)

    virtual_world(2).run(rank)


def test_an_error_of_a_users_op_reaches_the_peers_at_once_and_reopen_mends():
    def rank(me):
        block = ShortcutBlock(
            [nn.Identity(), nn.Linear(D, D, dtype=torch.float64)],
            make(me.transport(), schedule="serial"),
            tap=0,
            slot=1,
        )
        before = block(tokens())
        forward = block.backbone[1].forward
        block.backbone[1].forward = None if me.rank == 0 else forward
        with pytest.raises(TypeError if me.rank == 0 else RemoteAbort) as caught:
            block(tokens())
        assert me.rank == 0 or "B1: TypeError" in str(caught.value)
        block.backbone[1].forward = forward
        block.moe.transport.reopen()
        same_bits(block(tokens()), before)

    for seed in range(3):
        virtual_world(2, seed=seed).run(rank)
