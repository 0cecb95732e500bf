"""Tiles of the expert MLP's Triton kernels dealt out by a counter, on a GPU: the bits of those in turn, graphs too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from tests import tolerances
from tests.gpu.test_gpu_expert_mlp import BF16, ENDS, F32, ROWS, forced, inputs, pieces, run
from tests.ops.cases import randn

pytestmark = pytest.mark.gpu


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for have, should in zip(got, want, strict=True):
        tolerances.same_bits(have, should)


@pytest.mark.parametrize("dtype, hidden, ffn", [(BF16, 512, 256), (BF16, 515, 257), (F32, 512, 256)])
def test_dealt_tiles_change_no_bit(dtype, hidden, ffn, monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    """Whoever takes a tile: alone, with few programs, and beside a kernel that has multiprocessors of its own."""
    for name in ENDS:
        for mapped in (False, True):
            values = inputs(name, "swiglu", dtype, hidden, ffn, mapped=mapped)
            with forced("triton"), monkeypatch.context() as patch:
                want = run(values, "swiglu")
                patch.setenv("MOE_OVERLAP_TILES", "dealt")
                for num_sms in (None, 3, 20):
                    same(run(values, "swiglu", num_sms=num_sms), want)
                busy = beside()
                same(run(values, "swiglu"), want)
                torch.cuda.current_stream().wait_stream(busy)


def beside() -> torch.cuda.Stream:
    """A stream on which matmuls are under way."""
    stream, square = torch.cuda.Stream(), torch.ones(1024, 1024, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            square = square @ square * 0
    return stream


def test_the_pieces_and_weights_without_a_list(monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    starts, ends = [700, 0, 300, 300], [1000, 290, 300, 650]
    x, w_in, w_out, *_ = inputs("balanced", "swiglu", BF16, 512, 256, mapped=False)
    rows, scale = (torch.arange(ROWS) * 7 % 300).int().cuda(), randn(ROWS, dtype=F32, seed=6).cuda()
    dy = randn(ROWS, 512, dtype=BF16, seed=5).cuda()
    with forced("triton"):
        want = pieces(x, dy, w_in, w_out, starts, ends, rows, scale)
        monkeypatch.setenv("MOE_OVERLAP_TILES", "dealt")
        same(pieces(x, dy, w_in, w_out, starts, ends, rows, scale), want)


def test_a_graph_replayed_twice_with_other_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters are zeroed by what is captured: a replay finds them as the one before left them."""
    values = inputs("balanced", "swiglu", BF16, 512, 256, mapped=True)
    dy = randn(ROWS, 512, dtype=BF16, seed=5).cuda()

    def both(floats: list[Tensor]) -> list[Tensor]:
        x, w_in, w_out, scale = floats
        y = ops.expert_mlp(x, w_in, w_out, values[5], kind="swiglu", row_to_token=values[4], row_scale=scale)
        with torch.no_grad():
            dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
            h, a = dy.new_ones(ROWS, w_in.shape[1]), dy.new_ones(ROWS, w_out.shape[2])
            ops.expert_mlp_wgrad(dy, dy, h, a, values[5], dw_in=dw_in, dw_out=dw_out)
        return [y, *torch.autograd.grad(y, floats, dy), dw_in, dw_out]

    def fresh() -> list[Tensor]:
        return [value.detach().requires_grad_() for value in values[:4]]

    with forced("triton"):
        monkeypatch.setenv("MOE_OVERLAP_TILES", "dealt")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            both(fresh())  # compiles; a capture must not
        torch.cuda.current_stream().wait_stream(side)
        graph, floats = torch.cuda.CUDAGraph(), fresh()
        with torch.cuda.graph(graph):
            captured = both(floats)
        monkeypatch.setenv("MOE_OVERLAP_TILES", "in_turn")
        for name in ("empty experts, a tail", "few rows each"):
            values[5].copy_(torch.tensor(ENDS[name], dtype=torch.int32))
            for _ in range(2):
                for value in captured:
                    value.detach().fill_(torch.nan)
                graph.replay()
                same([value.detach() for value in captured], [value.detach() for value in both(fresh())])
