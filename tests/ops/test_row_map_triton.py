"""row_map in Triton: bit for bit the contract, written in plain Python in test_row_map.py."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import triton_kernels
from tests.ops.cases import hard_ids
from tests.ops.interpreted import far_programs, needs_triton, on_triton
from tests.ops.test_row_map import check
from tests.strategies import ROUTINGS, make_routing

needs_triton(interpreter=True)
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("name", hard_ids())
@pytest.mark.parametrize("first, last", [(0, 4), (1, 3), (2, 2), (3, 4)])
@pytest.mark.parametrize("align, capacity", [(1, None), (4, None), (1, 0), (4, 2)])
def test_triton_row_map_is_a_stable_counting_sort(name, first, last, align, capacity) -> None:
    with on_triton("row_map"):
        check(hard_ids()[name], 4, first, last, align, capacity)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_triton_row_map_on_random_routings(kind) -> None:
    with on_triton("row_map"):
        for seed in range(6):
            tokens, experts, k = 1 + 137 * seed, 3 + 5 * seed, 1 + seed % 3  # up to four blocks of slots
            ids, _ = make_routing(kind, tokens, experts, k, seed=seed)
            check(ids, experts, 0, experts, 1 + 7 * (seed % 2), None if seed % 3 else 5)


def test_triton_row_map_equals_a_stable_argsort_on_a_large_routing() -> None:
    ids, _ = make_routing("zipf", 2048, 257, 8, seed=1)
    with on_triton("row_map"):
        tokens_per_expert, offs, slot_to_row, row_to_slot = ops.row_map(ids.t().contiguous().t(), num_experts=257)
    order = ids.reshape(-1).sort(stable=True).indices
    assert torch.equal(row_to_slot.long(), order)
    assert torch.equal(slot_to_row.reshape(-1)[order].long(), torch.arange(order.numel()))
    assert torch.equal(tokens_per_expert, torch.bincount(ids.reshape(-1), minlength=257).int())
    assert torch.equal(offs, tokens_per_expert.cumsum(0).int())


def test_triton_row_map_sums_over_more_blocks_than_a_program_reads_at_once() -> None:
    from moe_overlap.ops import row_map_triton

    counts = torch.randint(0, 9, (700, 19), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    earlier, totals = counts.clone(), torch.full((19,), -1, dtype=torch.int32)
    row_map_triton.launch(row_map_triton.earlier_kernel, (3,), earlier, totals, 700, 19, BLOCK_B=256, BLOCK_E=8)
    assert torch.equal(totals, counts.sum(0).int()) and torch.equal(earlier, (counts.cumsum(0) - counts).int())


def test_triton_row_map_refuses_more_experts_than_a_program_holds() -> None:
    many = triton_kernels.MOST_ROW_MAP_EXPERTS + 1
    with on_triton("row_map"), pytest.raises(ConfigError, match=f"{many} experts"):
        ops.row_map(torch.zeros(1, 1, dtype=torch.int32), num_experts=many)


def test_triton_row_map_reaches_counts_beyond_2_to_the_31() -> None:
    from moe_overlap.ops import row_map_triton as row_map

    experts = 4095
    blocks = 2**31 // experts + 2
    slots = blocks * 16
    with far_programs(blocks - 1) as lazy:
        ids, counts = lazy(slots, dtype=torch.int32), lazy(blocks, experts, dtype=torch.int32)
        ids[-16:] = torch.arange(16) % 3 + 4090
        row_map.launch(
            row_map.count_kernel, (1,), ids, counts, torch.empty(0, dtype=torch.int32), slots, 0, experts, 0, 0,
            E_PAD=4096, BLOCK_S=16,
        )  # fmt: skip
    assert counts[-1, 4089:].tolist() == [0, 6, 5, 5, 0, 0]
