"""The dense oracle: one mixture-of-experts layer, token by token and expert by expert, in float64.

Nothing of the package is used, so that both can only agree by being right. Differentiable in everything that is float.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def mlp(x_D: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
    """One expert on rows: down(act(up(x))), with silu(gate) * up for "swiglu" (w_in = [gate | up])."""
    h = x_D @ w_in.T
    if activation == "swiglu":
        gate, up = h.tensor_split(2, dim=-1)
        return (functional.silu(gate) * up) @ w_out.T
    return {"gelu": functional.gelu, "relu": functional.relu}[activation](h) @ w_out.T


def moe(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: str = "swiglu",
) -> Tensor:
    """y[t] = sum over k of weights[t, k] * expert(ids[t, k])(x[t]), float64 [T, D]; an id of -1 adds nothing."""
    x_TD, weights_TK = x_TD.double(), weights_TK.double()
    w_in, w_out = gate_up_proj.double(), down_proj.double()
    y_TD = []
    for x_D, ids, weights in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        parts = [w * mlp(x_D, w_in[i], w_out[i], activation) for i, w in zip(ids, weights, strict=True) if i >= 0]
        y_TD.append(sum(parts, torch.zeros_like(x_D)))
    # The zero keeps every input in the graph, also with no tokens or no experts used.
    nothing = 0 * (x_TD.sum() + weights_TK.sum() + w_in.sum() + w_out.sum())
    return (torch.stack(y_TD) if y_TD else x_TD) + nothing
