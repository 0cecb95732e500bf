"""gate_topk in Triton against the reference: the same ids, weights and gradients as near as the dtype allows."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import triton_kernels
from tests import tolerances
from tests.ops.cases import randn
from tests.ops.interpreted import far_programs, needs_triton, on_triton, reference, triton
from tests.strategies import LOGITS, make_logits

needs_triton(interpreter=True)
pytestmark = pytest.mark.usefixtures("poison")

SCORES = ("softmax", "topk_softmax", "sigmoid")
ROUTER_DTYPES = (torch.float32, torch.float64)


def check_gate(logits: torch.Tensor, bias: torch.Tensor | None, k: int, groups: tuple[int, int], *how: object) -> None:
    got, want = (run("gate_topk", logits, bias, k, *groups, *how) for run in (triton, reference))
    tolerances.close(got[0], want[0])
    for name, have, should in zip(("ids", "counts", "status"), got[1:], want[1:], strict=True):
        assert have.dtype == torch.int32 and torch.equal(have, should), name
    score, renormalize, scale = how
    push = randn(*want[0].shape, dtype=logits.dtype, seed=9)
    gradients = [run("gate_topk_backward", push, logits, want[1], score, renormalize, scale)[0]
                 for run in (triton, reference)]  # fmt: skip
    tolerances.close(*gradients)


@pytest.mark.parametrize("dtype", ROUTER_DTYPES)
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_triton_gate_selects_like_the_reference(dtype, kind, score, groups, biased) -> None:
    logits = make_logits(kind, 40, 12, dtype=dtype)
    bias = randn(12, dtype=dtype, seed=5) * 0.3 if biased else None
    check_gate(logits, bias, 3, groups, score, score == "sigmoid", 2.7)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "tokens, experts, k, groups",
    [
        (0, 4, 2, (1, 1)),
        (1, 1, 1, (1, 1)),
        (5, 3, 3, (3, 2)),
        (3, 257, 7, (1, 1)),
        (9, 60, 4, (1, 1)),
        (2, 256, 8, (8, 4)),
    ],
)
def test_triton_gate_on_odd_sizes(score, tokens, experts, k, groups) -> None:
    k = min(k, experts // groups[0] * groups[1])
    for renormalize in (False, True):
        check_gate(make_logits("normal", tokens, experts, seed=1), None, k, groups, score, renormalize, 1.0)


@pytest.mark.parametrize("score", SCORES)
def test_triton_gate_gives_ties_to_the_lower_id(score) -> None:
    zeros = torch.zeros(5, 64)
    zeros[1::2, ::3] = -0.0
    _, ids, counts, _ = triton("gate_topk", zeros, None, 6, 1, 1, score, False, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 5
    assert counts.tolist() == [5] * 6 + [0] * 58
    # Groups that are worth the same, too.
    _, ids, _, _ = triton("gate_topk", zeros, None, 6, 16, 2, score, False, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 5


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("groups", [(1, 1), (3, 2)])
def test_triton_gate_flags_bad_rows_and_keeps_them_harmless(score, groups) -> None:
    logits = make_logits("normal", 8, 6)
    logits[1, 3], logits[4, 0], logits[6] = torch.nan, torch.inf, -torch.inf
    logits[2, :4] = -torch.inf  # still two experts to choose from: not bad
    check_gate(logits, None, 2, groups, score, False, 1.0)
    weights, ids, counts, status = triton("gate_topk", logits, None, 2, *groups, score, False, 1.0)
    assert status.tolist() == [1] and counts.sum() == 2 * 5
    for row in (1, 4, 6):
        assert ids[row].tolist() == [-1, -1] and weights[row].tolist() == [0, 0]
    (dlogits,) = triton("gate_topk_backward", torch.ones_like(weights), logits, ids, score, False, 1.0)
    assert not dlogits[[1, 4, 6]].any() and not dlogits.isnan().any()


@pytest.mark.parametrize("score", SCORES)
def test_triton_gate_inside_autograd_with_strides(score) -> None:
    base = make_logits("normal", 12, 6, dtype=torch.float64)
    gradients = []
    for forced in (True, False):
        logits = base.clone().requires_grad_()
        with on_triton("gate_topk", "gate_topk_backward") if forced else on_triton("row_map"):
            weights = ops.gate_topk(logits.t(), k=3, score=score, renormalize=True)[0]
            weights[:, 1].sum().backward()
        gradients.append(logits.grad)
    tolerances.close(*gradients)


def test_triton_gate_refuses_more_experts_than_a_program_holds() -> None:
    many = triton_kernels.MOST_GATE_EXPERTS + 1
    with on_triton("gate_topk"), pytest.raises(ConfigError, match=f"{many} experts"):
        ops.gate_topk(torch.zeros(1, many), k=1)


def test_triton_gate_reaches_logits_beyond_2_to_the_31() -> None:
    from moe_overlap.ops import gate_triton as gate

    experts = 4096
    tokens = 2**31 // experts + 2
    with far_programs(tokens - 1) as lazy:
        logits, weights = lazy(tokens, experts, dtype=torch.float32), lazy(tokens, 2, dtype=torch.float32)
        ids, counts, status = lazy(tokens, 2, dtype=torch.int32), torch.zeros(experts).int(), torch.zeros(1).int()
        logits[-1, 7], logits[-1, 4000] = 2.0, 3.0
        gate.launch(
            gate.gate_topk_kernel, (1,), logits, None, weights, ids, counts, status, tokens,
            E=experts, K=2, N_GROUP=1, TOPK_GROUP=1, SCORE=1, RENORMALIZE=False, SCALE=1.0,
            BLOCK_T=1, E_PAD=experts, K_PAD=2, GROUP_PAD=1,
        )  # fmt: skip
        dlogits, push = lazy(tokens, experts, dtype=torch.float32), lazy(tokens, 2, dtype=torch.float32)
        push[-1] = torch.tensor([1.0, 0.0])
        gate.launch(
            gate.gate_topk_backward_kernel, (1,), push, logits, ids, dlogits, tokens,
            E=experts, K=2, SCORE=1, RENORMALIZE=False, SCALE=1.0, BLOCK_T=1, E_PAD=experts, K_PAD=2,
        )  # fmt: skip
    want = torch.tensor([3.0, 2.0]).softmax(0)
    assert ids[-1].tolist() == [4000, 7] and counts.nonzero().tolist() == [[7], [4000]] and status.item() == 0
    tolerances.close(weights[-1], want)
    assert dlogits[-1].nonzero().tolist() == [[7], [4000]]
    tolerances.close(dlogits[-1, [4000, 7]], want[0] * want[1] * torch.tensor([1.0, -1.0]))
