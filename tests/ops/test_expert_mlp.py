"""expert_mlp and its raw pieces against a dense float64 loop."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import expert_loop
from tests import oracle, tolerances
from tests.ops.cases import DTYPES, KINDS, randn, weights

pytestmark = pytest.mark.usefixtures("poison")

OFFS = {
    "balanced": (3, 6, 9),
    "empty experts": (0, 5, 5),
    "all to the last": (0, 0, 9),
    "tail": (2, 3, 7),
    "nobody": (0, 0, 0),
    "one row each": (1, 2, 3),
}
ROWS, HIDDEN, FFN, EXPERTS = 9, 6, 5, 3


def offs_of(name: str) -> Tensor:
    return torch.tensor(OFFS[name], dtype=torch.int32)


def dense(x: Tensor, w_in: Tensor, w_out: Tensor, ends, kind: str, row_to_token=None, row_scale=None) -> Tensor:
    """Row by row in float64."""
    rows = x.shape[0] if row_to_token is None else row_to_token.shape[0]
    experts = [next((i for i, end in enumerate(ends) if row < end), None) for row in range(rows)]
    y = []
    for row, expert in enumerate(experts):
        token = row if row_to_token is None else int(row_to_token[row])
        if expert is None or token < 0:
            y.append(torch.zeros(w_out.shape[1], dtype=torch.float64))
        else:
            scale = 1.0 if row_scale is None else row_scale[row].double()
            y.append(oracle.mlp(x[token].double(), w_in[expert].double(), w_out[expert].double(), kind) * scale)
    nothing = sum(0 * value.double().sum() for value in (x, w_in, w_out, *([] if row_scale is None else [row_scale])))
    return torch.stack(y) + nothing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OFFS)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_values_and_gradients(dtype, kind, name, mapped, scaled) -> None:
    w_in, w_out = weights(EXPERTS, HIDDEN, FFN, kind, dtype, grad=True)
    x = randn(4 if mapped else ROWS, HIDDEN, dtype=dtype, grad=True)
    row_to_token = torch.tensor([3, 0, 0, 1, -1, 3, 2, 1, 0], dtype=torch.int32) if mapped else None
    router_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale = randn(ROWS, dtype=router_dtype, seed=4, grad=True) if scaled else None
    offs = offs_of(name)
    y = ops.expert_mlp(x, w_in, w_out, offs, kind=kind, row_to_token=row_to_token, row_scale=scale)
    want = dense(x, w_in, w_out, OFFS[name], kind, row_to_token, scale)
    assert y.dtype == dtype and not y[OFFS[name][-1] :].any()
    tolerances.close(y, want)
    push = randn(ROWS, HIDDEN, dtype=dtype, seed=5)
    inputs = [value for value in (x, w_in, w_out, scale) if value is not None]
    gradients = torch.autograd.grad(y, inputs, push)
    wanted = torch.autograd.grad(want, inputs, push.double())
    for value, have, should in zip(inputs, gradients, wanted, strict=True):
        assert have.dtype == value.dtype
        tolerances.close(have, should, dtype)
    with torch.no_grad():
        tolerances.same_bits(
            ops.expert_mlp(x, w_in, w_out, offs, kind=kind, row_to_token=row_to_token, row_scale=scale), y
        )


def test_a_tail_of_nan_reaches_nobody() -> None:
    w_in, w_out = weights(EXPERTS, HIDDEN, FFN, "swiglu", torch.float32, grad=True)
    x = randn(ROWS, HIDDEN, dtype=torch.float32)
    x[7:] = torch.nan
    x.requires_grad_()
    y = ops.expert_mlp(x, w_in, w_out, offs_of("tail"), kind="swiglu")
    push = torch.ones(ROWS, HIDDEN)
    push[7:] = torch.nan
    gradients = torch.autograd.grad(y, (x, w_in, w_out), push)
    assert all(value.isfinite().all() for value in (y, *gradients))
    assert not gradients[0][7:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OFFS)
def test_gradcheck(kind, name) -> None:
    w_in, w_out = weights(EXPERTS, 3, 2, kind, torch.float64, grad=True)
    offs, scale = offs_of(name), randn(ROWS, seed=4, grad=True)
    # relu has a kink: no entry of h may lie near it.
    x = randn(ROWS, 3, seed=11, grad=True)
    assert torch.autograd.gradcheck(
        lambda *v: ops.expert_mlp(*v[:3], offs, kind=kind, row_scale=v[3]), (x, w_in, w_out, scale)
    )
    row_to_token = torch.tensor([1, 1, 0, -1, 2, 2, 2, 0, 1], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda *v: ops.expert_mlp(*v, offs, kind=kind, row_to_token=row_to_token),
        (randn(3, 3, seed=11, grad=True), w_in, w_out),
    )


def test_no_rows() -> None:
    w_in, w_out = weights(EXPERTS, HIDDEN, FFN, "gelu", torch.float32, grad=True)
    x = torch.zeros(0, HIDDEN, requires_grad=True)
    y = ops.expert_mlp(x, w_in, w_out, offs_of("nobody"), kind="gelu")
    gradients = torch.autograd.grad(y.sum(), (x, w_in, w_out))
    assert y.shape == (0, HIDDEN) and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_each_gradient_alone_is_the_same(wanted) -> None:
    values = [randn(ROWS, HIDDEN), *weights(EXPERTS, HIDDEN, FFN, "swiglu", torch.float64), randn(ROWS, seed=4)]

    def run(which) -> tuple[Tensor, ...]:
        inputs = [value.clone().requires_grad_(i in which) for i, value in enumerate(values)]
        y = ops.expert_mlp(*inputs[:3], offs_of("tail"), kind="swiglu", row_scale=inputs[3])
        return torch.autograd.grad(y, [inputs[i] for i in which], randn(ROWS, HIDDEN, seed=6))

    everything = run((0, 1, 2, 3))
    for i, have in zip(wanted, run(wanted), strict=True):
        tolerances.same_bits(have, everything[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OFFS)
def test_raw_pieces_equal_the_operator_bit_for_bit(dtype, kind, name) -> None:
    w_in, w_out = weights(EXPERTS, HIDDEN, FFN, kind, dtype, grad=True)
    x, offs = randn(ROWS, HIDDEN, dtype=dtype, grad=True), offs_of(name)
    push = randn((), dtype=dtype, seed=5).expand(ROWS, HIDDEN)  # stride 0, as autograd hands out
    y = ops.expert_mlp(x, w_in, w_out, offs, kind=kind)
    want_dx, want_dw_in, want_dw_out = torch.autograd.grad(y, (x, w_in, w_out), push)
    raw_y, h = ops.expert_mlp_forward(x, w_in, w_out, offs, kind=kind)
    dx, dh, a, _ = ops.expert_mlp_dgrad(push, h, w_in, w_out, offs, kind=kind)
    dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
    ops.expert_mlp_wgrad(x, push, dh, a, offs, dw_in=dw_in, dw_out=dw_out)
    assert not any(value.requires_grad for value in (raw_y, h, dx, dh, a))
    pairs = ((raw_y, y), (dx, want_dx), (dw_in, want_dw_in), (dw_out, want_dw_out))
    for have, should in pairs:
        tolerances.same_bits(have, should)
    for value in (h, dh, a):
        assert value.isfinite().all() and not value[OFFS[name][-1] :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_apart_write_nothing_else(kind) -> None:
    starts, ends = torch.tensor([6, 0, 4], dtype=torch.int32), torch.tensor([9, 2, 4], dtype=torch.int32)
    w_in, w_out = weights(EXPERTS, HIDDEN, FFN, kind, torch.float64)
    x, dy = randn(ROWS, HIDDEN), randn(ROWS, HIDDEN, seed=5)
    mark = 7.0
    y, h, dx, dh = (
        torch.full((ROWS, width), mark).double() for width in (HIDDEN, w_in.shape[1], HIDDEN, w_in.shape[1])
    )
    a = torch.full((ROWS, FFN), mark).double()
    got = ops.expert_mlp_forward(x, w_in, w_out, ends, starts=starts, kind=kind, y=y, h=h)
    assert got[0] is y and got[1] is h
    got = ops.expert_mlp_dgrad(dy, h, w_in, w_out, ends, starts=starts, kind=kind, dx=dx, dh=dh, a=a)
    assert got[0] is dx and got[1] is dh and got[2] is a
    for value in (y, h, dx, dh, a):
        assert (value[2:6] == mark).all()
    order = torch.tensor([6, 7, 8, 0, 1])
    offs = torch.tensor([3, 5, 5], dtype=torch.int32)
    dense_y, dense_h = ops.expert_mlp_forward(x[order], w_in, w_out, offs, kind=kind)
    dense_dx, dense_dh, dense_a, _ = ops.expert_mlp_dgrad(dy[order], dense_h, w_in, w_out, offs, kind=kind)
    pairs = ((y, dense_y), (h, dense_h), (dx, dense_dx), (dh, dense_dh), (a, dense_a))
    for have, should in pairs:
        tolerances.close(have[order], should)
    dw_in, dw_out = torch.full_like(w_in, mark), torch.full_like(w_out, mark)
    ops.expert_mlp_wgrad(x, dy, dh, a, ends, starts=starts, dw_in=dw_in, dw_out=dw_out, experts=(1, 3))
    assert (dw_in[0] == mark).all() and not dw_in[2].any() and not dw_out[2].any()
    tolerances.close(dw_in[1], dh[0:2].T @ x[0:2])
    tolerances.close(dw_out[1], dy[0:2].T @ a[0:2])


def test_new_buffers_are_zero_between_the_ranges() -> None:
    w_in, w_out = weights(EXPERTS, HIDDEN, FFN, "gelu", torch.float32)
    x = randn(ROWS, HIDDEN, dtype=torch.float32)
    y, h = ops.expert_mlp_forward(x, w_in, w_out, [9, 2, 4], starts=[6, 1, 4], kind="gelu")
    outside = torch.tensor([0, 2, 3, 4, 5])
    assert not y[outside].any() and not h[outside].any() and y[1].any() and y[8].any()


def test_where_the_rows_lie_in_memory_changes_nothing() -> None:
    w_in, w_out = weights(1, 48, 80, "gelu", torch.float32)
    memory = torch.zeros(1 + 33 * 48)
    x = randn(33, 48, dtype=torch.float32)
    shifted = memory[1:].view(33, 48).copy_(x)
    ends = torch.tensor([33], dtype=torch.int32)
    assert shifted.data_ptr() % 64 != 0
    for given in (shifted, x.t().contiguous().t()):
        for have, should in zip(
            ops.expert_mlp_forward(given, w_in, w_out, ends, kind="gelu"),
            ops.expert_mlp_forward(x, w_in, w_out, ends, kind="gelu"),
            strict=True,
        ):
            tolerances.same_bits(have, should)


@pytest.mark.parametrize(
    "field, change",
    [
        ("kind", {"kind": "tanh"}),
        ("x", {"x": torch.zeros(4, 3, dtype=torch.int64)}),
        ("w_in", {"w_in": torch.zeros(2, 8, 4)}),
        ("w_in", {"w_in": torch.zeros(2, 7, 3)}),
        ("w_in", {"w_in": torch.zeros(2, 8, 3, dtype=torch.float64)}),
        ("w_out", {"w_out": torch.zeros(2, 3, 5)}),
        ("offs", {"offs": torch.zeros(3, dtype=torch.int32)}),
        ("offs", {"offs": torch.zeros(2, dtype=torch.int64)}),
        ("row_scale", {"row_scale": torch.zeros(3)}),
        ("row_to_token", {"row_to_token": torch.tensor([0, 4], dtype=torch.int32)}),
        ("row_to_token", {"row_to_token": torch.zeros(2)}),
        ("num_sms", {"num_sms": 0}),
        ("starts, ends", {"offs": torch.tensor([2, 5], dtype=torch.int32)}),
        ("starts, ends", {"offs": torch.tensor([3, 2], dtype=torch.int32)}),
    ],
)
def test_bad_arguments(field, change) -> None:
    arguments = {
        "x": torch.zeros(4, 3),
        "w_in": torch.zeros(2, 8, 3),
        "w_out": torch.zeros(2, 3, 4),
        "offs": torch.tensor([1, 2], dtype=torch.int32),
        "kind": "swiglu",
        **change,
    }
    with pytest.raises(ConfigError) as caught:
        ops.expert_mlp(**arguments)
    assert caught.value.field == field
    if field in ("kind", "x", "w_in", "w_out", "starts, ends"):
        with pytest.raises(ConfigError):
            ends = arguments.pop("offs")
            ops.expert_mlp_forward(*(arguments[name] for name in ("x", "w_in", "w_out")), ends, kind=arguments["kind"])


def test_raw_pieces_refuse_half_a_gate() -> None:
    """An odd width of w_in, with a w_out that fits the half rounded down."""
    x, w_in, w_out = torch.zeros(4, 3), torch.zeros(2, 7, 3), torch.zeros(2, 3, 3)
    with pytest.raises(ConfigError, match=r"\[gate \| up\]"):
        ops.expert_mlp_forward(x, w_in, w_out, [2, 4], kind="swiglu")
    with pytest.raises(ConfigError, match=r"\[gate \| up\]"):
        ops.expert_mlp_dgrad(x, torch.zeros(4, 7), w_in, w_out, [2, 4], kind="swiglu")


def test_raw_pieces_refuse_wrong_buffers() -> None:
    x, (w_in, w_out) = torch.zeros(4, 3), weights(2, 3, 5, "gelu", torch.float32)
    with pytest.raises(ConfigError, match="y = "):
        ops.expert_mlp_forward(x, w_in, w_out, [2, 4], kind="gelu", y=torch.zeros(3, 3))
    with pytest.raises(ConfigError, match="h = "):
        ops.expert_mlp_forward(x, w_in, w_out, [2, 4], kind="gelu", h=torch.zeros(4, 5).double())
    with pytest.raises(ConfigError, match="experts"):
        ops.expert_mlp_wgrad(x, x, x, x, [2, 4], dw_in=w_in, dw_out=w_out, experts=(1, 3))


def pieces_arguments() -> dict[str, dict[str, Any]]:
    """Right arguments of dgrad and wgrad: R 4, D 3, F 5, two experts."""
    w_in, w_out = weights(2, 3, 5, "swiglu", torch.float32)
    rows = {"x_ND": torch.ones(4, 3), "dy_ND": torch.ones(4, 3), "dh_RF": torch.ones(4, 10), "a_RF": torch.ones(4, 5)}
    return {
        "dgrad": {"dy_ND": rows["dy_ND"], "h_RF": rows["dh_RF"], "w_in": w_in, "w_out": w_out, "kind": "swiglu"},
        "wgrad": {**rows, "dw_in": w_in.clone(), "dw_out": w_out.clone()},
    }


@pytest.mark.parametrize(
    ("piece", "field", "change"),
    [
        ("dgrad", "dy", {"dy_ND": torch.ones(4, 3, dtype=torch.int32)}),
        ("dgrad", "dy", {"dy_ND": torch.ones(4)}),
        ("dgrad", "h", {"h_RF": torch.ones(3, 10)}),
        ("dgrad", "h", {"h_RF": torch.ones(4, 5)}),
        ("dgrad", "h", {"h_RF": torch.ones(4, 10).double()}),
        ("dgrad", "num_sms", {"num_sms": 0}),
        ("wgrad", "x", {"x_ND": torch.ones(4, 3, 1)}),
        ("wgrad", "dw_out", {"x_ND": torch.ones(4, 2)}),
        ("wgrad", "dy", {"dy_ND": torch.ones(3, 3)}),
        ("wgrad", "dy", {"dy_ND": torch.ones(4, 3).double()}),
        ("wgrad", "dh", {"dh_RF": torch.ones(4, 5)}),
        ("wgrad", "a", {"a_RF": torch.ones(4, 10)}),
        ("wgrad", "dw_in", {"dw_in": torch.ones(1, 10, 3)}),
        ("wgrad", "dw_in", {"dw_in": torch.ones(2, 10, 4)}),
        ("wgrad", "dw_in", {"dw_in": torch.ones(2, 10, 3).double()}),
        ("wgrad", "dw_out", {"dw_out": torch.ones(2, 4, 5)}),
        ("wgrad", "num_sms", {"num_sms": -1}),
    ],
)
def test_raw_pieces_of_backward_refuse_what_does_not_fit(piece, field, change) -> None:
    arguments = {**pieces_arguments()[piece], "ends": [2, 4], **change}
    with pytest.raises(ConfigError) as caught:
        getattr(ops, f"expert_mlp_{piece}")(**arguments)
    assert caught.value.field == field


def test_a_view_that_is_too_small_is_refused_and_its_neighbours_stay() -> None:
    """torch would resize the view and write over what lies beside it."""
    arguments = pieces_arguments()["wgrad"]
    whole = torch.full((2, 12, 3), 7.0)
    with pytest.raises(ConfigError, match="dh = "):
        ops.expert_mlp_wgrad(**{**arguments, "ends": [2, 4], "dw_in": whole[:, :4]})
    assert (whole == 7).all()
    ops.expert_mlp_wgrad(**{**arguments, "ends": [2, 4], "dw_in": whole[:, :10]})
    assert (whole[:, :10] == 2).all() and (whole[:, 10:] == 7).all()


@pytest.mark.parametrize(("ends", "starts"), [([4], None), ([1, 2, 4], None), ([2, 4], [0]), ([2], [0, 2])])
def test_raw_pieces_refuse_another_number_of_groups(ends, starts) -> None:
    x, (w_in, w_out) = torch.zeros(4, 3), weights(2, 3, 5, "gelu", torch.float32)
    with pytest.raises(ConfigError, match="one entry per expert, 2"):
        ops.expert_mlp_forward(x, w_in, w_out, ends, starts=starts, kind="gelu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["swiglu", "relu", "gelu"])
@pytest.mark.parametrize("save_h", [False, True])
def test_few_rows_have_the_bits_of_many(dtype, kind, save_h, monkeypatch) -> None:
    """All experts' activations are one call then: not of gelu, nor where rows begin at no multiple of 64 bytes."""
    calls = []

    def counting(*arguments):
        activate = forward_kernel(*arguments)

        def counted(h, *rest):
            calls.append(h.shape[0])
            activate(h, *rest)

        return counted

    forward_kernel = expert_loop.forward_kernel
    monkeypatch.setattr(expert_loop, "forward_kernel", counting)
    for ffn in (32, 33):
        w_in, w_out = weights(5, 24, ffn, kind, dtype, grad=save_h)
        x, offs = randn(7, 24, dtype=dtype), torch.tensor([1, 1, 3, 3, 6], dtype=torch.int32)
        scale = randn(7, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=3)
        found = []
        for few in (1 << 15, 0):
            monkeypatch.setattr(expert_loop, "FEW_ELEMENTS", few)
            calls.clear()
            found.append([ops.expert_mlp(x, w_in, w_out, offs, kind=kind, row_scale=one) for one in (None, scale)])
            merged = few and ffn == 32 and kind != "gelu"
            assert calls == [6, 6] if merged else calls == [1, 2, 3, 1, 2, 3]
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
