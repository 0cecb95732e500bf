"""The expert MLP on torch's grouped matmul, on a CPU, where it is there for these tests."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import expert_mlp_grouped, registry
from moe_overlap.ops.expert_mlp_contract import OPS
from tests import tolerances
from tests.ops.cases import KINDS, randn, weights
from tests.ops.test_expert_mlp import dense

pytestmark = pytest.mark.usefixtures("poison")
F32, BF16 = torch.float32, torch.bfloat16
ROWS, HIDDEN, FFN = 12, 8, 16
OFFS = {"balanced": (4, 8, 12), "empty experts and a tail": (0, 5, 5, 9), "one expert": (12,)}

if (why_not := expert_mlp_grouped._obstacle(torch.device("cpu"), F32)) is not None:
    pytest.skip(why_not, allow_module_level=True)


@pytest.fixture
def grouped():
    with ExitStack() as stack:
        for op in OPS:
            stack.enter_context(registry.force(op, "grouped_mm"))
        yield


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OFFS)
@pytest.mark.parametrize("mapped", [False, True])
def test_values_and_gradients(grouped, dtype, kind, name, mapped) -> None:
    w_in, w_out = weights(len(OFFS[name]), HIDDEN, FFN, kind, dtype, grad=True)
    x = randn(4 if mapped else ROWS, HIDDEN, dtype=dtype, grad=True)
    row_to_token = torch.tensor([3, 0, 0, 1, -1, 3, 2, 1, 0, 2, 3, 0], dtype=torch.int32) if mapped else None
    scale, offs = randn(ROWS, dtype=F32, seed=4, grad=True), torch.tensor(OFFS[name], dtype=torch.int32)
    values, push = (x, w_in, w_out, scale), randn(ROWS, HIDDEN, dtype=dtype, seed=5)
    y = ops.expert_mlp(x, w_in, w_out, offs, kind=kind, row_to_token=row_to_token, row_scale=scale)
    want = dense(x, w_in, w_out, OFFS[name], kind, row_to_token, scale)
    tolerances.close(y, want)
    assert not y[OFFS[name][-1] :].any()
    found = torch.autograd.grad(y, values, push)
    for have, should in zip(found, torch.autograd.grad(want, values, push.double()), strict=True):
        tolerances.close(have, should, dtype)


def pieces(x: Tensor, dy: Tensor, w_in: Tensor, w_out: Tensor, ends, *, mark: float | None) -> list[Tensor]:
    def buffer(width: int) -> Tensor | None:
        return None if mark is None else torch.full((ROWS, width), mark)

    y, h = ops.expert_mlp_forward(x, w_in, w_out, ends, kind="swiglu", y=buffer(HIDDEN), h=buffer(2 * FFN))
    dx, dh, a, _ = ops.expert_mlp_dgrad(
        dy, h, w_in, w_out, ends, kind="swiglu", dx=buffer(HIDDEN), dh=buffer(2 * FFN), a=buffer(FFN)
    )
    dw_in, dw_out = torch.full_like(w_in, 7.0), torch.full_like(w_out, 7.0)
    ops.expert_mlp_wgrad(x, dy, dh, a, ends, dw_in=dw_in, dw_out=dw_out, experts=(1, len(ends)))
    return [y, h, dx, dh, a, dw_in[1:], dw_out[1:], dw_in[:1], dw_out[:1]]


@pytest.mark.parametrize("mark", [None, 7.0])
def test_raw_pieces(grouped, mark) -> None:
    ends, (w_in, w_out) = [0, 5, 5, 9], weights(4, HIDDEN, FFN, "swiglu", F32)
    x, dy = randn(ROWS, HIDDEN, dtype=F32), randn(ROWS, HIDDEN, dtype=F32, seed=5)
    got = pieces(x, dy, w_in, w_out, ends, mark=mark)
    with ExitStack() as stack:
        for op in OPS:
            stack.enter_context(registry.force(op, "reference"))
        want = pieces(x, dy, w_in, w_out, ends, mark=mark)
    for have, should in zip(got, want, strict=True):
        tolerances.close(have, should)
    for have in got[:5]:
        assert (have[9:] == (mark or 0.0)).all()


def test_what_it_does_not_take_it_refuses_with_the_reason(grouped) -> None:
    w_in, w_out = weights(2, HIDDEN, FFN, "swiglu", F32)
    x = randn(ROWS, HIDDEN, dtype=F32)
    with pytest.raises(ConfigError, match="not adjacent"):
        ops.expert_mlp_forward(x, w_in, w_out, [3, 9], starts=[0, 4], kind="swiglu")
    with pytest.raises(ConfigError, match="multiples of 16 bytes"):
        ops.expert_mlp_forward(x[:, :6].contiguous(), w_in[:, :, :6], w_out[:, :6], [3, 9], kind="swiglu")
    with pytest.raises(ConfigError, match="no rows"):
        ops.expert_mlp_forward(x[:0], w_in, w_out, [0, 0], kind="swiglu")
    with pytest.raises(ConfigError, match="no float64"):
        ops.expert_mlp_forward(x.double(), w_in.double(), w_out.double(), [3, 9], kind="swiglu")


def test_a_budget_is_a_carveout_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 132 multiprocessors, 100 leave 32 to others; afterwards it is as before, also after an error."""
    card = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    before = torch._C._get_sm_carveout_experimental()
    with pytest.raises(ValueError), expert_mlp_grouped._budget(torch.device("cuda", 0), 100):
        assert torch._C._get_sm_carveout_experimental() == 32
        raise ValueError
    assert torch._C._get_sm_carveout_experimental() == before
    for device, num_sms in ((torch.device("cpu"), 100), (torch.device("cuda", 0), None)):
        with expert_mlp_grouped._budget(device, num_sms):
            assert torch._C._get_sm_carveout_experimental() == before


def test_the_activation_is_the_one_of_the_registry(grouped, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that our kernel runs where it is verified."""
    ran: list[str] = []
    for op in ("activation", "activation_backward"):
        call = registry.function(op, "reference")
        monkeypatch.setitem(registry._implementations, op, list(registry._implementations[op]))
        spy = partial(lambda op, call, *args: (ran.append(op), call(*args))[1], op, call)
        registry.add(op, "spy", spy, merit="here", preferred=True)
    (w_in, w_out), x = weights(2, HIDDEN, FFN, "swiglu", F32, grad=True), randn(ROWS, HIDDEN, dtype=F32)
    ops.expert_mlp(x, w_in, w_out, torch.tensor([5, 12], dtype=torch.int32), kind="swiglu").sum().backward()
    ends, both = [5, 12], (w_in.detach(), w_out.detach())
    _, h = ops.expert_mlp_forward(x, *both, ends, kind="swiglu")
    ops.expert_mlp_dgrad(x, h, *both, ends, kind="swiglu")
    registry._chosen.clear()
    assert ran == ["activation", "activation_backward", "activation"] * 2
