"""The compiled gate against the reference: the same bits, forward and backward, whatever the values are."""

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from moe_overlap.ops import compiled, registry
from tests import tolerances
from tests.ops.cases import rng
from tests.strategies import LOGITS, make_logits

NONE = compiled.obstacle("gate_topk")(torch.device("cpu"), torch.float32)
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.skipif(NONE is not None, reason=str(NONE))]


def results(impl: str, logits: Tensor, bias: Tensor | None, how: dict) -> list[Tensor]:
    logits = logits.clone().requires_grad_()
    with registry.force("gate_topk", impl), registry.force("gate_topk_backward", impl):
        weights, *integers = ops.gate_topk(logits, bias, **how)
        push = torch.randn(weights.shape, generator=rng(7), dtype=weights.dtype)
        (dlogits,) = torch.autograd.grad((weights * push).sum(), logits)
    return [weights.detach(), *integers, dlogits]


def check(logits: Tensor, bias: Tensor | None = None, **how: object) -> None:
    got, want = (results(impl, logits, bias, how) for impl in ("cpp", "reference"))
    for name, have, should in zip(("weights", "ids", "counts", "status", "dlogits"), got, want, strict=True):
        assert have.dtype == should.dtype, name
        tolerances.same_bits(have, should)


def with_bad_rows(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[1, 3], logits[2, 0], logits[3], logits[5, 1] = torch.nan, torch.inf, -torch.inf, -torch.nan
    logits[4, :-1] = -torch.inf
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_has_the_bits_of_the_reference(dtype: torch.dtype, score: str, renormalize: bool, biased: bool) -> None:
    for kind in LOGITS:
        for experts, k, n_group, topk_group in (
            (1, 1, 1, 1),
            (16, 2, 1, 1),
            (24, 5, 6, 2),
            (24, 4, 24, 9),
            (72, 33, 3, 2),
        ):
            logits = make_logits(kind, 12, experts, dtype=dtype, seed=k)
            bias = torch.randn(experts, generator=rng(3), dtype=dtype).round() if biased else None
            how = {"k": k, "n_group": n_group, "topk_group": topk_group, "score": score, "renormalize": renormalize}
            check(logits, bias, **how, scale=2.5)
            if experts > 3:
                check(with_bad_rows(logits), bias, **how, scale=2.5)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 255, 256])
def test_any_number_of_experts_a_token(k: int) -> None:
    for kind in ("normal", "ties", "all_equal"):
        check(make_logits(kind, 40, 256), k=k)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (4, 2)])
def test_a_bias_may_hold_anything(value: float, n_group: int, topk_group: int) -> None:
    bias = torch.randn(12, generator=rng(1))
    bias[[2, 3, 7]] = value
    check(make_logits("ties", 20, 12), bias, k=3, n_group=n_group, topk_group=topk_group, score="sigmoid")


def test_values_that_only_just_differ() -> None:
    tiny, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    values = torch.tensor([0.0, -0.0, tiny, -tiny, tiny / 4, most, -most, 1.0, 1.0 + 2**-23, -torch.inf])
    logits = torch.stack([values[torch.randperm(10, generator=rng(seed))] for seed in range(50)])
    for n_group, topk_group in ((1, 1), (5, 2), (2, 1)):
        check(logits, k=4, n_group=n_group, topk_group=topk_group, score="sigmoid")


def test_strides_do_not_matter() -> None:
    logits = make_logits("normal", 8, 40)
    check(logits.t().contiguous().t(), k=4)
    check(make_logits("normal", 9, 80)[:, ::2], k=4, score="sigmoid")


def test_no_tokens_and_many() -> None:
    check(torch.empty(0, 4), k=2)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for experts, k in ((64, 8), (130, 40)):  # more than one thread's share
            check(make_logits("ties", 3000, experts), k=k)
    finally:
        torch.set_num_threads(before)
