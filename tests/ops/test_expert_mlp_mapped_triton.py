"""The pieces of the expert MLP through a map of rows and with a factor for each row, on Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_overlap import ops
from tests import tolerances
from tests.ops.cases import KINDS
from tests.ops.interpreted import needs_triton, on_triton
from tests.ops.mapped import BOUNDS, MARK, ROWS, mapped, run, wanted

needs_triton(interpreter=True)

pytestmark = pytest.mark.usefixtures("poison")
F32, F16 = torch.float32, torch.float16
PIECES = ("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad")
BY_ROW = ("y", "h", "dx", "dh", "a", "dscale")
ODD = {"ffn": 37, "hidden": 22}
"""Three tiles of columns, and widths that no tile divides."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_values_and_gradients_in_the_groups_only(kind, bounds, dtype) -> None:
    case = mapped(kind, dtype, bounds, **ODD)
    with on_triton(*PIECES):
        got = run(case, mark=MARK)
    for name, want in wanted(case).items():
        tolerances.close(got[name][case.inside] if name in BY_ROW else got[name], want, dtype)
    for name in BY_ROW:
        assert (got[name][case.outside] == MARK).all(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", ["empty experts and a tail", "apart"])
def test_dh_in_place_of_h_changes_no_bit(kind, bounds) -> None:
    case = mapped(kind, F32, bounds, **ODD)
    with on_triton(*PIECES):
        beside, in_place = run(case, mark=MARK), run(case, mark=MARK, in_place=True)
    for name in beside:
        tolerances.same_bits(in_place[name], beside[name])


def test_new_buffers_are_zero_outside_the_groups() -> None:
    case = mapped("swiglu", F32, "apart", **ODD)
    with on_triton(*PIECES):
        got = run(case)
    assert case.outside and not any(got[name][case.outside].any() for name in BY_ROW)


def test_the_map_alone_reads_the_rows_that_a_copy_would_hold() -> None:
    case = mapped("swiglu", F32, "adjacent", **ODD)
    copied = replace(case, x=case.x[case.rows.long()], dy=case.dy[case.rows.long()], rows=torch.arange(ROWS).int())
    with on_triton(*PIECES):
        got, want = run(case), run(copied)
        y, _ = ops.expert_mlp_forward(copied.x, case.w_in, case.w_out, case.ends, kind="swiglu", scale=case.scale)
    for name in got:
        tolerances.same_bits(got[name], want[name])
    tolerances.same_bits(got["y"], y)
