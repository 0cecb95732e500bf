"""Group-limited top-k against DeepSeek-V3's rule (the gate of its inference code), written here in plain float32."""

import pytest
import torch

from moe_overlap.routing import LinearRouter

TOKENS, HIDDEN, EXPERTS, K, GROUPS, KEPT = 10_000, 24, 256, 8, 8, 4


def reference(x_TD, weight_ED, bias_E, *, masked=float("-inf")):
    """(ids, weights). Scores are sigmoids; a group counts its two best of score + bias; what is masked is `masked`."""
    scores_TE = (x_TD @ weight_ED.T).sigmoid()
    biased_TE = scores_TE + bias_E
    grouped = biased_TE.view(len(x_TD), GROUPS, -1)
    worth_TG = grouped.topk(2, dim=-1).values.sum(-1)
    best_TG = worth_TG.topk(KEPT, dim=-1).indices
    out_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter_(1, best_TG, False)
    ids_TK = grouped.masked_fill(out_TG[:, :, None], masked).flatten(1).topk(K, dim=-1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    return ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True) * 2.5, best_TG


def routed(bias_E, seed=0):
    generator = torch.Generator().manual_seed(seed)
    router = LinearRouter(HIDDEN, EXPERTS, K, score="sigmoid", renormalize=True, scale=2.5, bias=True, n_group=GROUPS,
                          topk_group=KEPT)  # fmt: skip
    with torch.no_grad():
        router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator) * HIDDEN**-0.5)
    router.expert_bias_E = bias_E
    x_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
    return router, x_TD


@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_ids_are_deepseek_v3_s_bit_for_bit_on_ten_thousand_inputs_with_biases_of_both_signs(shift):
    bias_E = 0.3 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(5)) + shift
    router, x_TD = routed(bias_E)
    ids_TK, weights_TK, _ = reference(x_TD, router.weight, bias_E)
    decision = router(x_TD)
    assert torch.equal(decision.topk_ids_TK.long(), ids_TK)
    torch.testing.assert_close(decision.topk_weights_TK, weights_TK, rtol=1e-5, atol=1e-7)


def test_no_masked_expert_wins_where_biases_are_negative():
    """A mask of 0.0, which some ports use, is better than a negative score + bias: it lets masked experts win."""
    bias_E = torch.full((EXPERTS,), -2.0)
    router, x_TD = routed(bias_E)
    zero_TK, _, best_TG = reference(x_TD, router.weight, bias_E, masked=0.0)
    size = EXPERTS // GROUPS

    def outside(ids_TK):
        return ~(ids_TK[:, :, None] // size == best_TG[:, None]).any(-1)

    assert outside(zero_TK).any(dim=1).double().mean() > 0.9  # the trap is there
    assert not outside(router(x_TD).topk_ids_TK.long()).any()


def test_distinct_nodes_of_the_reference():
    """E256 k8 on 8 nodes: 3.96 nodes a token with 4 of 8 groups, 5.295 without a limit, on even scores."""
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))
    means = {}
    for kept in (KEPT, GROUPS):
        router = LinearRouter(EXPERTS, EXPERTS, K, score="sigmoid", bias=True, n_group=GROUPS, topk_group=kept)
        with torch.no_grad():
            router.weight.copy_(torch.eye(EXPERTS))
        nodes_TK = router(logits_TE).topk_ids_TK.long() // (EXPERTS // GROUPS)
        distinct_T = torch.zeros(TOKENS, GROUPS).scatter_(1, nodes_TK, 1.0).sum(-1)
        means[kept] = distinct_T.mean().item()
        assert distinct_T.max() <= kept
    assert means[KEPT] == pytest.approx(3.96, abs=0.01) and means[GROUPS] == pytest.approx(5.295, abs=0.03)
