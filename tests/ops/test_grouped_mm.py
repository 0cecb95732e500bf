import pytest
import torch

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from tests import tolerances
from tests.ops.cases import DTYPES, randn

pytestmark = pytest.mark.usefixtures("poison")
OFFS = [(3, 6), (0, 5), (7, 7), (0, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", OFFS)
@pytest.mark.parametrize("transpose_b", [True, False])
def test_values_gradients_and_tail(dtype, ends, transpose_b) -> None:
    a = randn(7, 4, dtype=dtype, grad=True)
    b = randn(2, 5, 4, dtype=dtype, seed=1)
    b = (b if transpose_b else b.transpose(1, 2).contiguous()).requires_grad_()
    got = ops.grouped_mm(a, b, torch.tensor(ends, dtype=torch.int32), transpose_b=transpose_b)
    matrices = b.double().transpose(1, 2) if transpose_b else b.double()
    parts = [a.double()[: ends[0]] @ matrices[0], a.double()[ends[0] : ends[1]] @ matrices[1]]
    want = torch.cat([*parts, torch.zeros(7 - ends[1], 5, dtype=torch.float64)])
    assert got.dtype == dtype and not got[ends[1] :].any()
    tolerances.close(got, want)
    push = randn(7, 5, dtype=dtype, seed=2)
    push[ends[1] :] = torch.nan
    gradients = torch.autograd.grad(got, (a, b), push)
    wanted = torch.autograd.grad(want, (a, b), push.double().nan_to_num())
    for have, should in zip(gradients, wanted, strict=True):
        tolerances.close(have, should, dtype)


@pytest.mark.parametrize("ends", OFFS)
@pytest.mark.parametrize("transpose_b", [True, False])
def test_gradcheck(ends, transpose_b) -> None:
    offs = torch.tensor(ends, dtype=torch.int32)
    b = randn(2, 3, 3, seed=1, grad=True)
    inputs = (randn(7, 3, grad=True), b)
    assert torch.autograd.gradcheck(lambda a, b: ops.grouped_mm(a, b, offs, transpose_b=transpose_b), inputs)


@pytest.mark.parametrize(
    "field, change",
    [
        ("a", {"a_RK": torch.zeros(4)}),
        ("b", {"b_ENK": torch.zeros(2, 5, 4)}),
        ("b", {"b_ENK": torch.zeros(2, 5, 3, dtype=torch.bfloat16)}),
        ("offs", {"offs": torch.zeros(3, dtype=torch.int32)}),
        ("starts, ends", {"offs": torch.tensor([1, 9], dtype=torch.int32)}),
    ],
)
def test_bad_arguments(field, change) -> None:
    arguments = {"a_RK": torch.zeros(4, 3), "b_ENK": torch.zeros(2, 5, 3), "offs": torch.zeros(2, dtype=torch.int32)}
    with pytest.raises(ConfigError) as caught:
        ops.grouped_mm(**{**arguments, **change})
    assert caught.value.field == field
