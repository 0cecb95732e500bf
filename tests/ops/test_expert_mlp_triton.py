"""The expert MLP's Triton kernels under the interpreter, against the references and the dense oracle.

Tiles are 16 x 16 x 16 there and three programs walk over them, so small sizes have full tiles, tails and several tiles
a program. The interpreter computes bfloat16 wrongly: float32 and float16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from tests import tolerances
from tests.ops.cases import randn, weights
from tests.ops.interpreted import needs_triton, on_triton
from tests.ops.test_expert_mlp import dense

needs_triton(interpreter=True)

from moe_overlap.ops import expert_mlp_triton as mlp  # noqa: E402
from moe_overlap.ops.expert_mlp_contract import ExpertMlpBackward  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
F32, F16 = torch.float32, torch.float16
OFFS = {
    "balanced": (13, 26, 39),
    "empty experts": (0, 23, 23, 30, 30),
    "all to the last": (0, 0, 37),
    "a tail of several tiles": (2, 3, 7),
    "nobody": (0, 0, 0),
    "full tiles": (16, 32),
    "one expert": (40,),
    "few rows each": (1, 2, 5, 6),
}
ROWS, HIDDEN, FFN = 40, 22, 21


def problem(name: str, dtype: torch.dtype, kind: str, *, mapped: bool, hidden: int = HIDDEN, ffn: int = FFN) -> list:
    """x, w_in, w_out, row_scale (all with gradients), row_to_token, offs."""
    w_in, w_out = weights(len(OFFS[name]), hidden, ffn, kind, dtype, grad=True)
    x = randn(9 if mapped else ROWS, hidden, dtype=dtype, grad=True)
    row_to_token = torch.arange(ROWS, dtype=torch.int32) * 7 % 10 - 1 if mapped else None
    scale = randn(ROWS, dtype=torch.float32, seed=4, grad=True)
    return [x, w_in, w_out, scale, row_to_token, torch.tensor(OFFS[name], dtype=torch.int32)]


def gradients(values: list, kind: str) -> list[Tensor]:
    """y and every gradient."""
    x, w_in, w_out, scale, row_to_token, offs = values
    y = ops.expert_mlp(x, w_in, w_out, offs, kind=kind, row_to_token=row_to_token, row_scale=scale)
    return [y, *torch.autograd.grad(y, values[:4], randn(*y.shape, dtype=y.dtype, seed=5))]


CASES = [
    *((name, "swiglu", dtype, mapped) for name in OFFS for dtype, mapped in ((F32, True), (F16, False))),
    *((name, kind, F32, name != "balanced") for name in ("balanced", "empty experts") for kind in ("gelu", "relu")),
]


@pytest.mark.parametrize("name, kind, dtype, mapped", CASES)
def test_values_and_gradients(name, kind, dtype, mapped) -> None:
    values = problem(name, dtype, kind, mapped=mapped)
    with on_triton("expert_mlp", "expert_mlp_backward"):
        got = gradients(values, kind)
    x, w_in, w_out, scale, row_to_token, _ = values
    y = dense(x, w_in, w_out, OFFS[name], kind, row_to_token, scale)
    want = [y, *torch.autograd.grad(y, values[:4], randn(ROWS, HIDDEN, dtype=dtype, seed=5).double())]
    assert not got[0][OFFS[name][-1] :].any() and not got[4][OFFS[name][-1] :].any()
    for have, should in zip(got, want, strict=True):
        tolerances.close(have, should, dtype)


@pytest.mark.parametrize("mapped", [False, True])
def test_neither_the_budget_nor_the_way_of_reading_changes_a_bit(mapped, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program or many; addresses or descriptors (as TMA reads)."""
    values = problem("empty experts", F32, "swiglu", mapped=mapped, hidden=24, ffn=20)
    with on_triton("expert_mlp", "expert_mlp_backward"):
        want = gradients(values, "swiglu")
        for name, value in (("INTERPRET_DESCRIPTORS", True), ("target", target_of(1)), ("target", target_of(50))):
            with monkeypatch.context() as patch:
                patch.setattr(mlp, name, value)
                for have, should in zip(gradients(values, "swiglu"), want, strict=True):
                    tolerances.same_bits(have, should)


def target_of(programs: int):
    return lambda device: mlp.Target("interpreter", programs)


def test_a_budget_is_the_number_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    grids, launch = [], mlp.launch

    def noting(kernel, grid, *args, **keywords) -> None:
        grids.append((kernel.__name__, grid[0]))
        launch(kernel, grid, *args, **keywords)

    monkeypatch.setattr(mlp, "launch", noting)
    x, w_in, w_out, _, _, offs = problem("balanced", F32, "swiglu", mapped=False)
    with on_triton("expert_mlp", "expert_mlp_backward"):
        ops.expert_mlp(x, w_in, w_out, offs, kind="swiglu", num_sms=2).sum().backward()
    lists = ("list_tiles_kernel", 4)
    assert grids == [
        *(lists, ("up_kernel", 2), ("rows_kernel", 2)),
        *(lists, ("hidden_gradient_kernel", 2), ("weights_kernel", 2), ("weights_kernel", 2), ("rows_kernel", 2)),
    ]


def test_nan_in_the_tail_and_in_another_expert_reaches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors read whole tiles, also of what belongs to others."""
    monkeypatch.setattr(mlp, "INTERPRET_DESCRIPTORS", True)
    w_in, w_out = weights(3, 24, 20, "swiglu", F32)
    w_in[1], w_out[1] = torch.nan, torch.nan
    x, push = randn(40, 24, dtype=F32), torch.ones(40, 24)
    for rows in (slice(20, 25), slice(33, 40)):
        x[rows], push[rows] = torch.nan, torch.nan
    offs = torch.tensor([20, 25, 33], dtype=torch.int32)
    values = [value.requires_grad_() for value in (x, w_in, w_out)]
    with on_triton("expert_mlp", "expert_mlp_backward"):
        y = ops.expert_mlp(*values, offs, kind="swiglu")
        dx, dw_in, dw_out = torch.autograd.grad(y, values, push)
    good = [*range(20), *range(25, 40)]
    assert y[good].isfinite().all() and dx[good].isfinite().all() and not y[33:].any() and not dx[33:].any()
    assert dw_in[::2].isfinite().all() and dw_out[::2].isfinite().all()
    assert y[20:25].isnan().all() and dw_out[1].isnan().all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,)])
def test_each_gradient_alone_is_the_same(wanted) -> None:
    x, w_in, w_out, scale, row_to_token, offs = problem("a tail of several tiles", F32, "swiglu", mapped=True)
    h, push = randn(ROWS, 2 * FFN, dtype=F32, seed=8), randn(ROWS, HIDDEN, dtype=F32, seed=6)
    arguments = (push, x, h, w_in, w_out, offs, "swiglu", row_to_token, scale)
    with torch.no_grad():
        everything = mlp.expert_mlp_backward(ExpertMlpBackward(*arguments, [True] * 4))
        some = mlp.expert_mlp_backward(ExpertMlpBackward(*arguments, [i in wanted for i in range(4)]))
    for i, have in enumerate(some):
        if i in wanted:
            tolerances.same_bits(have, everything[i])
        else:
            assert have.numel() == 0


@pytest.mark.parametrize("rows", [0, 5])
def test_no_tokens(rows) -> None:
    """No rows at all, and rows that read nothing."""
    w_in, w_out = weights(3, HIDDEN, 5, "gelu", F32, grad=True)
    offs = torch.full((3,), rows, dtype=torch.int32)
    x, row_to_token = torch.zeros(0, HIDDEN, requires_grad=True), torch.full((rows,), -1, dtype=torch.int32)
    with on_triton("expert_mlp", "expert_mlp_backward"):
        y = ops.expert_mlp(x, w_in, w_out, offs, kind="gelu", row_to_token=row_to_token)
        found = torch.autograd.grad(y.sum(), (x, w_in, w_out))
    assert y.shape == (rows, HIDDEN) and not y.any() and not any(gradient.any() for gradient in found)


def test_gradients_with_stride_0() -> None:
    values = problem("balanced", F32, "relu", mapped=False)
    x, w_in, w_out, _, _, offs = values
    with on_triton("expert_mlp", "expert_mlp_backward"):
        y = ops.expert_mlp(x, w_in, w_out, offs, kind="relu")
        got = torch.autograd.grad(y.sum(), values[:3], retain_graph=True)
        want = torch.autograd.grad(y, values[:3], torch.ones(y.shape))
    for have, should in zip(got, want, strict=True):
        tolerances.same_bits(have, should)
