"""The bias that balances without a loss: its rule, and what it comes to on a toy gate."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import LossFreeBalancer
from moe_overlap.routing import LinearRouter, max_violation, update_bias_


def test_the_bias_moves_by_one_step_against_the_load():
    bias_E = torch.tensor([0.5, 0.0, -0.25, 0.0])
    update_bias_(bias_E, torch.tensor([7, 1, 4, 4]), 0.125)
    assert bias_E.tolist() == [0.375, 0.125, -0.25, 0.0], "4 is the mean: those two stay"
    update_bias_(bias_E, torch.zeros(4, dtype=torch.int64), 0.125)
    update_bias_(bias_E, torch.full((4,), 9), 0.125)
    assert bias_E.tolist() == [0.375, 0.125, -0.25, 0.0]


def test_counts_are_exact_where_floats_are_not():
    """One choice more or less than the mean decides, at 2^25 and far beyond."""
    for large in (2**25, 2**40):
        bias_E = torch.zeros(3)
        update_bias_(bias_E, torch.tensor([large, large + 1, large - 1]), 1.0)
        assert bias_E.tolist() == [0.0, -1.0, 1.0]


def test_recentred_biases_have_mean_zero():
    bias_E = torch.tensor([3.0, 0.0, 0.0])
    update_bias_(bias_E, torch.tensor([0, 0, 9]), 0.5, recentre=True)
    torch.testing.assert_close(bias_E, torch.tensor([2.3333333, -0.6666667, -1.6666667]))


def test_max_violation():
    assert max_violation(torch.tensor([5, 5, 5])) == 0.0
    assert max_violation(torch.tensor([12, 0, 0, 0])) == 3.0
    assert max_violation(torch.tensor([6, 2, 4])) == 0.5
    assert max_violation(torch.zeros(3, dtype=torch.int64)) == 0.0


def toy_gate(*, tokens, steps, update_rate=1e-3):
    """(MaxVio_global at first and at last, the last of many fresh batches) of a skewed sigmoid gate, 64 experts, top-6,
    whose weights stay as they are."""
    experts, hidden = 64, 16
    generator = torch.Generator().manual_seed(5)
    router = LinearRouter(hidden, experts, 6, score="sigmoid", bias=True)
    with torch.no_grad():
        router.weight.copy_(0.25 * torch.randn(experts, hidden, generator=generator))
        router.weight[:, 0] = torch.linspace(-1.5, 0.5, experts)  # x has a one there: popularity
    balancer = LossFreeBalancer(router, update_rate)

    def batch():
        x_TD = torch.randn(tokens, hidden, generator=generator)
        x_TD[:, 0] = 1.0
        return router(x_TD).tokens_per_expert_E

    def over_many():
        with torch.no_grad():
            return max_violation(sum(batch() for _ in range(2**18 // tokens)))

    before = over_many()
    for _ in range(steps):
        batch()
        balancer.step()
    return before, over_many()


def test_a_toy_gate_becomes_balanced():
    """In smaller steps than the published ones, as the signs of smaller batches are noisier."""
    before, after = toy_gate(tokens=1024, steps=3000, update_rate=3e-4)
    assert before > 2.0 and after <= 0.05


@pytest.mark.soak
@pytest.mark.time_limit(1500)
def test_a_toy_gate_of_the_published_size_becomes_balanced():
    before, after = toy_gate(tokens=8192, steps=3000)
    assert before > 2.0 and after <= 0.05
