"""What `bench ops` times: each fused op beside what one would write in plain PyTorch, on the same values.

Letters as in docs/ops.md: T tokens, D hidden, F expert hidden, E experts, K experts a token, R = T * K rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moe_overlap import ops

Args = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op. `fused` and `plain` take `args`, those of `grads` (their places) with a gradient, and return one tensor
    that is compared: integers exactly, floats by `dtype`. compiles: whether torch.compile is asked for `plain` too, and
    if not, `why_not`. shape: the sizes, in words."""

    name: str
    fused: Callable[..., torch.Tensor]
    plain: Callable[..., torch.Tensor]
    args: Args
    grads: tuple[int, ...] = ()
    shape: str
    dtype: torch.dtype
    why_not: str | None = None


NAMES = ("gate_topk", "row_map", "permute", "combine", "activation", "expert_mlp")


def cases(
    *, tokens: int, hidden: int, ffn: int, experts: int, top_k: int, dtype: torch.dtype, device: torch.device
) -> list[Case]:
    """All of them, in the order in which a layer calls them, on values of one seed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / 4).to(device, of)

    logits = normal(tokens, experts, of=torch.float32)
    weights, ids, _, _ = ops.gate_topk(logits, k=top_k, renormalize=True)
    _, offs, slot_to_row, row_to_slot = ops.row_map(ids, num_experts=experts)
    rows = tokens * top_k
    slots, token_of_row = slot_to_row.flatten().long(), (row_to_slot // top_k).long()
    x, y_rows, x_rows, h = (normal(n, width) for n, width in
                            ((tokens, hidden), (rows, hidden), (rows, hidden), (rows, 2 * ffn)))  # fmt: skip
    w_in, w_out = normal(experts, 2 * ffn, hidden), normal(experts, hidden, ffn)
    ends = offs.tolist()

    def plain_gate(logits: torch.Tensor) -> torch.Tensor:
        chosen = logits.softmax(dim=-1).topk(top_k, dim=-1).values
        return chosen / chosen.sum(dim=-1, keepdim=True)

    def plain_map(ids: torch.Tensor) -> torch.Tensor:
        return ids.flatten().argsort(stable=True).argsort().view_as(ids).to(torch.int32)

    def plain_combine(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (y[slots].view(tokens, top_k, hidden) * weights[:, :, None]).sum(dim=1).to(y.dtype)

    def plain_activation(h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def plain_experts(x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor) -> torch.Tensor:
        found = [F.linear(plain_activation(F.linear(x[first:last], w_in[e])), w_out[e])
                 for e, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True))]  # fmt: skip
        return torch.cat(found)

    return [
        Case(name="gate_topk", args=(logits,), grads=(0,), plain=plain_gate,
             shape=f"T {tokens}, E {experts}, K {top_k}",
             fused=lambda logits: ops.gate_topk(logits, k=top_k, renormalize=True)[0], dtype=torch.float32),
        Case(name="row_map", args=(ids,), plain=plain_map, shape=f"T {tokens}, K {top_k}, E {experts}",
             fused=lambda ids: ops.row_map(ids, num_experts=experts)[2], dtype=torch.int32),
        Case(name="permute", args=(x,), grads=(0,), plain=lambda x: x[token_of_row], shape=f"R {rows}, D {hidden}",
             fused=lambda x: ops.permute(x, slot_to_row, offs, num_rows=rows), dtype=dtype),
        Case(name="combine", args=(y_rows, weights.detach()), grads=(0, 1), plain=plain_combine,
             shape=f"R {rows}, D {hidden}",
             fused=lambda y, weights: ops.combine(y, slot_to_row, weights), dtype=dtype),
        Case(name="activation", args=(h,), grads=(0,), plain=plain_activation, shape=f"R {rows}, 2F {2 * ffn}",
             fused=lambda h: ops.activation(h, kind="swiglu"), dtype=dtype),
        Case(name="expert_mlp", args=(x_rows, w_in, w_out), grads=(0, 1, 2), plain=plain_experts,
             shape=f"R {rows}, D {hidden}, F {ffn}, E {experts}",
             fused=lambda x, w_in, w_out: ops.expert_mlp(x, w_in, w_out, offs, kind="swiglu"),
             why_not="a loop over experts, compiled anew for every routing", dtype=dtype),
    ]  # fmt: skip
