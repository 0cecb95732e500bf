from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import registry
from tests import tolerances
from tests.ops.cases import cpu_implementations, randn
from tests.strategies import LOGITS, make_logits

pytestmark = pytest.mark.usefixtures("poison", "implementation")


@pytest.fixture(params=cpu_implementations("gate_topk"))
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of this file runs with each of them."""
    with registry.force("gate_topk", request.param), registry.force("gate_topk_backward", request.param):
        yield


def python_gate(
    logits: Tensor, bias: Tensor | None, k: int, n_group: int, topk_group: int, score: str, renormalize: bool
) -> tuple[Tensor, list[list[int]]]:
    """The contract, one token at a time with Python's own (stable) sort; weights differentiable."""
    rows, chosen = [], []
    for row in logits:
        scores = row.softmax(0) if score == "softmax" else row.sigmoid() if score == "sigmoid" else row
        choice = (row if bias is None else scores + bias).tolist()
        size = len(choice) // n_group
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
        worth = [sum(group[: 1 if bias is None else 2]) for group in groups]
        kept = sorted(range(n_group), key=lambda g: -worth[g])[:topk_group]
        candidates = [i for i in range(len(choice)) if i // size in kept]
        ids = sorted(candidates, key=lambda i: -choice[i])[:k]
        picked = scores[ids]
        if score == "topk_softmax":
            picked = picked.softmax(0)
        rows.append(picked / picked.sum() if renormalize else picked)
        chosen.append(ids)
    return torch.stack(rows), chosen


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (4, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_selects_like_plain_python(kind: str, score: str, n_group: int, topk_group: int, biased: bool) -> None:
    logits = make_logits(kind, 40, 12, dtype=torch.float64).requires_grad_()
    bias = randn(12, seed=5) * 0.3 if biased else None
    how = {"n_group": n_group, "topk_group": topk_group, "score": score, "renormalize": score == "sigmoid"}
    weights, ids, counts, status = ops.gate_topk(logits, bias, k=3, scale=2.5, **how)
    want, chosen = python_gate(logits, bias, 3, n_group, topk_group, score, how["renormalize"])
    assert ids.tolist() == chosen
    assert counts.tolist() == torch.bincount(ids.reshape(-1), minlength=12).tolist() and counts.dtype == torch.int32
    assert status.tolist() == [0]
    tolerances.close(weights, want * 2.5)
    push = randn(*weights.shape, seed=9)
    (got,) = torch.autograd.grad((weights * push).sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad((want * 2.5 * push).sum(), logits)
    tolerances.close(got, wanted)


def test_ties_go_to_the_lower_id() -> None:
    for score in ("softmax", "topk_softmax", "sigmoid"):
        ids = ops.gate_topk(torch.zeros(5, 64), k=6, score=score)[1]
        assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 5


def test_without_a_bias_the_logits_decide() -> None:
    logits = torch.tensor([[0.0, -200.0, -150.0]])  # softmax in float32: 1, 0, 0
    assert ops.gate_topk(logits, k=2)[1].tolist() == [[0, 2]]
    logits = torch.tensor([[20.0, 30.0, 1.0]])  # sigmoid in float32: 1, 1, 0.73
    assert ops.gate_topk(logits, k=2, score="sigmoid")[1].tolist() == [[1, 0]]


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
def test_an_expert_outside_the_groups_is_never_chosen(score: str) -> None:
    logits = torch.tensor([[1.0, 1.0, 9.0, -torch.inf]])
    assert ops.gate_topk(logits, k=2, n_group=2, topk_group=1, score=score)[1].tolist() == [[2, 3]]


def test_float32_weights_are_near_the_exact_ones() -> None:
    logits = make_logits("normal", 64, 16)
    for score in ("softmax", "topk_softmax", "sigmoid"):
        got, want = ops.gate_topk(logits, k=4, score=score), ops.gate_topk(logits.double(), k=4, score=score)
        assert got[0].dtype == torch.float32 and torch.equal(got[1], want[1])
        tolerances.close(got[0], want[0])


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
def test_bad_rows_are_flagged_and_harmless(score: str) -> None:
    logits = make_logits("normal", 8, 6)
    clean = ops.gate_topk(logits, k=2, score=score)
    bad = logits.clone()
    bad[1, 3], bad[4, 0], bad[6] = torch.nan, torch.inf, -torch.inf
    bad[2, :4] = -torch.inf  # still two experts to choose from: not bad
    bad.requires_grad_()
    weights, ids, counts, status = ops.gate_topk(bad, k=2, score=score)
    assert status.tolist() == [1]
    for row in (1, 4, 6):
        assert ids[row].tolist() == [-1, -1] and weights[row].tolist() == [0, 0]
    for row in (0, 3, 5, 7):
        tolerances.same_bits(weights[row], clean[0][row])
        assert torch.equal(ids[row], clean[1][row])
    assert sorted(ids[2].tolist()) == [4, 5]
    assert counts.sum() == 2 * 5
    weights.sum().backward()
    assert bad.grad is not None and bad.grad[[1, 4, 6]].abs().sum() == 0 and not bad.grad.isnan().any()


def test_no_tokens() -> None:
    weights, ids, counts, status = ops.gate_topk(torch.empty(0, 4).requires_grad_(), k=2)
    assert weights.shape == ids.shape == (0, 2) and counts.tolist() == [0] * 4 and status.tolist() == [0]
    weights.sum().backward()


def test_bias_gets_no_gradient_and_changes_no_weight() -> None:
    logits, bias = make_logits("normal", 6, 4).requires_grad_(), torch.tensor([0.0, 9.0, 0.0, 0.0], requires_grad=True)
    weights, ids, _, _ = ops.gate_topk(logits, bias, k=1, score="sigmoid")
    assert ids.tolist() == [[1]] * 6
    tolerances.same_bits(weights[:, 0], logits[:, 1].sigmoid())
    weights.sum().backward()
    assert bias.grad is None


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("tokens", [0, 5])
def test_gradcheck(score: str, renormalize: bool, tokens: int) -> None:
    logits = make_logits("normal", tokens, 6, dtype=torch.float64, seed=3).requires_grad_()

    def gate(logits: Tensor) -> Tensor:
        return ops.gate_topk(logits, k=2, score=score, renormalize=renormalize, scale=1.5)[0]

    assert torch.autograd.gradcheck(gate, (logits,))


@pytest.mark.parametrize(
    "field, change",
    [
        ("k", {"k": 5}),
        ("k", {"k": 0}),
        ("k", {"k": 3, "n_group": 2, "topk_group": 1}),
        ("n_group", {"n_group": 3}),
        ("n_group", {"n_group": 0}),
        ("topk_group", {"n_group": 2, "topk_group": 3}),
        ("score", {"score": "tanh"}),
        ("logits", {"logits_TE": torch.zeros(3, 4, dtype=torch.bfloat16)}),
        ("logits", {"logits_TE": torch.zeros(4)}),
        ("bias", {"bias_E": torch.zeros(3)}),
        ("bias", {"bias_E": torch.zeros(4, dtype=torch.float64)}),
    ],
)
def test_bad_arguments(field: str, change: dict) -> None:
    arguments = {"logits_TE": torch.zeros(3, 4), "k": 2, **change}
    with pytest.raises(ConfigError) as caught:
        ops.gate_topk(**arguments)
    assert caught.value.field == field and caught.value.expected


def test_second_derivative_is_refused() -> None:
    logits = make_logits("normal", 3, 4).requires_grad_()
    (grad,) = torch.autograd.grad(ops.gate_topk(logits, k=2)[0].sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="gate_topk_backward"):
        grad.sum().backward()
