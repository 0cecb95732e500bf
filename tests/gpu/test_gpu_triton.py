"""The small Triton kernels on a GPU against the references: maps and copies bit for bit, the rest to the tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from moe_overlap.ops import registry, triton_kernels
from tests.gpu.both import MOE, Results, cpu, on_gpu, reference
from tests.ops.cases import KINDS, hard_ids, randn, routed
from tests.strategies import LOGITS, make_logits
from tests.tolerances import bits, close, same_bits

pytestmark = pytest.mark.gpu

F32, F64, I32 = torch.float32, torch.float64, torch.int32
# Each width, K and dtype is a compilation of half a second: few of them, such as divide by everything and by nothing.
WIDTHS = (7, 1000, 2048)
GATES = ((0, 4, 2, (1, 1)), (333, 128, 8, (1, 1)), (77, 256, 8, (8, 4)), (50, 60, 4, (1, 1)))
"""Tokens, experts, K, groups."""


@pytest.fixture(autouse=True)
def installed() -> None:
    if triton_kernels.missing():
        pytest.skip(str(triton_kernels.missing()))


def kernel(op: str, *arguments: Any) -> Results:
    """The results of the Triton kernel, on the CPU; CPU arguments are copied to the GPU."""
    with registry.force(op, "triton"):
        result = getattr(MOE, op).default(*map(on_gpu, arguments))
    return cpu(result if isinstance(result, tuple) else (result,))


def every(op: str, *others: str) -> list[Any]:
    """Each dtype of `op`; the test covers `others` in it, too."""
    return [
        pytest.param(
            dtype,
            marks=[pytest.mark.covers(name, dtype, "triton") for name in (op, *others)],
            id=f"{op}-{str(dtype)[6:]}",
        )
        for dtype in triton_kernels.KERNELS[op].dtypes
    ]


def routings() -> Iterator[Any]:
    for ids_TK in hard_ids().values():
        yield routed(ids_TK, 4)
        yield routed(ids_TK, 4, align=8)
    ids_TK = torch.randint(-1, 60, (700, 8), generator=torch.Generator().manual_seed(0), dtype=I32)
    yield routed(ids_TK, 60, align=16)


@pytest.mark.parametrize("dtype", every("gate_topk", "gate_topk_backward"))
@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
def test_gate_chooses_like_the_reference(dtype: torch.dtype, score: str, poison: None) -> None:
    for kind in LOGITS:
        for tokens, experts, k, groups in GATES if dtype == F32 else GATES[-1:]:
            logits = make_logits(kind, tokens, experts, dtype=dtype, seed=experts)
            if tokens and kind == "normal":
                logits[1, 3], logits[2], logits[3, 0] = torch.nan, -torch.inf, torch.inf
            got, want = (run("gate_topk", logits, None, k, *groups, score, True, 2.5) for run in (kernel, reference))
            for have, should in zip(got[1:], want[1:], strict=True):
                assert torch.equal(have, should), (kind, experts)
            close(got[0], want[0])
            arguments = randn(tokens, k, dtype=dtype, seed=1), logits, want[1], score, True, 2.5
            close(kernel("gate_topk_backward", *arguments)[0], reference("gate_topk_backward", *arguments)[0])


@pytest.mark.covers("row_map", I32, "triton")
def test_row_map_is_the_reference_bit_for_bit(poison: None) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = [(ids_TK, 4, 0, 4) for ids_TK in hard_ids().values()]
    for tokens, k, experts in ((1, 1, 1), (513, 3, 7), (4096, 8, 128), (20000, 8, 257), (300, 2, 4095)):
        ids_TK = torch.randint(-1, experts, (tokens, k), generator=generator, dtype=I32)
        cases += [(ids_TK, experts, 0, experts), (ids_TK, experts, experts // 3, experts)]
    for arguments in cases:
        for align, capacity in ((1, None), (16, None), (8, 3)):
            got, want = (run("row_map", *arguments, align, capacity) for run in (kernel, reference))
            for have, should in zip(got, want, strict=True):
                assert torch.equal(have, should), (arguments[1:], align, capacity)


@pytest.mark.parametrize("dtype", every("permute"))
def test_permute_copies_bits(dtype: torch.dtype, poison: None) -> None:
    for maps in routings():
        for width in WIDTHS:
            arguments = randn(maps.ids_TK.shape[0], width, dtype=dtype), maps.slot_to_row, maps.offs, maps.num_rows + 5
            assert torch.equal(bits(kernel("permute", *arguments)[0]), bits(reference("permute", *arguments)[0]))


@pytest.mark.parametrize("dtype", every("combine", "combine_backward"))
def test_combine_and_its_backward_against_float64(dtype: torch.dtype, poison: None) -> None:
    for maps in routings():
        tokens, top_k = maps.ids_TK.shape
        weights = randn(tokens, top_k, dtype=F64 if dtype == F64 else F32, seed=1)
        for width in WIDTHS[::2] if top_k > 1 else ():
            y, x = randn(maps.num_rows, width, dtype=dtype), randn(tokens, width, dtype=dtype, seed=2)
            for given, residual in ((None, None), (weights, x)):
                wide = [v if v is None else v.double() for v in (given, residual)]
                (want,) = reference("combine", y.double(), maps.slot_to_row, *wide)
                (got,) = kernel("combine", y, maps.slot_to_row, given, residual)
                assert got.dtype == dtype
                close(got, want)
            want = reference("combine_backward", x.double(), y.double(), maps.slot_to_row, wide[0], maps.num_rows)
            got = kernel("combine_backward", x, y, maps.slot_to_row, weights, maps.num_rows)
            for have, should in zip(got, want, strict=True):
                close(have, should, dtype)


@pytest.mark.parametrize("dtype", every("activation", "activation_backward"))
@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_their_backward_against_float64(dtype: torch.dtype, kind: str, poison: None) -> None:
    for rows, width in ((0, 4), (130, 768), (77, 1025)):
        h = randn(rows, 2 * width if kind == "swiglu" else width, dtype=dtype)
        da, scale = randn(rows, width, dtype=dtype, seed=1), randn(rows, dtype=F64 if dtype == F64 else F32, seed=2)
        offs = torch.tensor([0, rows // 2, rows - rows // 4], dtype=I32)
        wide = scale.double()
        (want,) = reference("activation", h.double(), kind, wide, offs)
        close(kernel("activation", h, kind, scale, offs)[0], want)
        want = reference("activation_backward", da.double(), h.double(), kind, wide, offs)
        for have, should in zip(kernel("activation_backward", da, h, kind, scale, offs), want, strict=True):
            close(have, should, dtype)


def test_a_hundred_repeats_give_the_same_bits(poison: None) -> None:
    maps = list(routings())[-1]
    tokens, top_k = maps.ids_TK.shape
    x, y = (randn(rows, 1000, dtype=torch.bfloat16) for rows in (tokens, maps.num_rows))
    weights, logits = randn(tokens, top_k, dtype=F32), make_logits("ties", tokens, 60)
    h = randn(maps.num_rows, 1000, dtype=torch.bfloat16, seed=3)
    calls = [
        ("gate_topk", (logits, None, 8, 1, 1, "softmax", True, 1.0)),
        ("row_map", (maps.ids_TK, 60, 0, 60, 16, None)),
        ("combine", (y, maps.slot_to_row, weights, x)),
        ("combine_backward", (x, y, maps.slot_to_row, weights, maps.num_rows)),
        ("activation_backward", (y[:, :500], h, "swiglu", weights.new_ones(maps.num_rows), maps.offs)),
    ]
    for op, arguments in calls:
        given = tuple(map(on_gpu, arguments))
        first = kernel(op, *given)
        for _ in range(100):
            for have, should in zip(kernel(op, *given), first, strict=True):
                assert torch.equal(bits(have), bits(should)), op


@pytest.mark.time_limit(400)
def test_torch_compile() -> None:
    """Gate, maps, rows and activation in one graph, forward and backward. The operators stay what they are."""
    torch._dynamo.reset()
    leaves = randn(256, 128, dtype=F32).cuda(), randn(256, 60, dtype=F32, seed=1).cuda()

    def routed_activation(x_TD: torch.Tensor, logits_TE: torch.Tensor) -> torch.Tensor:
        weights_TK, ids_TK, _, _ = MOE.gate_topk(logits_TE, None, 8, 1, 1, "softmax", True, 1.0)
        _, offs, slot_to_row, row_to_slot = MOE.row_map(ids_TK, 60, 0, 60, 1, None)
        x_RD = MOE.permute(x_TD, slot_to_row, offs, row_to_slot.shape[0])
        return MOE.combine(MOE.activation(x_RD, "swiglu", None, offs), slot_to_row, weights_TK, None)

    def both(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        fresh = [value.clone().requires_grad_() for value in leaves]
        y_TF = function(*fresh)
        return [y_TF.detach(), *torch.autograd.grad(y_TF, fresh, torch.ones_like(y_TF))]

    with ExitStack() as stack:
        for op, entry in triton_kernels.KERNELS.items():
            if entry.module != "expert_mlp_triton":
                stack.enter_context(registry.force(op, "triton"))
        got, want = both(torch.compile(routed_activation, fullgraph=True)), both(routed_activation)
    for have, should in zip(got, want, strict=True):
        same_bits(have, should)


def test_captured_in_a_graph_and_replayed_with_another_routing() -> None:
    ids = torch.randint(0, 60, (256, 8), generator=torch.Generator().manual_seed(1), dtype=I32)
    held, x = ids.cuda(), randn(256, 512, dtype=torch.bfloat16).cuda()
    weights = torch.full((256, 8), 0.125, device="cuda")

    def there_and_back() -> torch.Tensor:
        _, offs, slot_to_row, row_to_slot = MOE.row_map(held, 60, 0, 60, 1, None)
        return MOE.combine(MOE.permute(x, slot_to_row, offs, row_to_slot.shape[0]), slot_to_row, weights, None)

    with registry.force("row_map", "triton"), registry.force("permute", "triton"), registry.force("combine", "triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            there_and_back()  # compiles; a capture must not
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = there_and_back()
        held.copy_(ids.flip(0))
        graph.replay()
        assert torch.equal(captured, x)  # eight eighths of each row
