import pytest
import torch

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from tests import tolerances
from tests.ops.cases import DTYPES, randn

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_pack_and_unpack_are_inverse(dtype, order_dtype, rows) -> None:
    x, order = randn(rows, 5, dtype=dtype), torch.randperm(rows).to(order_dtype)
    packed = ops.pack(x, order)
    tolerances.same_bits(packed, x[order.long()])
    tolerances.same_bits(ops.unpack(packed, order), x)
    out = torch.zeros_like(x)
    assert ops.unpack(packed, order, out=out) is out
    tolerances.same_bits(out, x)


def test_unpack_into_part_of_a_buffer() -> None:
    out = torch.full((5, 2), 9.0)
    ops.unpack(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([3, 0]), out=out)
    assert out[:, 0].tolist() == [2.0, 9.0, 9.0, 1.0, 9.0]


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 0, 1], [], [2]])
def test_gradcheck_of_pack_with_rows_left_out_or_repeated(order) -> None:
    index = torch.tensor(order, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda x: ops.pack(x, index), (randn(3, 2, grad=True),))


@pytest.mark.parametrize("rows", [0, 4])
def test_gradcheck_of_unpack(rows) -> None:
    order = torch.randperm(rows)
    assert torch.autograd.gradcheck(lambda x: ops.unpack(x, order), (randn(rows, 2, grad=True),))


@pytest.mark.parametrize(
    "field, call",
    [
        ("rows", lambda x: ops.pack(x[0], torch.tensor([0]))),
        ("row_order", lambda x: ops.pack(x, torch.tensor([3]))),
        ("row_order", lambda x: ops.pack(x, torch.tensor([-1]))),
        ("row_order", lambda x: ops.pack(x, torch.tensor([0.0]))),
        ("row_order", lambda x: ops.unpack(x, torch.tensor([0, 1]))),
        ("row_order", lambda x: ops.unpack(x, torch.tensor([0, 1, 1]))),
        ("row_order", lambda x: ops.unpack(x, torch.tensor([0, 1, 5]), out=torch.zeros(5, 2))),
        ("out", lambda x: ops.unpack(x, torch.tensor([0, 1, 2]), out=torch.zeros(3, 3))),
        ("out", lambda x: ops.unpack(x, torch.tensor([0, 1, 2]), out=torch.zeros(3, 2).double())),
    ],
)
def test_bad_arguments(field, call) -> None:
    with pytest.raises(ConfigError) as caught:
        call(torch.zeros(3, 2))
    assert caught.value.field == field
