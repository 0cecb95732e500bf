"""permute in Triton: the same bits as the reference, whatever the dtype."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from tests import tolerances
from tests.ops import cases
from tests.ops.cases import hard_ids, randn, routed
from tests.ops.interpreted import far_programs, needs_triton, on_triton, reference, triton
from tests.strategies import ROUTINGS, make_routing

needs_triton(interpreter=True)
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", cases.DTYPES)  # bfloat16 too: bits are copied
@pytest.mark.parametrize("name", hard_ids())
@pytest.mark.parametrize("align, extra", [(1, 0), (4, 0), (1, 5)])
def test_triton_permute_copies_each_token_to_its_rows_and_zeroes_the_rest(dtype, name, align, extra) -> None:
    maps = routed(hard_ids()[name], 4, align=align)
    x = randn(maps.ids_TK.shape[0], 6, dtype=dtype)
    got, want = (run("permute", x, maps.slot_to_row, maps.offs, maps.num_rows + extra) for run in (triton, reference))
    tolerances.same_bits(got[0], want[0])


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("width", [1, 64, 1025, 2500])
def test_triton_permute_on_random_routings(kind, width) -> None:
    ids, _ = make_routing(kind, 37, 7, 3)
    maps = routed(ids, 7, align=8, capacity=9)
    x = randn(width, 37, dtype=torch.float16).t()
    got, want = (run("permute", x, maps.slot_to_row, None, maps.num_rows) for run in (triton, reference))
    tolerances.same_bits(got[0], want[0])


def test_triton_permute_copies_nan_and_leaves_no_row_undefined() -> None:
    maps = routed(torch.tensor([[0], [-1]], dtype=torch.int32), 1, align=4)
    x = torch.full((2, 3), torch.nan)
    got = triton("permute", x, maps.slot_to_row, maps.offs, 6)[0]
    assert got[0].isnan().all() and not got[1:].any()


def test_triton_permute_inside_autograd() -> None:
    maps = routed(hard_ids()["mixed, unused"], 4)
    gradients = []
    for forced in (("permute", "combine"), ("row_map",)):
        x = randn(6, 5, grad=True)
        push = randn(maps.num_rows, 5, seed=1)
        push[maps.offs[-1] :] = torch.nan  # nobody's rows: their gradient must not reach anyone
        with on_triton(*forced):
            ops.permute(x, maps.slot_to_row, maps.offs, num_rows=maps.num_rows).backward(push)
        gradients.append(x.grad)
    tolerances.close(*gradients)


def test_triton_permute_refuses_a_row_outside_the_result() -> None:
    with on_triton("permute"), pytest.raises(ConfigError, match="slot_to_row"):
        ops.permute(torch.zeros(1, 2), torch.tensor([[3]], dtype=torch.int32), num_rows=3)


def test_triton_permute_reaches_rows_and_tokens_beyond_2_to_the_31() -> None:
    from moe_overlap.ops import permute_triton, rows_triton

    width = 4096
    rows = 2**31 // width + 3
    with far_programs(rows - 1) as lazy:
        x, out = lazy(rows, width, dtype=torch.float16), lazy(rows + 1, width, dtype=torch.float16)
        x[-1] = torch.arange(width) % 100
        slots, used = torch.full((rows, 1), rows - 1, dtype=torch.int32), torch.zeros(rows + 1, dtype=torch.int8)
        permute_triton.launch(
            permute_triton.permute_kernel, (1, 2), x, slots, out, used, rows, rows + 1, width,
            K=1, BLOCK_T=1, BLOCK_D=2048,
        )  # fmt: skip
        tolerances.same_bits(out[rows - 1], x[-1])
        assert used.nonzero().tolist() == [[rows - 1]]
        used[-1] = 1
        rows_triton.launch(rows_triton.clear_rows_kernel, (2,), out, 1 - used, rows + 1, width, BLOCK_R=1, BLOCK_D=1024)
        assert not out[rows - 1].any()
