"""torch.library.opcheck on every operator: schema, autograd registration, fake tensors and dynamic shapes under AOT."""

import pytest
import torch

from moe_overlap import ops
from moe_overlap.ops import cuda_kernels
from tests.ops.cases import randn, routed, weights

MOE = torch.ops.moe_overlap
IDS = torch.tensor([[0, 3], [-1, 1], [3, 0], [2, -1], [-1, -1], [1, 3]], dtype=torch.int32)
MAPS = routed(IDS, 4, align=2)
W_IN, W_OUT = weights(4, 6, 5, "swiglu", torch.float32, grad=True)


def f32(*shape: int, seed: int = 0, grad: bool = True) -> torch.Tensor:
    return randn(*shape, dtype=torch.float32, seed=seed, grad=grad)


def samples() -> dict[str, tuple]:
    """name/case -> arguments"""
    rows, offs, slot_to_row = MAPS.num_rows, MAPS.offs, MAPS.slot_to_row
    no_offs = torch.zeros(4, dtype=torch.int32)
    row_to_token = torch.tensor([0, 1, -1, 5] * (rows // 4) + [2] * (rows % 4), dtype=torch.int32)
    h = f32(rows, 10, seed=3, grad=False)
    order = torch.tensor([2, 0, 1])
    gate_ids = ops.gate_topk(f32(6, 4), k=2)[1]
    everything = [True] * 4
    return {
        "gate_topk/softmax": (f32(6, 4), None, 2, 1, 1, "softmax", True, 1.0),
        "gate_topk/groups": (f32(6, 4), f32(4, grad=False), 2, 2, 1, "sigmoid", False, 2.0),
        "gate_topk/no tokens": (f32(0, 4), None, 2, 1, 1, "topk_softmax", False, 1.0),
        "gate_topk_backward/softmax": (f32(6, 2, grad=False), f32(6, 4, grad=False), gate_ids, "softmax", True, 1.0),
        "row_map/all": (IDS, 4, 0, 4, 1, None),
        "row_map/some": (IDS, 4, 1, 3, 4, 1),
        "row_map/no tokens": (IDS[:0], 4, 0, 4, 1, None),
        "permute/aligned": (f32(6, 3), slot_to_row, offs, rows),
        "permute/no tokens": (f32(0, 3), slot_to_row[:0], None, 2),
        "combine/plain": (f32(rows, 3), slot_to_row, None, None),
        "combine/all": (f32(rows, 3), slot_to_row, f32(6, 2, seed=1), f32(6, 3, seed=2)),
        "combine_backward/all": (
            f32(6, 3, grad=False),
            f32(rows, 3, grad=False),
            slot_to_row,
            f32(6, 2).detach(),
            rows,
        ),
        "combine_backward/plain": (f32(6, 3, grad=False), None, slot_to_row, None, rows),
        "activation/swiglu": (f32(rows, 10), "swiglu", f32(rows, seed=1), offs),
        "activation/gelu": (f32(rows, 10), "gelu", None, None),
        "activation_backward/swiglu": (f32(rows, 5, grad=False), h, "swiglu", f32(rows, grad=False), offs),
        "grouped_mm/transposed": (f32(rows, 6), W_IN, offs, True),
        "grouped_mm/plain": (f32(rows, 10), W_IN, offs, False),
        "grouped_mm_wgrad/plain": (f32(rows, 4, grad=False), f32(rows, 3, grad=False), offs),
        "expert_mlp/rows": (f32(rows, 6), W_IN, W_OUT, offs, "swiglu", None, f32(rows, seed=1), None),
        "expert_mlp/tokens": (f32(6, 6), W_IN, W_OUT, offs, "swiglu", row_to_token, None, 8),
        "expert_mlp/no rows": (f32(0, 6), W_IN, W_OUT, no_offs, "swiglu", None, None, None),
        "_expert_mlp/rows": (f32(rows, 6), W_IN, W_OUT, offs, "swiglu", None, None, None, True),
        "_expert_mlp_backward/all": (
            f32(rows, 6, grad=False),
            f32(rows, 6, seed=1, grad=False),
            h,
            W_IN.detach(),
            W_OUT.detach(),
            offs,
            "swiglu",
            None,
            f32(rows, grad=False),
            everything,
            8,
        ),
        "pack/plain": (f32(3, 2), order),
        "pack_backward/plain": (f32(3, 2, grad=False), order, 3),
        "unpack/plain": (f32(3, 2), order),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(MOE, name.split("/")[0]).default, samples()[name])


def test_every_operator_is_here() -> None:
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("moe_overlap::")
    }
    # The compiled ones have no kernel in a pure-Python install; test_row_map, test_cpu_gate, test_cpu_rows and
    # tests/gpu compare them.
    rows = ("row_map", "permute", "combine", "combine_backward", "activation_rows", "activation_rows_backward")
    on_cpu = (*rows, "gate_topk", "gate_topk_backward")
    compiled = {*(f"_{op}_cpp" for op in on_cpu), *map(cuda_kernels.kernel_op, cuda_kernels.OPS)}
    assert registered - compiled == {name.split("/")[0] for name in samples()}


@pytest.mark.parametrize("name", samples())
def test_the_same_arguments_give_the_same_bits(name: str, poison: None) -> None:
    op = getattr(MOE, name.split("/")[0]).default
    first, second = op(*samples()[name]), op(*samples()[name])
    for have, should in zip(*((v if isinstance(v, tuple) else (v,)) for v in (first, second)), strict=True):
        assert have.isnan().sum() == 0 and torch.equal(have, should)
