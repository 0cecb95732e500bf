import pytest
import torch

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import registry
from tests.ops.cases import cpu_implementations, hard_ids
from tests.strategies import ROUTINGS, make_routing

pytestmark = pytest.mark.usefixtures("poison")

IMPLEMENTATIONS = cpu_implementations("row_map")


def python_row_map(ids, first, last, align, capacity):
    """The contract in plain Python."""
    slots = [expert for row in ids.tolist() for expert in row]
    num_rows = (len(slots) + (last - first) * (align - 1)) // align * align
    tokens_per_expert, offs, slot_to_row, row_to_slot = [], [], [-1] * len(slots), [-1] * num_rows
    row = 0
    for expert in range(first, last):
        kept = [slot for slot, wanted in enumerate(slots) if wanted == expert][:capacity]
        for place, slot in enumerate(kept):
            slot_to_row[slot], row_to_slot[row + place] = row + place, slot
        row += -(-len(kept) // align) * align
        tokens_per_expert.append(len(kept))
        offs.append(row)
    return tokens_per_expert, offs, slot_to_row, row_to_slot


def check(ids: torch.Tensor, experts: int, first: int, last: int, align: int, capacity: int | None) -> None:
    got = ops.row_map(ids, num_experts=experts, first=first, last=last, align=align, capacity=capacity)
    want = python_row_map(ids, first, last, align, capacity)
    assert [value.dtype for value in got] == [torch.int32] * 4
    assert got[2].shape == ids.shape
    for name, have, should in zip(("tokens_per_expert", "offs", "slot_to_row", "row_to_slot"), got, want, strict=True):
        assert have.reshape(-1).tolist() == should, name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", hard_ids())
@pytest.mark.parametrize("first, last", [(0, 4), (1, 3), (2, 2), (3, 4)])
@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("capacity", [None, 0, 2])
def test_is_a_stable_counting_sort(impl, name, first, last, align, capacity) -> None:
    with registry.force("row_map", impl):
        check(hard_ids()[name], 4, first, last, align, capacity)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ROUTINGS)
def test_random_routings(impl, kind) -> None:
    with registry.force("row_map", impl):
        for seed in range(6):
            tokens, experts, k = 1 + 37 * seed, 3 + 5 * seed, 1 + seed % 3
            ids, _ = make_routing(kind, tokens, experts, k, seed=seed)
            check(ids, experts, 0, experts, 1 + 7 * (seed % 2), None if seed % 3 else 5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equals_a_stable_argsort_on_a_large_routing(impl) -> None:
    ids, _ = make_routing("zipf", 4096, 257, 8, seed=1)
    with registry.force("row_map", impl):
        tokens_per_expert, offs, slot_to_row, row_to_slot = ops.row_map(ids, num_experts=257)
    order = ids.reshape(-1).sort(stable=True).indices
    assert torch.equal(row_to_slot.long(), order)
    assert torch.equal(slot_to_row.reshape(-1)[order].long(), torch.arange(order.numel()))
    assert torch.equal(tokens_per_expert, torch.bincount(ids.reshape(-1), minlength=257).int())
    assert torch.equal(offs, tokens_per_expert.cumsum(0).int())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_worked_example_and_strided_ids(impl) -> None:
    ids = torch.tensor([[2, 0], [0, -1], [2, 2]], dtype=torch.int32)
    with registry.force("row_map", impl):
        for given in (ids, ids.t().contiguous().t()):
            got = ops.row_map(given, num_experts=3)
            assert [value.tolist() for value in got] == [
                [2, 0, 3],
                [2, 2, 5],
                [[2, 0], [1, -1], [3, 4]],
                [1, 2, 0, 4, 5, -1],
            ]


@pytest.mark.parametrize(
    "field, change",
    [
        ("ids", {"ids_TK": torch.tensor([[4]], dtype=torch.int32)}),
        ("ids", {"ids_TK": torch.tensor([[-2]], dtype=torch.int32)}),
        ("ids", {"ids_TK": torch.tensor([[1]])}),
        ("ids", {"ids_TK": torch.tensor([1], dtype=torch.int32)}),
        ("num_experts", {"num_experts": 0}),
        ("first, last", {"first": 3, "last": 2}),
        ("first, last", {"last": 5}),
        ("align", {"align": 0}),
        ("capacity", {"capacity": -1}),
    ],
)
def test_bad_arguments(field, change) -> None:
    arguments = {"ids_TK": torch.zeros(2, 2, dtype=torch.int32), "num_experts": 4, **change}
    with pytest.raises(ConfigError) as caught:
        ops.row_map(**arguments)
    assert caught.value.field == field


def test_the_result_has_names():
    found = ops.row_map(torch.tensor([[1, 0]], dtype=torch.int32), num_experts=2)
    assert found._fields == ("tokens_per_expert", "offs", "slot_to_row", "row_to_slot")
    assert found.slot_to_row is found[2] and found.offs.tolist() == [1, 2]
