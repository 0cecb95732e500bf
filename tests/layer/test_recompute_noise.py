"""Noisy routers under activation checkpointing: torch's checkpoint keeps the state of the random numbers, so that a
recompute draws the same noise and routes alike; where it may not, a layer refuses another routing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from moe_overlap import ConfigError, MoELayer
from moe_overlap.errors import MoeTransportError
from moe_overlap.routing import LinearRouter, SwitchRouter
from tests.layers import D, E, F, tokens
from tests.ranks import Ranks, gloo_pool

K = 2


class NoisyTopK(LinearRouter):
    """Noisy top-k gating (arXiv 1701.06538, eq. 4): normal noise on the logits, of learned size."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.noise = nn.Parameter(0.3 * torch.randn(E, D, dtype=self.weight.dtype))

    def _logits(self, x_TD):
        return super()._logits(x_TD) + torch.randn(len(x_TD), E) * nn.functional.softplus(x_TD @ self.noise.t())


class Jumping(nn.Module):
    """A router that is no function of its input and of torch's random numbers."""

    def __init__(self):
        super().__init__()
        self.inner = LinearRouter(D, E, K, dtype=torch.float64)
        self.calls = 0

    def forward(self, x_TD):
        self.calls += 1
        decision = self.inner(x_TD)
        return replace(decision, topk_ids_TK=(decision.topk_ids_TK + self.calls) % E)


ROUTERS = {
    "noisy top-k": lambda: NoisyTopK(D, E, K, dtype=torch.float64),
    "jitter": lambda: SwitchRouter(D, E, K, jitter=0.9, capacity_factor=None, dtype=torch.float64),
    "jumping": Jumping,
}


def run(name, kind, schedule, group=None):
    """kind: "plain", "kept" (random numbers), "lost". -> gradients, or what the error is about."""
    torch.manual_seed(3)
    layer = MoELayer(D, F, E, K, group=group, schedule=schedule, router=ROUTERS[name](), dtype=torch.float64)
    x = tokens(30).requires_grad_()
    torch.manual_seed(11)
    if kind == "plain":
        y = layer(x)
    else:
        y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=kind == "kept")
    # Noise of somebody else's between forward and recompute.
    torch.randn(17)
    try:
        return [grad.tolist() for grad in torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]
    except ConfigError as error:
        return error.field
    except CheckpointError:
        return "shapes"
    except MoeTransportError:
        return "peer"


def run_in_group(name, kind, schedule):
    return run(name, kind, schedule, torch.distributed.group.WORLD)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
@pytest.mark.parametrize("name", ["noisy top-k", "jitter"])
def test_noise_is_replayed(name, schedule, ranks):
    def results(kind):
        return [run(name, kind, schedule)] if ranks == 1 else gloo_pool(2).run(run_in_group, name, kind, schedule)

    plain = results("plain")
    assert results("kept") == plain and isinstance(plain[0], list)


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
@pytest.mark.parametrize(("name", "kind"), [("noisy top-k", "lost"), ("jitter", "lost"), ("jumping", "kept")])
def test_a_recompute_that_routes_otherwise_is_refused(name, kind, schedule):
    assert run(name, kind, schedule) == "routing"


@pytest.mark.parametrize(("name", "kind"), [("noisy top-k", "lost"), ("jumping", "kept")])
def test_and_on_several_ranks_no_rank_gets_gradients(name, kind):
    """Where a recompute receives another number of rows, torch's checkpoint refuses it before the layer does, and one
    rank's refusal ends the exchanges of the other. In a world of its own, whose connections that closes."""
    with Ranks(2) as world:
        world.start(run_in_group, name, kind, "serial")
        about = [rank.value for rank in world.wait()]
    assert set(about) <= {"routing", "shapes", "peer"} and about != ["peer", "peer"]
