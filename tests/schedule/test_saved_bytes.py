"""What a step keeps for backward, in bytes: the figures that stand in the docstrings of `Saved` and `DistinctSaved`."""

from __future__ import annotations

import pytest
import torch

from moe_overlap.layer.experts import w_in_rows
from moe_overlap.layer.functional import moe_forward
from tests.ranks import virtual_world

D, F, E, T = 8, 12, 8, 64


def saved_bytes(me, top_k, dtype, **options):
    """Bytes of all that one rank's call saves, without the experts' weights and the digest of its routing; and the
    rows that its experts have, own and others', and of which tokens."""
    draw = torch.Generator().manual_seed(me.rank)
    ids = torch.rand(T, E, generator=draw).topk(top_k).indices
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(T, top_k, generator=draw, dtype=wide).requires_grad_()
    local = E // me.world_size
    w_in = torch.randn(local, w_in_rows("swiglu", F), D).to(dtype).requires_grad_()
    w_out = torch.randn(local, D, F).to(dtype).requires_grad_()
    x = torch.randn(T, D).to(dtype).requires_grad_()
    seen = []

    def keep(tensor):
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = moe_forward(x, ids, weights, w_in, w_out, transport=me.transport(), **options)
    shared = {w_in.data_ptr(), w_out.data_ptr()}
    digest, *kept = [tensor for tensor in seen if tensor.data_ptr() not in shared]
    assert digest.dtype == torch.int64 and digest.numel() <= 4
    y.sum().backward()
    return sum(tensor.numel() * tensor.element_size() for tensor in kept), ids


def on_rank(ids, rank, world):
    """bool [W * T, K]: the choices of all ranks that fall on this one."""
    return torch.cat(ids).div(E // world, rounding_mode="floor") == rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "top_k", "schedule"), [(2, 4, "chunked(2)"), (4, 3, "chunked(2,experts)")])
@pytest.mark.parametrize("dedup", ["off", "on"])
def test_saved_bytes_are_those_of_the_docstring(dedup, world, top_k, schedule, dtype):
    found = virtual_world(world).run(lambda me: saved_bytes(me, top_k, dtype, schedule=schedule, dedup=dedup))
    element, weight, h = dtype.itemsize, max(4, dtype.itemsize), w_in_rows("swiglu", F)
    for rank, (measured, _) in enumerate(found):
        here = on_rank([ids for _, ids in found], rank, world)
        slots, rows, distinct = T * top_k, int(here.sum()), int(here.any(dim=1).sum())
        if dedup == "off":
            expected = slots * (D * element + 8 + weight) + rows * (D + h) * element
        else:
            expected = slots * 4 + rows * h * element + distinct * (D * element + top_k * (4 + weight))
        assert measured == expected


def test_a_slot_keeps_less_where_rows_are_distinct():
    """bfloat16, top-4 of 8 experts on two ranks: 0.5 distinct rows a slot where all tokens are on both ranks."""

    def per_slot(dedup):
        sizes = virtual_world(2).run(lambda me: saved_bytes(me, 4, torch.bfloat16, schedule="chunked(2)", dedup=dedup))
        return sum(size for size, _ in sizes) / (2 * T * 4)

    h = w_in_rows("swiglu", F)
    assert per_slot("off") == (2 * D + h) * 2 + 12
    assert per_slot("on") <= (h + 0.5 * D) * 2 + 4 + 0.5 * 4 * 8
