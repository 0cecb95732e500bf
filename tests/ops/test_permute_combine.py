"""permute and combine against the oracle of their contract: a Python loop in float64."""

import contextlib

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import registry
from tests import tolerances
from tests.ops.cases import DTYPES, cpu_implementations, hard_ids, randn, routed
from tests.strategies import ROUTINGS, make_routing

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(params=cpu_implementations("combine"), autouse=True)
def implementation(request):
    """The references, or what runs by default where there is a compiled part."""
    with contextlib.ExitStack() as forced:
        for op in ("permute", "combine", "combine_backward") if request.param == "reference" else ():
            forced.enter_context(registry.force(op, "reference"))
        yield


def python_combine(y: Tensor, slot_to_row: Tensor, weights: Tensor | None, residual: Tensor | None) -> Tensor:
    rows = []
    for t, row_of_k in enumerate(slot_to_row.tolist()):
        total = torch.zeros(y.shape[1], dtype=torch.float64) + 0 * y.double()[:0].sum()  # y stays in the graph
        for k, row in enumerate(row_of_k):
            if row >= 0:
                total = total + (1.0 if weights is None else weights[t, k].double()) * y[row].double()
        rows.append(total if residual is None else total + residual[t].double())
    return torch.stack(rows) if rows else y.double()[:0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hard_ids())
@pytest.mark.parametrize("align, extra", [(1, 0), (4, 0), (1, 5)])
def test_permute_copies_each_token_to_its_rows_and_zeroes_the_rest(dtype, name, align, extra) -> None:
    maps = routed(hard_ids()[name], 4, align=align)
    x = randn(maps.ids_TK.shape[0], 6, dtype=dtype)
    got = ops.permute(x, maps.slot_to_row, maps.offs, num_rows=maps.num_rows + extra)
    want = torch.zeros(maps.num_rows + extra, 6, dtype=dtype)
    for t, rows in enumerate(maps.slot_to_row.tolist()):
        for row in rows:
            if row >= 0:
                want[row] = x[t]
    tolerances.same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hard_ids())
@pytest.mark.parametrize("weighted, residual", [(False, False), (True, False), (False, True), (True, True)])
def test_combine_and_its_backward(dtype, name, weighted, residual) -> None:
    maps = routed(hard_ids()[name], 4)
    tokens, k = maps.ids_TK.shape
    router_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    y = randn(maps.num_rows, 6, dtype=dtype, seed=1, grad=True)
    w = randn(tokens, k, dtype=router_dtype, seed=2, grad=True) if weighted else None
    r = randn(tokens, 6, dtype=dtype, seed=3, grad=True) if residual else None
    got, want = ops.combine(y, maps.slot_to_row, w, r), python_combine(y, maps.slot_to_row, w, r)
    assert got.dtype == dtype
    tolerances.close(got, want)
    push = randn(tokens, 6, dtype=dtype, seed=4)
    inputs = [value for value in (y, w, r) if value is not None]
    gradients = torch.autograd.grad(got, inputs, push)
    wanted = torch.autograd.grad(want, inputs, push.double(), allow_unused=True, materialize_grads=True)
    for value, have, should in zip(inputs, gradients, wanted, strict=True):
        tolerances.close(have, should, dtype)
        assert have.dtype == value.dtype


def test_permute_backward_is_the_ordered_sum_of_the_rows() -> None:
    maps = routed(hard_ids()["mixed, unused"], 4)
    x = randn(6, 5, grad=True)
    push = randn(maps.num_rows, 5, seed=1)
    push[maps.offs[-1] :] = torch.nan  # nobody's rows: their gradient must not reach anyone
    (got,) = torch.autograd.grad(ops.permute(x, maps.slot_to_row, maps.offs, num_rows=maps.num_rows), x, push)
    tolerances.close(got, python_combine(push, maps.slot_to_row, None, None))


def test_what_a_slot_without_a_row_holds_does_not_matter() -> None:
    slot_to_row = torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32)
    y = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]], requires_grad=True)
    weights = torch.tensor([[2.0, torch.nan], [torch.inf, 1.0]], requires_grad=True)
    got = ops.combine(y, slot_to_row, weights)
    assert got.tolist() == [[2.0, 4.0], [0.0, 0.0]]
    dy, dweights = torch.autograd.grad(got.sum(), (y, weights))
    assert dy.tolist() == [[2.0, 2.0], [0.0, 0.0]] and dweights.tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_sums_run_in_float32_in_the_order_of_k() -> None:
    maps = routed(torch.tensor([[2, 0, 1]], dtype=torch.int32), 3)
    y = torch.zeros(3, 1, dtype=torch.bfloat16)
    y[maps.slot_to_row[0].long(), 0] = torch.tensor([256.0, 1.0, -256.0], dtype=torch.bfloat16)
    assert ops.combine(y, maps.slot_to_row).item() == 1.0  # bf16 sums would give 0
    y = torch.zeros(3, 1)
    y[maps.slot_to_row[0].long(), 0] = torch.tensor([1e8, 1.0, -1e8])
    assert ops.combine(y, maps.slot_to_row).item() == 0.0  # k = 0, 1, 2; another order would give 1


def test_gradients_may_be_expanded_or_strided() -> None:
    maps = routed(hard_ids()["mixed, unused"], 4)
    y, w = randn(maps.num_rows, 4, seed=1), randn(6, 2, seed=2)
    base = torch.tensor(0.7, dtype=torch.float64)
    for given in (base.expand(6, 4), randn(4, 6).t(), randn(6, 8)[:, ::2]):
        got = ops.combine_backward(given, y, maps.slot_to_row, w)
        want = ops.combine_backward(given.clone(memory_format=torch.contiguous_format), y, maps.slot_to_row, w)
        for have, should in zip(got, want, strict=True):
            tolerances.same_bits(have, should)


def test_combine_backward_without_y() -> None:
    maps = routed(hard_ids()["mixed, unused"], 4)
    dy, w = randn(6, 4), randn(6, 2, seed=2)
    full, _ = ops.combine_backward(dy, randn(maps.num_rows, 4), maps.slot_to_row, w)
    half, none = ops.combine_backward(dy, None, maps.slot_to_row, w, num_rows=maps.num_rows)
    tolerances.same_bits(half, full)
    assert none is None
    with pytest.raises(ConfigError, match="num_rows"):
        ops.combine_backward(dy, None, maps.slot_to_row, w)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_round_trip_on_random_routings(kind) -> None:
    for seed in range(4):
        tokens, experts, k = 1 + 61 * seed, 5 + seed, 1 + seed
        ids, weights = make_routing(kind, tokens, experts, k, seed=seed, dtype=torch.float64)
        maps = routed(ids, experts, align=1 + 3 * (seed % 2))
        x = randn(tokens, 7, seed=seed)
        rows = ops.permute(x, maps.slot_to_row, maps.offs, num_rows=maps.num_rows)
        tolerances.close(ops.combine(rows, maps.slot_to_row, weights), x * weights.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("name", ["mixed, unused", "no tokens", "nothing used", "the same expert twice"])
def test_gradcheck(name) -> None:
    maps = routed(hard_ids()[name], 4, align=2)
    tokens, k = maps.ids_TK.shape

    def permute(x: Tensor) -> Tensor:
        return ops.permute(x, maps.slot_to_row, maps.offs, num_rows=maps.num_rows)

    assert torch.autograd.gradcheck(permute, (randn(tokens, 3, grad=True),))
    inputs = (randn(maps.num_rows, 3, grad=True), randn(tokens, k, seed=1, grad=True), randn(tokens, 3, grad=True))
    assert torch.autograd.gradcheck(lambda y, w, r: ops.combine(y, maps.slot_to_row, w, r), inputs)
    assert torch.autograd.gradgradcheck(permute, (randn(tokens, 3, grad=True),))


@pytest.mark.parametrize(
    "field, call",
    [
        ("x", lambda x, s, o: ops.permute(x.int(), s, o, num_rows=4)),
        ("x", lambda x, s, o: ops.permute(x[0], s, o, num_rows=4)),
        ("slot_to_row", lambda x, s, o: ops.permute(x, s.long(), o, num_rows=4)),
        ("slot_to_row", lambda x, s, o: ops.permute(x, s[:1], o, num_rows=4)),
        ("slot_to_row", lambda x, s, o: ops.permute(x, s, o, num_rows=2)),
        ("num_rows", lambda x, s, o: ops.permute(x, s, o, num_rows=-1)),
        ("offs", lambda x, s, o: ops.permute(x, s, o.long(), num_rows=4)),
        ("y", lambda x, s, o: ops.combine(x.bool(), s)),
        ("slot_to_row", lambda x, s, o: ops.combine(x, s)),
        ("weights", lambda x, s, o: ops.combine(torch.zeros(4, 3), s, torch.zeros(2, 3))),
        ("weights", lambda x, s, o: ops.combine(torch.zeros(4, 3), s, torch.zeros(2, 2).bfloat16())),
        ("residual", lambda x, s, o: ops.combine(torch.zeros(4, 3), s, None, torch.zeros(2, 4))),
    ],
)
def test_bad_arguments(field, call) -> None:
    slot_to_row = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    with pytest.raises(ConfigError) as caught:
        call(torch.zeros(2, 3), slot_to_row, torch.tensor([4], dtype=torch.int32))
    assert caught.value.field == field
