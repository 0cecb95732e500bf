"""The plan: records, agreement, chunks, orders, each against a few lines of plain Python."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_overlap.agreement.agree import agree_on
from moe_overlap.agreement.counts import BLOCKS, block_counts, block_counts_of_rows
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.agreement.record import (
    AGREED_FIELDS,
    DEDUP,
    DTYPES,
    RECORD_FIELDS,
    REFUSALS,
    StepRecord,
    digest,
    dtype_code,
    record_words,
)
from moe_overlap.errors import ConfigError, PlanMismatch
from tests.transport.worlds import counts_of, plan_of, record


def ids_of(tokens: int, top_k: int, slots: int, seed: int) -> torch.Tensor:
    return torch.randint(-1, slots, (tokens, top_k), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def plan_for(ids: list[torch.Tensor], slots: int, rank: int = 0) -> ExchangePlan:
    counts = np.stack([block_counts(one, slots).numpy() for one in ids])
    return replace(plan_of(len(ids), slots, 0, rank=rank), counts=Counts.of(counts, rank))


def chunk_of(token: int, slot: int, tokens: int, plan: ChunkPlan) -> int:
    """The chunk of a row, from the definition."""
    if plan.by == "tokens":
        block = next(b for b in range(BLOCKS) if tokens * b // BLOCKS <= token < tokens * (b + 1) // BLOCKS)
        return next(c for c in range(plan.chunks) if block < BLOCKS * (c + 1) // plan.chunks)
    local = plan.local_slots
    return next(c for c in range(plan.chunks) if slot % local < local * (c + 1) // plan.chunks)


Row = tuple[int, int, int, int]  # rank, token, k, slot


def rows_in_order(ids: torch.Tensor, rank: int, plan: ChunkPlan) -> list[list[Row]]:
    """The rows that `rank` sends, per chunk, in send order: slot, token, k."""
    tokens, top_k = ids.shape
    rows: list[list[Row]] = [[] for _ in range(plan.chunks)]
    for token in range(tokens):
        for k in range(top_k):
            slot = int(ids[token, k])
            if slot >= 0:
                rows[chunk_of(token, slot, tokens, plan)].append((rank, token, k, slot))
    return [sorted(chunk, key=lambda row: (row[3], row[1], row[2])) for chunk in rows]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    world=st.integers(1, 4),
    local=st.integers(1, 3),
    tokens=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    chunks=st.integers(1, BLOCKS),
    by=st.sampled_from(["tokens", "experts"]),
    seed=st.integers(0, 10_000),
)
def test_a_whole_exchange_from_its_definition(
    world: int, local: int, tokens: list[int], chunks: int, by: str, seed: int
) -> None:
    """Send order, receive order and the experts' buffer, followed row by row."""
    slots = world * local
    ids = [ids_of(tokens[rank], 2, slots, seed + rank) for rank in range(world)]
    plans = [plan_for(ids, slots, rank).chunked(chunks, by=by) for rank in range(world)]  # type: ignore[arg-type]
    sent = [rows_in_order(ids[rank], rank, plans[rank]) for rank in range(world)]
    for rank, plan in enumerate(plans):
        keys, number = plan.send_keys(ids[rank])
        flat = [(int(key), i) for i, key in enumerate(keys.reshape(-1).tolist()) if key >= 0]
        assert all(key < number for key, _ in flat)
        order = [(rank, i // 2, i % 2, int(ids[rank].reshape(-1)[i])) for _, i in sorted(flat)]
        assert order == [row for chunk in sent[rank] for row in chunk]

        buffer: dict[int, Row] = {}
        for chunk in range(chunks):
            for target in range(world):
                to_target = [row for row in sent[rank][chunk] if row[3] // local == target]
                assert plan.send_counts[chunk][target] == len(to_target)
                assert plans[target].recv_counts[chunk][rank] == len(to_target)
            assert plan.send_rows[chunk] == len(sent[rank][chunk])
            assert plan.send_offsets[chunk] == sum(len(sent[rank][c]) for c in range(chunk))
            arrived = [row for source in range(world) for row in sent[source][chunk] if row[3] // local == rank]
            assert plan.recv_rows[chunk] == len(arrived)
            positions = plan.buffer_order(chunk).tolist()
            assert len(positions) == len(arrived)
            buffer.update(zip(positions, arrived, strict=True))
            starts, ends = plan.expert_rows(chunk)
            for slot in range(local):
                mine = [at for at, row in zip(positions, arrived, strict=True) if row[3] % local == slot]
                assert sorted(mine) == list(range(int(starts[slot]), int(ends[slot])))
        assert sorted(buffer) == list(range(sum(plan.recv_rows)))
        assert plan.exchange.rows_per_rank[rank] == len(buffer)
        # Whatever the chunks: slot, block, source rank, token, k.
        block = {rank: [b for b in range(BLOCKS) for _ in range(t * b // BLOCKS, t * (b + 1) // BLOCKS)]
                 for rank, t in enumerate(tokens[:world])}  # fmt: skip
        whole = [buffer[at] for at in sorted(buffer)]
        assert whole == sorted(whole, key=lambda row: (row[3], block[row[0]][row[1]], *row[:3]))
        in_slot_order = [buffer[at][3] for at in sorted(buffer)]
        assert in_slot_order == sorted(in_slot_order)
        offs = np.cumsum([in_slot_order.count(rank * local + slot) for slot in range(local)])
        assert plan.expert_offs.tolist() == offs.tolist()
        across = [any(row[3] // local != row[0] for source in sent for row in source[c]) for c in range(chunks)]
        assert plan.stays_local == tuple(not any_row for any_row in across)


def test_buffer_order_of_the_docstring() -> None:
    counts = np.zeros((2, BLOCKS, 4), dtype=np.int64)
    counts[0, 0, :2] = 2, 1
    counts[1, 0, :2] = 1, 1
    plan = replace(plan_of(2, 4, 0), counts=Counts.of(counts, 0)).chunked(1)
    assert plan.buffer_order(0).tolist() == [0, 1, 3, 2, 4]


def test_block_counts() -> None:
    for tokens in (0, 1, 15, 16, 17, 100):
        ids = ids_of(tokens, 3, 5, tokens)
        counts = block_counts(ids, 5)
        assert counts.shape == (BLOCKS, 5) and counts.dtype == torch.int64
        for block in range(BLOCKS):
            part = ids[tokens * block // BLOCKS : tokens * (block + 1) // BLOCKS]
            assert counts[block].tolist() == [int((part == slot).sum()) for slot in range(5)]
    for bad in (-2, 5, 2**31 - 1):
        with pytest.raises(ConfigError, match=f"topk_ids = {bad}"):
            block_counts(torch.tensor([[0, bad]], dtype=torch.int32), 5)


def distinct_ids(tokens: int, top_k: int, slots: int, seed: int) -> torch.Tensor:
    """int32 [T, K] with -1 here and there, no slot twice in a token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, slots, generator=generator).argsort(dim=1)[:, :top_k].to(torch.int32)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.2, -1, ids).to(torch.int32)


@pytest.mark.parametrize("world, local, top_k", [(1, 1, 1), (1, 5, 3), (3, 1, 2), (4, 3, 5), (2, 8, 16)])
@pytest.mark.parametrize("tokens", [0, 1, 17, 100])
def test_rows_are_counted_at_their_first_and_last_slot(world: int, local: int, top_k: int, tokens: int) -> None:
    slots = world * local
    ids = distinct_ids(tokens, top_k, slots, tokens)
    counts, first, last = block_counts_of_rows(ids, slots, world)
    assert torch.equal(counts, block_counts(ids, slots))
    expected = torch.zeros(2, BLOCKS, slots, dtype=torch.int64)
    for block in range(BLOCKS):
        for token in ids[tokens * block // BLOCKS : tokens * (block + 1) // BLOCKS].tolist():
            for rank in range(world):
                there = [slot for slot in token if slot >= 0 and slot // local == rank]
                if there:
                    expected[0, block, min(there)] += 1
                    expected[1, block, max(there)] += 1
    assert torch.equal(torch.stack([first, last]), expected)
    assert first.dtype == torch.int64 and first.device.type == "cpu"


def test_counts_of_rows_refuse_bad_ids() -> None:
    def of(*token: int) -> tuple[torch.Tensor, ...]:
        return block_counts_of_rows(torch.tensor([[-1, -1, -1], token], dtype=torch.int32), 6, 2)

    of(-1, -1, 3)
    for bad in (-2, 6, 2**31 - 1):
        with pytest.raises(ConfigError, match=f"topk_ids = {bad}"):
            of(4, bad, 4)
    with pytest.raises(ConfigError, match="topk_ids = 4.*twice"):
        of(4, 1, 4)


def table_of(world: int, slots: int, **changes: int) -> torch.Tensor:
    """Gathered records of which the last rank's has `changes`."""
    rows = [record(counts_of(rank, world, slots, 0), step=3) for rank in range(world)]
    rows[-1] = replace(rows[-1], **changes)  # type: ignore[arg-type]
    return torch.stack([one.to_tensor() for one in rows])


def test_record_is_its_fields_then_its_counts() -> None:
    counts = counts_of(0, 1, 3, 0)
    one = StepRecord(counts=counts, **{name: 100 + i for i, name in enumerate(RECORD_FIELDS)})  # type: ignore[arg-type]
    words = one.to_tensor()
    assert words.dtype == torch.int64 and words.tolist()[: len(RECORD_FIELDS)] == list(
        range(100, 100 + len(RECORD_FIELDS))
    )
    assert torch.equal(words[len(RECORD_FIELDS) :].view(torch.int32).reshape(BLOCKS, 3), counts.to(torch.int32))
    assert len(words) == record_words(3, 3, 0)


@pytest.mark.parametrize("name", AGREED_FIELDS)
def test_every_agreed_field_is_compared(name: str) -> None:
    table = table_of(3, 3, **{name: 9})
    for rank in range(3):
        with pytest.raises(PlanMismatch, match=f"about {name}: rank 0 has .*, rank 2 has 9") as caught:
            agree_on(table, rank=rank, num_slots=3)
        assert caught.value.peer == (2 if rank != 2 else 0) and caught.value.rank == rank


def test_agreement_and_the_or_over_ranks() -> None:
    for wants, expected in ((0, False), (1, True)):
        rows = table_of(3, 3, x_requires_grad=wants)
        rows[:2, RECORD_FIELDS.index("x_requires_grad")] = 0
        plan = agree_on(rows, rank=1, num_slots=3)
        assert plan.x_requires_grad is expected and plan.grad_enabled and plan.phase == "forward" and plan.step == 3
    assert np.array_equal(plan.counts.table, np.stack([counts_of(rank, 3, 3, 0).numpy() for rank in range(3)]))


def test_a_refusal_comes_before_everything_else() -> None:
    for code, (field, _) in REFUSALS.items():
        table = table_of(3, 3, status=code, status_value=-7, hidden=99)
        errors = []
        for rank in range(3):
            with pytest.raises(ConfigError, match="refused on rank 2") as caught:
                agree_on(table, rank=rank, num_slots=3)
            errors.append(str(caught.value))
            assert (caught.value.field, caught.value.value) == (field, -7)
        assert len(set(errors)) == 1
    with pytest.raises(ConfigError, match="status"):
        agree_on(table_of(2, 2, status=12345), rank=0, num_slots=2)


def dedup_table(world: int, local: int) -> torch.Tensor:
    """Gathered records of ranks that deduplicate, 40 tokens each."""
    rows = []
    for rank in range(world):
        tables = block_counts_of_rows(distinct_ids(40, 3, world * local, rank), world * local, world)
        rows.append(record(tables[0], first=tables[1], last=tables[2], dedup=1).to_tensor())
    return torch.stack(rows)


def test_the_plan_has_the_rows_where_they_are_deduplicated() -> None:
    table = dedup_table(2, 3)
    plan = agree_on(torch.cat([table, torch.full((2, 5), -9)], dim=1), rank=1, num_slots=6)
    said = table[:, len(RECORD_FIELDS) :].view(torch.int32).reshape(2, 3, BLOCKS, 6).numpy()
    assert plan.dedup == 1 and plan.first is not None and plan.last is not None
    for i, of_plan in enumerate((plan.counts, plan.first, plan.last)):
        assert np.array_equal(of_plan.table, said[:, i])
    plain = agree_on(table_of(2, 6, dedup=0), rank=0, num_slots=6)
    assert (plain.dedup, plain.first, plain.last) == (0, None, None)


COUNT, FIRST, LAST = 0, 1, 2


@pytest.mark.parametrize(
    "changes",
    [
        [(FIRST, 0, -2), (LAST, 2, -2)],
        [(FIRST, 0, 1)],  # more rows begin than end
        [(LAST, 2, 1)],
        [(COUNT, 1, -1)],  # a row begins that no choice needs
        [(FIRST, 0, -1), (FIRST, 2, 1), (LAST, 1, 1), (LAST, 2, -1)],  # ends before it begins
        [(FIRST, 0, -1), (FIRST, 1, -1), (LAST, 1, -1), (LAST, 2, -1)],  # choices and no row
        [(COUNT, 0, 9)],  # eleven choices of two rows on three slots
        [(COUNT, 0, -9), (FIRST, 0, -9), (LAST, 0, -9)],
    ],
)
def test_impossible_rows_are_refused(changes: list[tuple[int, int, int]]) -> None:
    """Block 0 of rank 0: a row on slots 0 and 2, one on slot 1, none on the other rank."""
    tables = torch.zeros(3, BLOCKS, 6, dtype=torch.int64)
    tables[COUNT, 0, :3] = 1
    tables[FIRST, 0, :2] = 1
    tables[LAST, 0, 1:3] = 1

    def agree() -> ExchangePlan:
        said = record(tables[COUNT], first=tables[FIRST], last=tables[LAST], dedup=1).to_tensor()
        return agree_on(torch.stack([said, said]), rank=1, num_slots=6)

    agree()
    for table, slot, change in changes:
        tables[table, 0, slot] += change
    with pytest.raises(PlanMismatch, match="rank 0 announced an impossible row count"):
        agree()


@pytest.mark.parametrize(
    ("slots", "node_rows", "ranks_per_node", "right"),
    [
        ((0, 1), 1, 2, True),  # one token on both ranks of a node, or two on one each
        ((0, 1), 2, 2, True),
        ((0, 1), 3, 2, False),
        ((0, 1), 0, 2, False),
        ((), 0, 2, True),
        ((), 1, 2, False),
        ((0, 1), 1, 3, False),  # four ranks
        ((0, 1), 1, 0, False),
        ((0, 1), 1, -2, False),
    ],
)
def test_rows_for_nodes_go_with_those_for_ranks(
    slots: tuple[int, ...], node_rows: int, ranks_per_node: int, right: bool
) -> None:
    counts = torch.zeros(BLOCKS, 4, dtype=torch.int64)
    counts[3, list(slots)] = 1
    per_node = torch.zeros(2, BLOCKS, 2, dtype=torch.int64)
    per_node[:, 3, 0] = node_rows
    said = record(counts, first=counts, last=counts, dedup=1, ranks_per_node=ranks_per_node, hierarchical=1)
    table = torch.stack([replace(said, node_rows=per_node).to_tensor()] * 4)
    if right:
        plan = agree_on(torch.cat([table, torch.full((4, 5), -9)], dim=1), rank=1, num_slots=4)
        assert plan.ranks_per_node == 2 and plan.node_rows is not None
        across = plan.node_rows.across[0].received[:, 3, 0].tolist()
        # Rank 1 hears of its neighbour's row for itself, and as gateway of all that rank 3 has for the node.
        assert across == [int(1 in slots), int(1 in slots), 0, node_rows]
    else:
        with pytest.raises(PlanMismatch, match="rank 0 announced an impossible row count"):
            agree_on(table, rank=1, num_slots=4)


def test_an_unknown_mode_of_deduplication_is_refused() -> None:
    table = table_of(2, 2)
    table[:, RECORD_FIELDS.index("dedup")] = len(DEDUP)
    with pytest.raises(PlanMismatch, match="rank 0 announced an impossible"):
        agree_on(table, rank=0, num_slots=2)
    table[:, RECORD_FIELDS.index("dedup")] = DEDUP.index("off")
    assert agree_on(table, rank=0, num_slots=2).dedup == DEDUP.index("off")


@pytest.mark.parametrize("word", [-1, 7 - (1 << 32), (1 << 31) + 1])
def test_impossible_counts_are_refused(word: int) -> None:
    """Two counts to a word: both, the upper and the lower one are negative."""
    table = table_of(2, 2)
    table[1, -1] = word
    with pytest.raises(PlanMismatch, match="rank 1 announced an impossible row count"):
        agree_on(table, rank=0, num_slots=2)


def test_an_unknown_phase_is_called_so() -> None:
    table = table_of(2, 2)
    table[:, RECORD_FIELDS.index("phase")] = 7
    assert agree_on(table, rank=0, num_slots=2).phase == "unknown"


@pytest.mark.parametrize("chunks", [0, 17, -1, 2.0, "2", None])
def test_bad_chunk_counts_are_named(chunks: object) -> None:
    with pytest.raises(ConfigError, match="chunks"):
        plan_of(2, 2, 0).chunked(chunks)  # type: ignore[arg-type]


def test_bad_names_are_named() -> None:
    with pytest.raises(ConfigError, match="chunk_by"):
        plan_of(2, 2, 0).chunked(2, by="hops")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="x.dtype"):
        dtype_code(torch.int8)
    assert [dtype_code(dtype) for dtype in DTYPES] == list(range(len(DTYPES)))


def test_digest_is_stable_and_fits_a_word() -> None:
    assert digest("a", 1) == digest("a", 1) != digest("a", 2)
    assert digest("a", 11) != digest("a1", 1)
    assert all(0 <= digest(i) < 2**63 for i in range(100))


def test_row_layout() -> None:
    assert RowLayout(width=5, dtype=torch.bfloat16).row_bytes == 10
