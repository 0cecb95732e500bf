"""The paths of a layer's call, for the tests of what all of them have in common."""

from __future__ import annotations

import torch
from torch import nn

from moe_overlap import ShortcutBlock
from moe_overlap.layer.functional import moe_forward
from tests.layers import D, make, tokens
from tests.ranks import virtual_world

PATHS = ["inline", "scheduled", "ranks", "functional", "functional ranks", "tickets", "block", "deduplicated",
         "deduplicated block", "deduplicated tickets", "ahead block", "early block"]  # fmt: skip
ONE_RANK = ("inline", "scheduled", "functional")
TRANSPARENT = ("inline", "functional")  # one rank's ops in a row: grad and vjp of torch.func see through them
MODULES = ("inline", "scheduled", "ranks", "block", "deduplicated", "deduplicated block", "ahead block", "early block")


class Call:
    """x -> y on one of the paths. `module`: what is called, where it is one; `weights`: the experts'. make_router:
    makes the router of each rank's layer."""

    def __init__(self, path, me, make_router=None, **options):
        if make_router is not None:
            torch.manual_seed(5)
            options["router"] = make_router()
        transport = None if path in ONE_RANK else me.transport()
        if path not in ("inline", "functional", "functional ranks") and not path.endswith("block"):
            options["schedule"] = "chunked(2)"
        if path.startswith("deduplicated"):
            options = {"dedup": "on", "top_k": 4, **options}
        self.path, self.transport = path, transport
        self.layer = self.module = make(transport, **options)
        self.weights = self.layer.expert_weights
        if path.endswith("block"):
            ahead = {"ahead": {"ahead": 1}, "early": {"tap": 1, "router_tap": 0}}.get(path.split()[0], {})
            self.module = ShortcutBlock([nn.Identity()], self.layer, **{"tap": 0, "slot": 0, **ahead})

    def __call__(self, x, **given):
        """`given`: what the layer's router takes beside x."""
        if self.path in MODULES:
            return self.module(x, **given)
        if self.path.endswith("tickets"):
            ticket = self.layer.begin(x, **given)
            self.layer.run_experts(ticket)
            return self.layer.finish(ticket)
        fits = x.is_floating_point() and x.shape[-1] == D and x.device.type == "cpu"
        routing = self.layer.router(x if fits else tokens(len(x)), **given)
        y = moe_forward(x, routing.topk_ids_TK, routing.topk_weights_TK, *self.weights, transport=self.transport,
                        zero_experts=routing.zero_experts)  # fmt: skip
        return y if routing.state is None else (y, routing.state)

    def routed(self, x, y):
        """What came from the experts: a block adds its input."""
        return y - x if self.path.endswith("block") else y


def on(path, check, **options):
    """`check(call)` on every rank of the path's world."""
    if path in ONE_RANK:
        return [check(Call(path, None, **options))]
    return virtual_world(2).run(lambda me: check(Call(path, me, **options)))


def gradients(call, loss, *more):
    return torch.autograd.grad(loss, [*more, *call.layer.parameters()])
