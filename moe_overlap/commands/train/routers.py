"""`--router`: the router of a MoE layer and what keeps it balanced, from the options of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_overlap.commands.train.options import TrainOptions
from moe_overlap.routing import (
    HashRouter,
    LinearRouter,
    LocMoEPlusRouter,
    LocMoERouter,
    SmileRouter,
    SwitchRouter,
)

Z_LOSS_COEF = 0.001


def router_options(options: TrainOptions) -> dict[str, Any]:
    """What a layer of this run is given for its router."""
    sizes: dict[str, Any] = {"hidden_size": options.hidden, "num_experts": options.experts, "top_k": options.top_k}
    if options.router == "hash":
        return {"router": HashRouter(options.vocab, options.experts, options.top_k, seed=options.seed % 2**63)}
    if options.router == "smile":
        coef = options.coefficient
        return {"router": SmileRouter(**sizes, num_nodes=options.nodes, alpha=coef, beta=coef, balance=options.balance)}
    balance: dict[str, Any] = {"balance": options.balance, "aux_loss_coef": options.coefficient}
    if options.balance == "loss-free":  # whose bias is an option of the router
        balance = {"bias": True, "aux_loss_coef": 0.0, "balance": "micro"}
    balance["z_loss_coef"] = Z_LOSS_COEF
    if options.router == "switch":
        return {"router": SwitchRouter(**sizes, **balance)}
    if options.router.startswith("locmoe"):
        locality: dict[str, Any] = {"mu": options.mu, "locality_bias": options.nodes if options.locality_bias else None}
        kind = {"locmoe": LocMoERouter, "locmoe+": LocMoEPlusRouter}[options.router]
        return {"router": kind(**sizes, gate="linear", **locality, **balance)}
    return {"router": LinearRouter(**sizes, **balance)} if options.balance == "loss-free" else balance


def give_tokens(model: nn.Module, tokens_BS: torch.Tensor) -> None:
    """Tell the hash routers which tokens come: once for each forward, before it."""
    for module in model.modules():
        if isinstance(module, HashRouter):
            module.give(tokens_BS)
