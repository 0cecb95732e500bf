"""What holds for all kernels: the same bits every time, 64-bit offsets, CUDA graphs, the current stream, no sync."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

import moe_overlap
from moe_overlap.ops import cuda_kernels, registry, triton_kernels
from tests.gpu.both import MOE, kernel
from tests.ops.cases import randn
from tests.tolerances import bits, close

pytestmark = pytest.mark.gpu

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
T, K, E, D = 3000, 8, 128, 1024


def chain(x_TD: torch.Tensor, logits_TE: torch.Tensor) -> list[torch.Tensor]:
    """Every kernel once, each fed by the one before: route, sort, copy, activate, sum, and the backward of it."""
    weights_TK, ids_TK, counts_E, status = MOE.gate_topk(logits_TE, None, K, 1, 1, "softmax", True, 1.0)
    counts, offs, slot_to_row, row_to_slot = MOE.row_map(ids_TK, E, 0, E, 8, None)
    rows = row_to_slot.shape[0]
    x_RD = MOE.permute(x_TD, slot_to_row, offs, rows)
    scale_R = weights_TK.reshape(-1)[row_to_slot.clamp(min=0)].contiguous()
    a_RF = MOE.activation(x_RD, "swiglu", scale_R, offs)
    y_TF = MOE.combine(a_RF, slot_to_row, weights_TK, None)
    dy_RF, dweights_TK = MOE.combine_backward(y_TF, a_RF, slot_to_row, weights_TK, rows)
    dh_RD, dscale_R = MOE.activation_backward(dy_RF, x_RD, "swiglu", scale_R, offs)
    dlogits_TE = MOE.gate_topk_backward(dweights_TK, logits_TE, ids_TK, "softmax", True, 1.0)
    order = torch.arange(rows - 1, -1, -1, device=x_TD.device)
    packed = MOE.unpack(MOE.pack(dh_RD, order), order)
    return [weights_TK, ids_TK, counts_E, status, counts, offs, slot_to_row, row_to_slot, x_RD, a_RF, y_TF, dy_RF,
            dweights_TK, dh_RD, dscale_R, dlogits_TE, packed]  # fmt: skip


@contextmanager
def all_forced(implementation: str = "cuda") -> Iterator[None]:
    """All kernels of one kind, verified or not."""
    with ExitStack() as stack:
        for op in cuda_kernels.OPS if implementation == "cuda" else triton_kernels.KERNELS:
            stack.enter_context(registry.force(op, implementation))
        yield


@pytest.fixture
def forced() -> Iterator[None]:
    with all_forced():
        yield


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(T, D, dtype=BF16, seed=seed).cuda(), randn(T, E, dtype=F32, seed=seed + 1).cuda()


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(bits(have), bits(should)) for have, should in zip(first, second, strict=True))


def test_a_hundred_repeats_give_the_same_bits(forced: None, poison: None) -> None:
    x_TD, logits_TE = inputs()
    first = chain(x_TD, logits_TE)
    assert not any(value.isnan().any() for value in first if value.is_floating_point())
    for _ in range(100):
        assert same(chain(x_TD, logits_TE), first)


def test_a_captured_graph_replays_on_new_inputs(forced: None) -> None:
    x_TD, logits_TE = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        chain(x_TD, logits_TE)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(x_TD, logits_TE)
    for seed in (5, 6):
        new_x, new_logits = inputs(seed)
        x_TD.copy_(new_x)
        logits_TE.copy_(new_logits)
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, chain(new_x, new_logits))


def test_kernels_run_on_the_current_stream_and_never_wait(forced: None) -> None:
    x_TD, logits_TE = inputs()
    want = chain(x_TD, logits_TE)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    late_TD = torch.zeros_like(x_TD)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late_TD.copy_(x_TD)  # a kernel on another stream would read zeros
            got = chain(late_TD, logits_TE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert same(got, want)


def needs_gib(amount: float) -> None:
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    if total < amount:
        pytest.skip(f"needs {amount:.0f} GiB of device memory, there are {total:.0f}")


def gate(logits_TE: torch.Tensor) -> list[torch.Tensor]:
    return list(MOE.gate_topk(logits_TE, None, K, 1, 1, "softmax", True, 1.0))


def test_gate_counts_the_same_in_every_replay_beside_itself(forced: None) -> None:
    """Its blocks agree by flags in memory: a graph finds those of its last run, another stream has its own."""
    logits_TE = inputs()[1].repeat(20, 1)  # more blocks than are resident at once
    want = gate(logits_TE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gate(logits_TE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(200):
        graph.replay()
        with torch.cuda.stream(side):
            beside = gate(logits_TE)
        torch.cuda.synchronize()
        assert same(captured, want) and same(beside, want)


def test_gate_of_no_tokens_counts_none(forced: None, poison: None) -> None:
    _, _, counts_E, status = gate(torch.empty(0, E, device="cuda"))
    assert not counts_E.any() and not status.any()


@pytest.mark.parametrize("part", ["gate", "permute and combine", "activation", "pack"])
def test_past_2_to_the_31_elements(forced: None, part: str) -> None:
    """Rows near the end lie beyond what 32 bits reach: 2^31 / 7168 is row 299,593."""
    needs_gib(40)
    width, tokens, k = 7168, 40_000, 8
    picked = torch.tensor([0, 1, 299_592, 299_593, 299_594, tokens * k - 1])
    if part == "gate":
        logits_TE = torch.randn((1 << 23) + 100, 256, device="cuda")
        weights_TK, ids_TK, counts_E, status = gate(logits_TE)
        (dlogits_TE,) = kernel("gate_topk_backward", weights_TK, logits_TE, ids_TK, "softmax", True, 1.0)
        last = logits_TE[-200:].clone()
        some = gate(last)
        assert torch.equal(weights_TK[-200:], some[0]) and torch.equal(ids_TK[-200:], some[1])
        assert torch.equal(counts_E.long(), ids_TK.view(-1).bincount(minlength=256)) and not status.any()
        (want,) = kernel("gate_topk_backward", some[0], last, some[1], "softmax", True, 1.0)
        assert torch.equal(dlogits_TE[-200:], want)
    elif part == "permute and combine":
        x_TD = torch.randn(tokens, width, device="cuda", dtype=BF16)
        slot_to_row = torch.randperm(tokens * k, device="cuda").to(I32).view(tokens, k)
        (x_RD,) = kernel("permute", x_TD, slot_to_row, None, tokens * k)
        slot_of_row = slot_to_row.view(-1).argsort()[picked.cuda()]
        assert torch.equal(x_RD[picked.cuda()], x_TD[slot_of_row // k])
        weights_TK = torch.full((tokens, k), 1 / k, device="cuda")
        (y_TD,) = kernel("combine", x_RD, slot_to_row, weights_TK, None)
        assert torch.equal(y_TD, x_TD)  # eight eighths of the same number
        dx_RD, dweights_TK = kernel("combine_backward", x_TD, x_RD, slot_to_row, weights_TK, tokens * k)
        assert torch.equal(dx_RD[picked.cuda()], x_TD[slot_of_row // k] / k)
        close(dweights_TK[-1], x_TD[-1].double().square().sum().expand(k))
    elif part == "activation":
        h = torch.randn(tokens * k, 2 * width, device="cuda", dtype=BF16)
        (a,) = kernel("activation", h, "swiglu", None, None)
        some = h[picked.cuda()].double().requires_grad_()
        want = torch.nn.functional.silu(some[:, :width]) * some[:, width:]
        close(a[picked.cuda()], want.detach())
        dh, _ = kernel("activation_backward", a, h, "swiglu", None, None)
        want.backward(a[picked.cuda()].double())
        close(dh[picked.cuda()], some.grad)
    else:
        rows = torch.randn(tokens * k, width, device="cuda", dtype=BF16)
        order = torch.arange(tokens * k - 1, -1, -1, device="cuda")
        (packed,) = kernel("pack", rows, order)
        assert torch.equal(packed[picked.cuda()], rows[order[picked.cuda()]])
        assert torch.equal(kernel("unpack", packed, order)[0], rows)


@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_a_layer_trains_alike_on_kernels_and_on_references(implementation: str) -> None:
    if implementation == "triton" and triton_kernels.missing():
        pytest.skip(str(triton_kernels.missing()))
    torch.manual_seed(0)
    layer = moe_overlap.MoELayer(64, 96, 8, 2).cuda()
    x_TD = torch.randn(50, 64, device="cuda")
    dy_TD = torch.randn(50, 64, device="cuda")

    def step() -> list[torch.Tensor]:
        layer.zero_grad()
        x = x_TD.clone().requires_grad_(True)
        y_TD = layer(x)
        y_TD.backward(dy_TD)
        return [y_TD.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    want = step()
    with all_forced(implementation):
        got = step()
    assert len(got) == len(want) > 3
    for have, should in zip(got, want, strict=True):
        close(have, should)


def test_maps_of_an_empty_step_are_empty(forced: None) -> None:
    results = kernel("row_map", torch.zeros(0, 2, dtype=I32), 4, 0, 4, 1, None)
    assert [tuple(value.shape) for value in results] == [(4,), (4,), (0, 2), (0,)]
    assert not results[0].any() and not results[1].any()
