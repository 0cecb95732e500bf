"""A rank that fails, wherever it does, lets the others know at once: long before their limit, and by name."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_overlap import MoELayer, MoeTransportError, ShortcutBlock
from moe_overlap.errors import RemoteAbort
from moe_overlap.routing import LinearRouter
from tests.ranks import gloo_pool

D, F, E = 16, 24, 12
LIMIT_S = 50.0  # of a wait; a pool's call ends after 60 s


class Planted(Exception):
    """What goes wrong on rank 0."""


class Failing(nn.Module):
    """An identity that fails on rank 0, in forward or in backward, with an error or an interrupt."""

    def __init__(self, where, error):
        super().__init__()
        self.where, self.error = where, error
        self.armed = False

    def forward(self, h):
        if self.armed and self.where == "forward" and dist.get_rank() == 0:
            raise self.error("planted")
        if self.armed and self.where == "backward":
            h = h * 1.0
            h.register_hook(self.fail)
        return h

    def fail(self, grad):
        if dist.get_rank() == 0:
            raise self.error("planted")


class FailingRouter(nn.Module):
    def __init__(self, failing):
        super().__init__()
        self.router = LinearRouter(D, E, 2, dtype=torch.float64)
        self.failing = failing

    def forward(self, x):
        return self.router(self.failing(x))


def model(place, failing):
    """Two layers with `failing` at a place."""
    torch.manual_seed(0)
    options = {"group": dist.group.WORLD, "dtype": torch.float64, "timeout_s": LIMIT_S}
    router = FailingRouter(failing) if place == "router" else None
    first, second = MoELayer(D, F, E, 2, **options), MoELayer(D, F, E, 2, router=router, **options)
    if place in ("post_norm", "backbone", "pre_norm"):
        ops = [nn.Linear(D, D, dtype=torch.float64), failing if place == "backbone" else nn.Identity()]
        norms = {place: failing} if place != "backbone" else {}
        return nn.Sequential(ShortcutBlock(ops, first, tap=0, slot=1, **norms), second)
    between = [failing] if place == "between" else []
    if place == "shared":
        first = MoELayer(D, F, E, 2, shared_expert=failing, **options)
    return nn.Sequential(first, *between, second)


def fail(place, where, name):
    error = {"Planted": Planted, "KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}[name]
    failing = Failing(where, error)
    made = model(place, failing)
    h = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    made(h).sum().backward()
    failing.armed = True
    dist.barrier()
    begin = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(error):
            made(h).sum().backward()
        time.sleep(0.1)
        seen = ""
    else:
        with pytest.raises((MoeTransportError, ValueError)) as caught:
            made(h).sum().backward()
        peer = getattr(caught.value, "peer", 0)
        assert isinstance(caught.value, ValueError) or peer == 0, caught.value
        seen = str(caught.value)
    taken = time.monotonic() - begin
    dist.barrier()
    failing.armed = False
    for layer in made.modules():
        if isinstance(layer, MoELayer):
            layer.transport.reopen()
    made(h).sum().backward()
    return taken, seen


PLACES = [
    ("router", "forward", "Planted"),
    ("router", "forward", "KeyboardInterrupt"),
    ("router", "backward", "Planted"),
    ("router", "backward", "KeyboardInterrupt"),
    ("shared", "forward", "Planted"),
    ("shared", "forward", "SystemExit"),
    ("shared", "backward", "Planted"),
    ("pre_norm", "forward", "Planted"),
    ("post_norm", "forward", "Planted"),
    ("post_norm", "forward", "KeyboardInterrupt"),
    ("post_norm", "backward", "Planted"),
    ("backbone", "forward", "KeyboardInterrupt"),
    ("backbone", "backward", "Planted"),
    ("between", "backward", "Planted"),
    ("between", "backward", "KeyboardInterrupt"),
]


@pytest.mark.parametrize(("place", "where", "name"), PLACES)
def test_the_peers_of_a_rank_that_fails_learn_of_it_at_once(place, where, name):
    """They would wait for 50 s. And the group can be opened again."""
    results = gloo_pool(3).run(fail, place, where, name)
    for taken, seen in results[1:]:
        assert taken < LIMIT_S / 2, (taken, seen)
        assert "rank 0" in seen, seen


def interrupted_while_it_waits():
    """Ctrl-C in the agreement, while the others have not come."""
    import _thread
    import signal
    import threading

    torch.manual_seed(0)
    layer = MoELayer(D, F, E, 2, group=dist.group.WORLD, dtype=torch.float64, timeout_s=LIMIT_S)
    h = torch.randn(6, D, dtype=torch.float64)
    layer(h)
    if dist.get_rank() == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        threading.Timer(0.5, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            layer(h)
        dist.barrier()
        dist.barrier()
        return 0.0
    dist.barrier()  # rank 0 is out of it
    begin = time.monotonic()
    with pytest.raises(RemoteAbort, match="rank 0: KeyboardInterrupt") as caught:
        layer(h)
    assert caught.value.peer == 0
    dist.barrier()
    return time.monotonic() - begin


def test_an_interrupt_in_the_agreement():
    assert max(gloo_pool(2).run(interrupted_while_it_waits)) < LIMIT_S / 2
