"""The expert MLP on a GPU: Triton and the grouped matmul against float64, repeats, graphs, torch.compile, budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from moe_overlap.ops import registry, triton_kernels
from moe_overlap.ops.expert_mlp_contract import OPS
from tests import tolerances
from tests.ops.cases import KINDS, randn, weights

pytestmark = pytest.mark.gpu

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ENDS = {
    "balanced": (256, 512, 768, 1024),
    "empty experts, a tail": (0, 700, 700, 901),
    "one row": (1, 1, 1, 1),
    "few rows each": (3, 40, 77, 90),
}
ROWS, TOKENS = 1024, 300
# The kernels, and sizes: such that divide by everything, and such that divide by nothing.
WAYS = [("triton", 512, 256), ("triton", 515, 257), ("grouped_mm", 512, 256)]


@contextmanager
def forced(name: str) -> Iterator[None]:
    if name == "triton" and triton_kernels.missing():
        pytest.skip(str(triton_kernels.missing()))
    with ExitStack() as stack:
        for op in OPS:
            stack.enter_context(registry.force(op, name))
        yield


def inputs(name: str, kind: str, dtype: torch.dtype, hidden: int, ffn: int, *, mapped: bool) -> list:
    """x, w_in, w_out, row_scale, row_to_token, offs on the GPU."""
    w_in, w_out = weights(len(ENDS[name]), hidden, ffn, kind, dtype)
    x = randn(TOKENS if mapped else ROWS, hidden, dtype=dtype)
    row_to_token = torch.arange(ROWS, dtype=torch.int32) * 7 % (TOKENS + 1) - 1 if mapped else None
    values = [x, w_in, w_out, randn(ROWS, dtype=F32, seed=4), row_to_token, torch.tensor(ENDS[name], dtype=torch.int32)]
    return [value if value is None else value.cuda() for value in values]


def run(values: list, kind: str, *, num_sms: int | None = None) -> list[Tensor]:
    """y and the gradients of x, w_in, w_out and row_scale."""
    floats = [value.detach().requires_grad_() for value in values[:4]]
    x, w_in, w_out, scale = floats
    y = ops.expert_mlp(x, w_in, w_out, values[5], kind=kind, row_to_token=values[4], row_scale=scale, num_sms=num_sms)
    push = randn(*y.shape, dtype=y.dtype, seed=5).to(y.device)
    return [y.detach(), *torch.autograd.grad(y, floats, push)]


def right(values: list, kind: str) -> list[Tensor]:
    """The same from the reference in float64 on the CPU."""
    wide = [value if value is None else value.cpu() for value in values]
    wide[:4] = [value.double() for value in wide[:4]]
    dtype, push = values[0].dtype, randn(ROWS, values[0].shape[1], dtype=values[0].dtype, seed=5)
    floats = [value.requires_grad_() for value in wide[:4]]
    y = ops.expert_mlp(*floats[:3], wide[5], kind=kind, row_to_token=wide[4], row_scale=floats[3])
    assert y.dtype == F64 and dtype == push.dtype
    return [y.detach(), *torch.autograd.grad(y, floats, push.double())]


def ways(*operators: str) -> list:
    """(way, dtype, hidden, ffn) for each, covering what it names."""
    cases = [(way, dtype, *sizes) for way, *sizes in WAYS for dtype in (BF16, F16, F32)]
    return [
        pytest.param(*case, marks=[pytest.mark.covers(op, case[1], case[0]) for op in operators])
        for case in cases
        if case[:2] not in (("grouped_mm", F16), ("grouped_mm", F32))  # torch's has bfloat16 only
    ]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way, dtype, hidden, ffn", ways("expert_mlp", "expert_mlp_backward"))
def test_values_and_gradients(way, dtype, hidden, ffn, kind, name, mapped, poison) -> None:
    values = inputs(name, kind, dtype, hidden, ffn, mapped=mapped)
    with forced(way):
        got = run(values, kind)
    assert not got[0][ENDS[name][-1] :].any()
    for have, should in zip(got, right(values, kind), strict=True):
        tolerances.close(have.cpu(), should, dtype)


@pytest.mark.parametrize("way", ["triton", "grouped_mm"])
def test_a_hundred_repeats_give_the_same_bits(way, poison) -> None:
    values = inputs("empty experts, a tail", "swiglu", BF16, 512, 256, mapped=True)
    with forced(way):
        first = run(values, "swiglu")
        for _ in range(100):
            for have, should in zip(run(values, "swiglu"), first, strict=True):
                tolerances.same_bits(have, should)


def test_a_budget_changes_no_bit() -> None:
    values = inputs("few rows each", "swiglu", BF16, 512, 256, mapped=True)
    with forced("triton"):
        for have, should in zip(run(values, "swiglu", num_sms=20), run(values, "swiglu"), strict=True):
            tolerances.same_bits(have, should)


def test_captured_in_a_graph_and_replayed_with_other_groups() -> None:
    values = inputs("balanced", "swiglu", BF16, 512, 256, mapped=True)
    with forced("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(values, "swiglu")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        floats = [value.detach().requires_grad_() for value in values[:4]]
        push = randn(ROWS, 512, dtype=BF16, seed=5).cuda()
        with torch.cuda.graph(graph):
            y = ops.expert_mlp(*floats[:3], values[5], kind="swiglu", row_to_token=values[4], row_scale=floats[3])
            captured = [y, *torch.autograd.grad(y, floats, push)]
        values[5].copy_(torch.tensor(ENDS["empty experts, a tail"], dtype=torch.int32))
        graph.replay()
        for have, should in zip(captured, run(values, "swiglu"), strict=True):
            tolerances.same_bits(have, should)


@pytest.mark.time_limit(400)
def test_torch_compile() -> None:
    torch._dynamo.reset()
    values = inputs("balanced", "swiglu", BF16, 512, 256, mapped=True)

    def layer(x, w_in, w_out, scale, row_to_token, offs) -> Tensor:
        return ops.expert_mlp(x, w_in, w_out, offs, kind="swiglu", row_to_token=row_to_token, row_scale=scale) * 2

    with forced("triton"):
        for have, should in zip(_both(torch.compile(layer, fullgraph=True), values), _both(layer, values), strict=True):
            tolerances.same_bits(have, should)


def _both(layer, values: list) -> list[Tensor]:
    floats = [value.detach().requires_grad_() for value in values[:4]]
    y = layer(*floats, *values[4:])
    return [y.detach(), *torch.autograd.grad(y, floats, torch.ones_like(y))]


def pieces(x, dy, w_in, w_out, starts, ends, rows=None, scale=None) -> list[Tensor]:
    """With a scale dh is written in place of h, and dscale comes last."""
    read = {"starts": starts, "rows": rows}
    y, h = ops.expert_mlp_forward(x, w_in, w_out, ends, kind="swiglu", scale=scale, **read)
    saved = h.clone()
    in_place = None if scale is None else h
    dx, dh, a, dscale = ops.expert_mlp_dgrad(dy, h, w_in, w_out, ends, kind="swiglu", scale=scale, dh=in_place, **read)
    dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
    ops.expert_mlp_wgrad(x, dy, dh, a, ends, dw_in=dw_in, dw_out=dw_out, **read)
    return [y, saved, dx, dh, a, dw_in, dw_out, *([] if dscale is None else [dscale])]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("way, dtype, hidden, ffn", ways("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad"))
def test_the_pieces(way, dtype, hidden, ffn, on_host, shared, poison) -> None:
    """Ranges apart, and rows that several experts read, with a factor each.

    Adjacent ranges that the host knows for torch's grouped matmul, which takes no others.
    """
    starts, ends = [700, 0, 300, 300], [1000, 290, 300, 650]
    if way == "grouped_mm":
        starts, ends, on_host = [0, 290, 290, 650], [290, 290, 650, 1000], True
    x, w_in, w_out, *_ = inputs("balanced", "swiglu", dtype, hidden, ffn, mapped=False)
    dy = randn(ROWS, hidden, dtype=dtype, seed=5).cuda()
    bounds = [torch.tensor(value, dtype=torch.int32) for value in (starts, ends)]
    rows = (torch.arange(ROWS) * 7 % 300).int() if shared else None
    scale = randn(ROWS, dtype=F32, seed=6) if shared else None
    there = [None if value is None else value.cuda() for value in (rows, scale)]
    with forced(way):
        got = pieces(x, dy, w_in, w_out, *(value if on_host else value.cuda() for value in bounds), *there)
    wide = None if scale is None else scale.double()
    want = pieces(*(value.cpu().double() for value in (x, dy, w_in, w_out)), starts, ends, rows, wide)
    for have, should in zip(got, want, strict=True):
        tolerances.close(have.cpu(), should, dtype)
