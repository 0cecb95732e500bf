"""permute, combine, pack, unpack and the activations against the references and the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import ops
from moe_overlap.ops import registry
from tests.gpu.both import cpu, every, kernel, reference
from tests.ops.cases import KINDS, hard_ids, randn, routed
from tests.tolerances import bits, close

pytestmark = pytest.mark.gpu

F32, F64, I32 = torch.float32, torch.float64, torch.int32
WIDTHS = (1, 2, 3, 7, 8, 9, 16, 40, 100, 128, 1000, 2048, 7168)  # odd ones take the slow path


def routings():
    """(name, routing): the hard small ones, and a larger one."""
    for name, ids_TK in hard_ids().items():
        yield name, routed(ids_TK, 4)
        yield f"{name}, aligned", routed(ids_TK, 4, align=8)
    ids_TK = torch.randint(-1, 60, (700, 8), generator=torch.Generator().manual_seed(0), dtype=I32)
    yield "large", routed(ids_TK, 60)


def skewed(value: torch.Tensor) -> torch.Tensor:
    """The same values on the GPU, two bytes (float32: four, float64: eight) behind an aligned address."""
    memory = torch.empty(value.numel() + 1, dtype=value.dtype, device="cuda")
    return memory[1:].view(value.shape).copy_(value)


@pytest.mark.parametrize("op, dtype", every("permute"))
def test_permute_copies_bits(op: str, dtype: torch.dtype, poison: None) -> None:
    for name, maps in routings():
        for width in WIDTHS:
            x_TD = randn(maps.ids_TK.shape[0], width, dtype=dtype)
            for num_rows in (maps.num_rows, maps.num_rows + 5):
                (want,) = reference(op, x_TD, maps.slot_to_row, maps.offs, num_rows)
                for given in (x_TD, skewed(x_TD)):
                    (got,) = cpu(kernel(op, given, maps.slot_to_row, maps.offs, num_rows))
                    assert torch.equal(bits(got), bits(want)), (name, width, num_rows)


@pytest.mark.parametrize("op, dtype", every("permute"))
def test_permute_clears_the_rows_without_a_slot(op: str, dtype: torch.dtype, poison: None) -> None:
    """Nearly all of them, few and many, wide and narrow; and maps at an address that is no multiple of 16."""
    for num_rows, width in ((300_000, 1), (20_000, 40), (9000, 1000), (5, 2048)):
        slots_TK = torch.tensor([[num_rows - 1, 0], [-1, 3], [num_rows // 2, -1], [-1, -1]], dtype=I32)
        x_TD = randn(4, width, dtype=dtype)
        (want,) = reference(op, x_TD, slots_TK, None, num_rows)
        for given in (slots_TK, skewed(slots_TK)):
            (got,) = cpu(kernel(op, x_TD, given, None, num_rows))
            assert torch.equal(bits(got), bits(want)), (num_rows, width)


@pytest.mark.parametrize("op, dtype", every("combine"))
def test_combine_against_float64(op: str, dtype: torch.dtype, poison: None) -> None:
    for name, maps in routings():
        tokens, top_k = maps.ids_TK.shape
        for width in WIDTHS:
            y_RD, weights_TK = randn(maps.num_rows, width, dtype=dtype), randn(tokens, top_k, dtype=F32, seed=1)
            residual_TD = randn(tokens, width, dtype=dtype, seed=2)
            for weights, residual in ((None, None), (weights_TK, None), (weights_TK, residual_TD), (None, residual_TD)):
                oracle = (v if v is None else v.double() for v in (weights, residual))
                (want,) = reference(op, y_RD.double(), maps.slot_to_row, *oracle)
                (got,) = cpu(kernel(op, skewed(y_RD) if width % 3 == 0 else y_RD, maps.slot_to_row, weights, residual))
                assert got.dtype == dtype, name
                close(got, want)


@pytest.mark.parametrize("op, dtype", every("combine_backward"))
def test_combine_backward_against_float64(op: str, dtype: torch.dtype, poison: None) -> None:
    for _, maps in routings():
        tokens, top_k = maps.ids_TK.shape
        for width in WIDTHS:
            dy_TD, y_RD = randn(tokens, width, dtype=dtype), randn(maps.num_rows, width, dtype=dtype, seed=1)
            weights_TK = randn(tokens, top_k, dtype=F32, seed=2)
            for y, weights in ((None, None), (None, weights_TK), (y_RD, weights_TK)):
                wide = tuple(v if v is None else v.double() for v in (dy_TD, y, weights))
                want = reference(op, wide[0], wide[1], maps.slot_to_row, wide[2], maps.num_rows)
                got = cpu(kernel(op, dy_TD, y, maps.slot_to_row, weights, maps.num_rows))
                close(got[0], want[0])
                if y is not None:
                    close(got[1], want[1], dtype=dtype)


@pytest.mark.parametrize("op, dtype", every("pack", "unpack"))
def test_pack_and_unpack_copy_bits(op: str, dtype: torch.dtype, poison: None) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 5, 33, 1000):
        order = torch.randperm(count, generator=generator)
        for width in WIDTHS:
            rows = randn(count, width, dtype=dtype)
            for index in (order, order.to(I32)):
                (want,) = reference(op, rows, index)
                for given in (rows, skewed(rows)):
                    (got,) = cpu(kernel(op, given, index))
                    assert torch.equal(bits(got), bits(want)), (count, width)


def activation_cases():
    """Arguments after h: rows, width, kind, row_scale, offs; and how many rows count."""
    for kind in KINDS:
        for rows, width in ((0, 8), (1, 1), (7, 7), (50, 64), (33, 1000), (5, 2048), (9, 14336)):
            for live in {0, rows // 2, rows}:
                offs = torch.tensor([live // 3, live], dtype=I32)
                yield kind, rows, width, None, None, rows
                yield kind, rows, width, randn(rows, dtype=F32, seed=5), offs, live


@pytest.mark.parametrize("op, dtype", every("activation"))
def test_activation_against_float64(op: str, dtype: torch.dtype, poison: None) -> None:
    for kind, rows, width, scale, offs, live in activation_cases():
        h = randn(rows, 2 * width if kind == "swiglu" else width, dtype=dtype)
        (want,) = reference(op, h.double(), kind, None if scale is None else scale.double(), offs)
        h[live:] = float("nan")  # what a matmul may leave there
        (got,) = cpu(kernel(op, h, kind, scale, offs))
        close(got, want)


@pytest.mark.parametrize("op, dtype", every("activation_backward"))
def test_activation_backward_against_float64(op: str, dtype: torch.dtype, poison: None) -> None:
    for kind, rows, width, scale, offs, live in activation_cases():
        h, da = (
            randn(rows, 2 * width if kind == "swiglu" else width, dtype=dtype),
            randn(rows, width, dtype=dtype, seed=1),
        )
        wide = None if scale is None else scale.double()
        want = reference(op, da.double(), h.double(), kind, wide, offs)
        h[live:] = float("nan")
        da[live:] = float("nan")
        got = cpu(kernel(op, da, h, kind, scale, offs))
        close(got[0], want[0])
        if scale is not None:
            close(got[1], want[1], dtype=dtype)


@pytest.mark.parametrize("op, dtype", every("unpack_into"))
def test_unpack_into_a_buffer_copies_bits_and_leaves_the_other_rows(op: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for count, rows in ((0, 3), (1, 1), (33, 40), (700, 1000)):
        for width in WIDTHS:
            order = torch.randperm(rows, generator=generator)[:count]
            received, before = randn(count, width, dtype=dtype), randn(rows, width, dtype=dtype, seed=1)
            want = before.index_copy(0, order, received)
            for kind in (I32, torch.int64):
                out = before.cuda()
                with registry.force("unpack_into", "cuda"):
                    assert ops.unpack(received.cuda(), order.to(kind).cuda(), out=out) is out
                assert torch.equal(bits(out.cpu()), bits(want)), (count, width)


def test_gradients_come_expanded() -> None:
    """autograd hands in stride-0 tensors: y.sum().backward()."""
    maps = routed(hard_ids()["mixed, unused"], 4)
    one = torch.ones((), device="cuda")
    (want,) = reference("combine_backward", torch.ones(6, 16), None, maps.slot_to_row, None, maps.num_rows)[:1]
    got = kernel("combine_backward", one.expand(6, 16), None, maps.slot_to_row, None, maps.num_rows)
    assert torch.equal(got[0].cpu(), want)
    h = randn(12, 16, dtype=F32)
    (want,) = reference("activation_backward", torch.ones(12, 8), h, "swiglu", None, None)[:1]
    got = kernel("activation_backward", one.expand(12, 8), h, "swiglu", None, None)
    close(got[0].cpu(), want)


def test_weights_in_float64_are_taken_and_answered_in_float64() -> None:
    maps = routed(hard_ids()["mixed, unused"], 4)
    dy, y, weights = randn(6, 8, dtype=F32), randn(maps.num_rows, 8, dtype=F32), randn(6, 2, dtype=F64)
    got = cpu(kernel("combine_backward", dy, y, maps.slot_to_row, weights, maps.num_rows))
    want = reference("combine_backward", dy, y, maps.slot_to_row, weights, maps.num_rows)
    assert got[1].dtype == F64
    close(got[1], want[1], dtype=F32)
