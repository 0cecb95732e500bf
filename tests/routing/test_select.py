import pytest
import torch

from moe_overlap.routing import drop_over_capacity, expert_capacity
from tests.strategies import ROUTINGS, make_routing


def naive_drop(ids_TK, weights_TK, experts, capacity):
    """Python loops: sort every expert's slots by (-weight, token) and keep the first `capacity`."""
    keep = set()
    for expert in range(experts):
        slots = [
            (-weights_TK[t, k].item(), t, k)
            for t in range(ids_TK.shape[0])
            for k in range(ids_TK.shape[1])
            if ids_TK[t, k] == expert
        ]
        keep |= {(t, k) for _, t, k in sorted(slots)[:capacity]}
    kept_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    for t, k in keep:
        kept_TK[t, k] = True
    return kept_TK


@pytest.mark.parametrize(
    ("factor", "tokens", "k", "experts", "expected"),
    [(1.0, 8, 2, 4, 4), (1.25, 8, 2, 4, 5), (1.0, 7, 1, 4, 2), (0.1, 1, 1, 64, 1), (1.0, 0, 2, 4, 0)],
)
def test_capacity_formula(factor, tokens, k, experts, expected):
    assert expert_capacity(factor, tokens, k, experts) == expected


@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
@pytest.mark.parametrize("kind", sorted(ROUTINGS))
@pytest.mark.parametrize("equal_weights", [False, True])
def test_it_keeps_the_best_slots(kind, capacity, equal_weights):
    ids_TK, weights_TK = make_routing(kind, 17, 5, 2, seed=3, dtype=torch.float64)
    if equal_weights:
        weights_TK = (weights_TK > 0).double()
    kept_TK = naive_drop(ids_TK, weights_TK, 5, capacity)
    new_ids_TK, new_weights_TK, dropped = drop_over_capacity(ids_TK, weights_TK, num_experts=5, capacity=capacity)
    assert torch.equal(new_ids_TK, ids_TK.where(kept_TK, torch.tensor(-1, dtype=torch.int32)))
    assert torch.equal(new_weights_TK, weights_TK.where(kept_TK, torch.tensor(0.0, dtype=torch.float64)))
    assert dropped.item() == int(((ids_TK >= 0) & ~kept_TK).sum())
    assert new_ids_TK.dtype == torch.int32 and dropped.dtype == torch.int64


def test_equal_weights_keep_the_earlier_token():
    ids_TK = torch.tensor([[0], [0], [0]], dtype=torch.int32)
    new_ids_TK, _, dropped = drop_over_capacity(ids_TK, torch.full((3, 1), 0.5), num_experts=2, capacity=2)
    assert new_ids_TK.tolist() == [[0], [0], [-1]] and dropped.item() == 1


def test_gradient_reaches_kept_weights_only():
    ids_TK = torch.tensor([[0], [0], [1]], dtype=torch.int32)
    weights_TK = torch.tensor([[0.6], [0.9], [0.5]], requires_grad=True)
    _, new_weights_TK, _ = drop_over_capacity(ids_TK, weights_TK, num_experts=2, capacity=1)
    new_weights_TK.sum().backward()
    assert weights_TK.grad.tolist() == [[0.0], [1.0], [1.0]]


def test_no_tokens():
    ids_TK, weights_TK = make_routing("uniform", 0, 4, 2)
    new_ids_TK, new_weights_TK, dropped = drop_over_capacity(ids_TK, weights_TK, num_experts=4, capacity=0)
    assert new_ids_TK.shape == new_weights_TK.shape == (0, 2) and dropped.item() == 0
