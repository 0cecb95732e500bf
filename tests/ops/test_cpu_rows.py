"""The compiled row work of a CPU against the references: the same bits where the sums are the same, else the table."""

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import registry
from moe_overlap.ops.activation import COMPILED_KINDS, backward_into, forward_into
from tests import tolerances
from tests.ops.cases import DTYPES, compiled_obstacle, hard_ids, randn, routed

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(compiled_obstacle("combine") is not None, reason=str(compiled_obstacle("combine"))),
]

WIDTHS = (0, 1, 63, 64, 65, 520)
OPS = ("combine", "combine_backward", "permute", "activation_rows", "activation_rows_backward")


def by(impl: str, op: str, call):
    with registry.force(op, impl):
        return call()


def both(op: str, call) -> list:
    return [by(impl, op, call) for impl in ("cpp", "reference")]


def same_but_for_nan(got: Tensor, want: Tensor) -> None:
    """A NaN is where the other has one; its bits are free."""
    assert torch.equal(got.isnan(), want.isnan())
    tolerances.same_bits(got.nan_to_num(nan=1.0), want.nan_to_num(nan=1.0))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hard_ids())
@pytest.mark.parametrize("width", WIDTHS)
def test_combine_has_the_bits_of_the_reference(dtype, name, width) -> None:
    maps = routed(hard_ids()[name], 4, align=2)
    tokens, k = maps.ids_TK.shape
    y = randn(maps.num_rows, width, dtype=dtype, seed=1)
    for weights in (None, randn(tokens, k, dtype=torch.float32, seed=2), randn(tokens, k, seed=2)):
        for residual in (None, randn(tokens, width, dtype=dtype, seed=3)):
            got, want = both("combine", lambda w=weights, r=residual: ops.combine(y, maps.slot_to_row, w, r))
            tolerances.same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_of_zeros_infinities_and_nan(dtype) -> None:
    nan, inf, most = torch.nan, torch.inf, torch.finfo(dtype).max
    y = torch.tensor([[-0.0, 0.0, inf, nan, most], [-0.0, -0.0, -inf, 1.0, most]], dtype=dtype)
    rows = torch.tensor([[0, -1, -1], [0, 1, -1], [-1, 1, 0], [-1, -1, -1]], dtype=torch.int32)
    for slot_to_row in (rows, rows[:, :2], rows[:, :1], rows[:, :0]):
        for weight in (1.0, -1.0, 0.0, inf, nan):
            weights = torch.full(slot_to_row.shape, weight)
            same_but_for_nan(*both("combine", lambda m=slot_to_row, w=weights: ops.combine(y, m, w)))
            same_but_for_nan(*both("combine", lambda m=slot_to_row: ops.combine(y, m, None, y[:1].expand(4, 5))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hard_ids())
@pytest.mark.parametrize("width", WIDTHS)
def test_combine_backward_and_permute(dtype, name, width) -> None:
    maps = routed(hard_ids()[name], 4, align=2)
    tokens, k = maps.ids_TK.shape
    y, dy = randn(maps.num_rows, width, dtype=dtype, seed=1), randn(tokens, width, dtype=dtype, seed=2)
    for weights in (randn(tokens, k, dtype=torch.float32, seed=3), randn(tokens, k, seed=3)):
        (dy_rows, dweights), (dy_want, dweights_want) = both(
            "combine_backward", lambda w=weights: ops.combine_backward(dy, y, maps.slot_to_row, w)
        )
        tolerances.same_bits(dy_rows, dy_want)
        # The dot products are made in the accumulation dtype whatever the rows are.
        tolerances.close(dweights, dweights_want, wide(dtype))
        assert dweights.dtype == weights.dtype
    plain = both("combine_backward", lambda: ops.combine_backward(dy, None, maps.slot_to_row, num_rows=maps.num_rows))
    tolerances.same_bits(plain[0][0], plain[1][0])
    tolerances.same_bits(*both("permute", lambda: ops.permute(dy, maps.slot_to_row, num_rows=maps.num_rows)))


def test_two_slots_on_one_row_are_refused() -> None:
    slot_to_row = torch.tensor([[0, 1], [3, 1]], dtype=torch.int32)
    dy = torch.ones(2, 3)
    for impl in ("cpp", "reference"):
        with registry.force("combine_backward", impl), registry.force("permute", impl):
            for call in (
                lambda: ops.permute(dy, slot_to_row, num_rows=4),
                lambda: ops.combine_backward(dy, None, slot_to_row, num_rows=4),
                lambda: ops.combine_backward(dy, torch.ones(4, 3), slot_to_row, torch.ones(2, 2)),
            ):
                with pytest.raises(ConfigError, match="row 1 more than once"):
                    call()


def test_rows_that_are_not_there_are_refused() -> None:
    for bad in (4, -2):
        slot_to_row = torch.tensor([[0, bad]], dtype=torch.int32)
        for call in (
            lambda m=slot_to_row: ops.combine(torch.ones(4, 3), m),
            lambda m=slot_to_row: ops.permute(torch.ones(1, 3), m, num_rows=4),
            lambda m=slot_to_row: ops.combine_backward(torch.ones(1, 3), None, m, torch.ones(1, 2), num_rows=4),
        ):
            with pytest.raises(ConfigError) as caught:
                call()
            assert caught.value.value == bad


def test_strided_arguments_are_made_contiguous() -> None:
    maps = routed(hard_ids()["mixed, unused"], 4)
    y, dy = randn(5, maps.num_rows).t(), randn(6, 10)[:, ::2]
    slots = maps.slot_to_row.t().contiguous().t()
    weights = randn(2, 6, seed=1).t()
    tolerances.same_bits(*both("combine", lambda: ops.combine(y, slots, weights, dy)))
    got, want = both("combine_backward", lambda: ops.combine_backward(dy, y, slots, weights))
    tolerances.same_bits(got[0], want[0])
    tolerances.close(got[1], want[1])
    tolerances.same_bits(*both("permute", lambda: ops.permute(dy, slots, num_rows=maps.num_rows)))


def test_what_the_compiled_code_does_not_take_goes_to_the_reference() -> None:
    y, slots = randn(2, 3, dtype=torch.bfloat16), torch.tensor([[0, 1]], dtype=torch.int32)
    residual, dy = randn(1, 3, dtype=torch.float32), randn(1, 3, dtype=torch.float32)
    h, a = randn(2, 4), randn(2, 8)[:, ::2]
    for op, arguments, reason in (
        ("combine", (y, slots, None, residual), "a residual of torch.float32"),
        ("combine_backward", (dy, y, slots, randn(1, 2), 2), "y of torch.bfloat16"),
        ("activation_rows", (h, "gelu", torch.empty_like(h), None), "gelu"),
        ("activation_rows", (h, "relu", a, None), "not contiguous"),
        ("activation_rows", (h, "relu", torch.empty_like(h), torch.ones(2)), "torch.float64"),
        ("activation_rows", (h, "relu", torch.empty_like(h), None), "one pass of PyTorch too"),
        ("activation_rows_backward", (a, h, "relu", h, h, None, None), "not contiguous"),
    ):
        choice = registry.choose(op, device="cpu", dtype=arguments[0].dtype, arguments=arguments)
        assert choice.impl == "reference" and reason in choice.reason, (op, choice)
    want = y[0].float() + y[1].float() + residual[0]
    tolerances.same_bits(ops.combine(y, slots, None, residual)[0], want.bfloat16())


# ---- activations ----


def activated(h: Tensor, kind: str, scale: Tensor | None, da: Tensor) -> tuple[Tensor, ...]:
    """a, a of the backward, dh (written over a copy of h) and dscale, by the implementation that runs."""
    a = torch.empty_like(da)
    forward_into(h, kind, a, scale)
    over, again = h.clone(), torch.empty_like(da)
    dscale = None if scale is None else torch.empty_like(scale)
    backward_into(da.clone(), over, kind, over, again, scale, dscale)
    return a, again, over, torch.empty(0) if dscale is None else dscale


def inputs(kind: str, dtype: torch.dtype, rows: int, width: int, scaled: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    h = randn(rows, 2 * width if kind == "swiglu" else width, dtype=dtype) * 3
    return h, randn(rows, width, dtype=dtype, seed=1), randn(rows, dtype=wide(dtype), seed=2) if scaled else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", COMPILED_KINDS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rows, width", [(0, 5), (3, 0), (3, 1), (4, 63), (2, 64), (5, 65), (3, 520)])
def test_activations_against_autograd_in_float64(dtype, kind, scaled, rows, width) -> None:
    h, da, scale = inputs(kind, dtype, rows, width, scaled)
    exact = h.double().requires_grad_()
    factor = torch.ones(rows, dtype=torch.float64) if scale is None else scale.double()
    factor.requires_grad_()
    gate, up = exact.tensor_split(2, dim=1) if kind == "swiglu" else (exact, None)
    want = (torch.nn.functional.silu(gate) * up if up is not None else gate.relu()) * factor[:, None]
    dh, dfactor = torch.autograd.grad(want, (exact, factor), da.double())
    with registry.force("activation_rows", "cpp"), registry.force("activation_rows_backward", "cpp"):
        a, again, got_dh, got_dscale = activated(h, kind, scale, da)
    tolerances.same_bits(a, again)
    tolerances.close(a, want)
    tolerances.close(got_dh, dh)
    if scaled:
        tolerances.close(got_dscale, dfactor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", COMPILED_KINDS)
def test_a_row_has_its_bits_wherever_it_lies_and_on_any_number_of_threads(dtype, kind) -> None:
    rows, width = 300, 321
    h, da, scale = inputs(kind, dtype, rows, width, True)
    with registry.force("activation_rows", "cpp"), registry.force("activation_rows_backward", "cpp"):
        whole = activated(h, kind, scale, da)
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            shared_out = activated(h, kind, scale, da)
        finally:
            torch.set_num_threads(threads)
        some = slice(7, 101)
        part = activated(h[some], kind, scale[some], da[some])
    for all_rows, on_threads, few in zip(whole, shared_out, part, strict=True):
        tolerances.same_bits(on_threads, all_rows)
        tolerances.same_bits(few, all_rows[some])


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    rows = torch.randperm(2048, generator=torch.Generator().manual_seed(0)).int().view(512, 4)
    y, weights, dy = randn(2048, 200, dtype=torch.bfloat16), randn(512, 4, dtype=torch.float32), randn(512, 200)
    dy = dy.bfloat16()

    def run() -> tuple[Tensor, ...]:
        moved = ops.permute(dy, rows, num_rows=2048)
        return ops.combine(y, rows, weights, dy), *ops.combine_backward(dy, y, rows, weights), moved

    alone, threads = run(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared_out = run()
    finally:
        torch.set_num_threads(threads)
    for have, should in zip(shared_out, alone, strict=True):
        tolerances.same_bits(have, should)


@pytest.mark.parametrize("kind", COMPILED_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_numbers_come_out_as_from_pytorch(kind, dtype) -> None:
    most = torch.finfo(dtype).max
    values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, most, -most, 90.0, -90.0, 105.0, -105.0, 1e-7, -1e-7]
    gate = torch.tensor([values], dtype=dtype)
    ones = torch.ones_like(gate)
    h = torch.cat([gate, ones], dim=1) if kind == "swiglu" else gate
    scale = torch.ones(1, dtype=wide(dtype))

    def run() -> tuple[Tensor, ...]:
        return activated(h, kind, scale, ones)

    names = ("activation_rows", "activation_rows_backward")
    with registry.force(names[0], "cpp"), registry.force(names[1], "cpp"):
        got = run()
    with registry.force(names[0], "reference"), registry.force(names[1], "reference"):
        want = run()
    for have, should in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(have, should, equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=1e-30)


@pytest.mark.parametrize("op", OPS)
def test_the_choice_is_told(op) -> None:
    lines = registry.explain("cpu", torch.bfloat16)
    assert any(line.startswith(f"{op}: cpp (compiled: ") for line in lines), lines
