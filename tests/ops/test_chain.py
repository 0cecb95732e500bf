"""gate -> row_map -> permute -> expert_mlp -> combine: the whole layer of one rank, against the dense oracle."""

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from moe_overlap.ops import workspace
from tests import oracle, tolerances
from tests.ops.cases import DTYPES, KINDS, hard_ids, randn, routed, weights
from tests.strategies import ROUTINGS, make_routing


def experts_of(x: Tensor, ids: Tensor, router_weights: Tensor, w_in: Tensor, w_out: Tensor, kind: str) -> Tensor:
    maps = routed(ids, w_in.shape[0])
    rows = ops.permute(x, maps.slot_to_row, maps.offs, num_rows=maps.num_rows)
    return ops.combine(ops.expert_mlp(rows, w_in, w_out, maps.offs, kind=kind), maps.slot_to_row, router_weights)


def layer(x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor, kind: str = "swiglu") -> Tensor:
    logits = (x.double() if x.dtype == torch.float64 else x.float()) @ router.T
    router_weights, ids, _, _ = ops.gate_topk(logits, k=2, renormalize=True)
    return experts_of(x, ids, router_weights, w_in, w_out, kind)


def inputs(
    tokens: int, dtype: torch.dtype = torch.float64, kind: str = "swiglu", hidden: int = 6, ffn: int = 5
) -> list:
    router = randn(4, hidden, seed=7, dtype=torch.float64 if dtype == torch.float64 else torch.float32, grad=True)
    return [randn(tokens, hidden, dtype=dtype, grad=True), router, *weights(4, hidden, ffn, kind, dtype, grad=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", [*ROUTINGS, *hard_ids()])
def test_equals_the_dense_oracle(dtype, kind, routing, poison) -> None:
    router_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if routing in ROUTINGS:
        ids, router_weights = make_routing(routing, 19, 4, 2, dtype=router_dtype)
    else:
        ids = hard_ids()[routing]
        router_weights = randn(*ids.shape, dtype=router_dtype)
    router_weights.requires_grad_()
    w_in, w_out = weights(4, 6, 5, kind, dtype, grad=True)
    x = randn(ids.shape[0], 6, dtype=dtype, grad=True)
    values = (x, router_weights, w_in, w_out)
    got = experts_of(x, ids, router_weights, w_in, w_out, kind)
    want = oracle.moe(x, ids, router_weights, w_in, w_out, kind)
    tolerances.close(got, want)
    push = randn(*got.shape, dtype=dtype, seed=8)
    gradients = torch.autograd.grad(got, values, push)
    wanted = torch.autograd.grad(want, values, push.double())
    for have, should in zip(gradients, wanted, strict=True):
        tolerances.close(have, should, dtype)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_gradcheck(tokens) -> None:
    assert torch.autograd.gradcheck(layer, inputs(tokens))


def test_the_two_places_for_router_weights_agree() -> None:
    x, _, w_in, w_out = inputs(9)
    ids, router_weights = make_routing("with_unused", 9, 4, 2, dtype=torch.float64)
    maps = routed(ids, 4)
    row_to_token = maps.row_to_slot.div(2, rounding_mode="floor").int()
    scale = router_weights.reshape(-1)[maps.row_to_slot.clamp(min=0).long()]
    rows = ops.expert_mlp(x, w_in, w_out, maps.offs, kind="swiglu", row_to_token=row_to_token, row_scale=scale)
    got = ops.combine(rows, maps.slot_to_row)
    want = experts_of(x, ids, router_weights, w_in, w_out, "swiglu")
    tolerances.close(got, want)
    for have, should in zip(
        torch.autograd.grad(got.square().sum(), (x, w_in, w_out)),
        torch.autograd.grad(want.square().sum(), (x, w_in, w_out)),
        strict=True,
    ):
        tolerances.close(have, should)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_run_after_run_the_same_bits_also_with_recycled_memory(dtype) -> None:
    values = inputs(256, dtype, hidden=256, ffn=512)
    push = randn(256, 256, dtype=dtype, seed=8)
    first, before = None, workspace.POOL.stats().reused
    for _ in range(4):
        y = layer(*values)
        now = [y.detach().clone(), *(grad.clone() for grad in torch.autograd.grad(y, values, push))]
        first = first or now
        for have, should in zip(now, first, strict=True):
            tolerances.same_bits(have, should)
        del y
    assert workspace.POOL.stats().reused > before


def test_gradients_accumulate_and_survive_the_next_step() -> None:
    values = inputs(64, torch.float32, hidden=256, ffn=512)
    layer(*values).sum().backward()
    kept = [value.grad for value in values]
    copies = [grad.clone() for grad in kept]
    for value in values:
        value.grad = None
    for _ in range(3):
        (3 * layer(*values)).sum().backward()
    for grad, copy in zip(kept, copies, strict=True):
        tolerances.same_bits(grad, copy)


def test_autocast() -> None:
    values = inputs(32, torch.float32, hidden=16, ffn=24)
    x, router, w_in, w_out = values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(x.detach(), router)
        assert logits.dtype == torch.bfloat16
        router_weights, ids, _, _ = torch.ops.moe_overlap.gate_topk(logits, None, 2, 1, 1, "softmax", False, 1.0)
        assert router_weights.dtype == torch.float32
        maps = routed(ids, 4)
        rows = ops.permute(x, maps.slot_to_row, maps.offs, num_rows=maps.num_rows)
        y = ops.expert_mlp(rows, w_in, w_out, maps.offs, kind="swiglu")
        assert rows.dtype == torch.float32 and y.dtype == torch.bfloat16
        assert ops.grouped_mm(rows, w_in, maps.offs).dtype == torch.bfloat16
        out = ops.combine(y, maps.slot_to_row, router_weights)
    want = oracle.moe(x, ids, router_weights.detach(), w_in, w_out)
    tolerances.close(out, want)
    gradients = torch.autograd.grad(out.float().square().sum(), values[:1] + values[2:])
    wanted = torch.autograd.grad(want.square().sum(), values[:1] + values[2:])
    for have, should in zip(gradients, wanted, strict=True):
        assert have.dtype == torch.float32
        tolerances.close(have, should, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = ops.expert_mlp(rows.double(), w_in.double(), w_out.double(), maps.offs, kind="swiglu")
        assert exact.dtype == torch.float64  # as torch does


def test_compiles_in_one_graph_forward_and_backward() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (12, 7, 0):
        values = inputs(tokens, torch.float32)
        push = randn(tokens, 6, dtype=torch.float32, seed=8)
        got, want = compiled(*values), layer(*values)
        tolerances.close(got, want)
        gradients, wanted = torch.autograd.grad(got, values, push), torch.autograd.grad(want, values, push)
        for have, should in zip(gradients, wanted, strict=True):
            tolerances.close(have, should)
    with torch.no_grad():
        tolerances.close(compiled(*inputs(5, torch.float32)), layer(*inputs(5, torch.float32)))


def test_compiles_under_autocast() -> None:
    torch._dynamo.reset()

    def experts(x: Tensor, w_in: Tensor, w_out: Tensor, offs: Tensor) -> Tensor:
        return ops.expert_mlp(x, w_in, w_out, offs, kind="gelu")

    x, (w_in, w_out) = randn(8, 6, dtype=torch.float32), weights(2, 6, 5, "gelu", torch.float32)
    offs = torch.tensor([3, 8], dtype=torch.int32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.compile(experts, fullgraph=True, backend="aot_eager")(x, w_in, w_out, offs)
        want = experts(x, w_in, w_out, offs)
    tolerances.same_bits(got, want)
