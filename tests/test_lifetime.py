"""What outlives a call: steps and their buffers are freed, and a layer works on after errors."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, MoELayer, ShortcutBlock
from moe_overlap.schedule.run import Step
from moe_overlap.transport.local import LocalTransport

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

    monkeypatch.setattr("moe_overlap.layer.Step", Counted)
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
    block = ShortcutBlock([nn.Linear(D, D, dtype=torch.float64), torch.tanh], make(), tap=0, slot=1)
    for _ in range(8):
        x = tokens().requires_grad_()
        y = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        ticket = block.moe.begin(y)
        block.moe.run_experts(ticket)
        block.moe.finish(ticket).sum().backward()
    del ticket
    gc.collect()
    assert len(alive) <= 2


def test_a_step_after_its_forward_does_not_hold_cast_weights():
    """Under autocast these are copies: they must not stay until the next call."""
    layer = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(tokens().float().requires_grad_())
    y.sum().backward()
    gc.collect()
    copies = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.bfloat16 and o.dim() == 3]
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
