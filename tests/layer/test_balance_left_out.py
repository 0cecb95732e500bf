"""Balance beside everything that is counted and not dispatched, or not counted at all: variable k, zero-computation
experts, masked experts, padding, refused tokens, capacity. The loss over all ranks and the biases of loss-free balance
are those of one process that has all tokens; ranks are uneven, one has no token, one has padding alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_overlap import LossFreeBalancer, PlanMismatch, aux_loss
from moe_overlap.routing import LinearRouter, VariableK, update_bias_
from tests.layers import D, E, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

SIZES = (7, 0, 12, 5)
K, Z, U, COEF = 3, 2, 0.01, 0.3


class Allocator(nn.Module):
    """From 0 to K experts, by the tokens."""

    def forward(self, x_TD):
        return (x_TD[:, 0] * 7).abs().long() % (K + 1)


# What a case gives its router; "masked", "padded" and "refused" are no options of it.
CASES = {
    "threshold": {"variable_k": 0.4},
    "allocator": {"variable_k": Allocator},
    "zero experts": {"zero_experts": Z},
    "masked experts": {"masked": (1, 6)},
    "padding": {"padded": True},
    "capacity": {"capacity_factor": 0.5},
    "refused tokens": {"refused": True},
    "padding, refused": {"padded": True, "refused": True, "z_loss_coef": 0.0},
    "all": {"variable_k": 0.6, "zero_experts": Z, "masked": (1, E), "padded": True, "capacity_factor": 0.7,
            "refused": True, "renormalize": True},
}  # fmt: skip
LEVELS = {"global": {"balance": "global", "aux_loss_coef": COEF}, "loss-free": {"bias": True}}


def router(case, level):
    options = {key: value for key, value in CASES[case].items() if key not in ("masked", "padded", "refused")}
    if (asked := options.pop("variable_k", None)) is not None:
        given = {"allocator": asked()} if asked is Allocator else {"threshold": asked}
        options["variable_k"] = VariableK(**given)
    drop = {"bad_logits": "drop"} if CASES[case].get("refused") else {}
    torch.manual_seed(5)
    one = LinearRouter(D, E, K, dtype=torch.float64, **LEVELS[level], **drop, **options)
    nn.init.normal_(one.weight, std=0.3)
    one.mask_experts(CASES[case].get("masked", ()))
    return one


def given_to(case, rank):
    """(x, what goes with it): a quarter of the tokens is padding, and all of the last rank's."""
    x = tokens(SIZES[rank], seed=rank + 1)
    if CASES[case].get("refused") and len(x):
        x[1] = float("nan")
    mask = torch.arange(len(x)) % 4 > 0
    return x, ({"token_mask": mask & (rank < 3)} if CASES[case].get("padded") else {})


def one_process(case, level):
    """(router, x, decision) of one router that has all tokens."""
    each = [given_to(case, rank) for rank in range(4)]
    x = torch.cat([x for x, _ in each]).requires_grad_()
    told = {"token_mask": torch.cat([told["token_mask"] for _, told in each])} if CASES[case].get("padded") else {}
    one = router(case, level)
    return one, x, one(x, **told)


def loss_by_hand(one, x, decision, case):
    """E' * sum f P of all tokens that count, in float64 and without the router's own words for it. E': the experts
    that may be chosen."""
    counted = ~x.isnan().any(dim=1)
    if CASES[case].get("padded"):
        counted &= torch.cat([given_to(case, rank)[1]["token_mask"] for rank in range(4)])
    logits = x[counted] @ one.weight.t()
    masked = list(CASES[case].get("masked", ()))
    logits[:, masked] = -torch.inf
    ids = (decision.topk_ids_TK if decision.chosen_ids_TK is None else decision.chosen_ids_TK)[counted]
    f = torch.stack([(ids == expert).sum() for expert in range(one.num_logits)]).double()
    return COEF * (one.num_logits - len(masked)) * (f / f.sum() * logits.softmax(dim=1).mean(dim=0)).sum()


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_over_all_ranks_is_one_process_s(case, schedule):
    def rank(me):
        layer = make(me.transport(), top_k=K, router=router(case, "global"), schedule=schedule)
        x, told = given_to(case, me.rank)
        x.requires_grad_()
        layer(x, **told)
        loss = aux_loss(layer) / 4
        return loss.detach(), *torch.autograd.grad(loss, [layer.router.weight, x])

    loss, d_router, d_x = zip(*virtual_world(4).run(rank), strict=True)
    one, x, decision = one_process(case, "global")
    want = loss_by_hand(one, x, decision, case)
    d_weight, d_tokens = torch.autograd.grad(want, [one.weight, x])
    close(decision.global_balance.alone().detach(), want.detach())
    close(sum(loss), want.detach())
    close(sum(d_router), d_weight)
    close(torch.cat(d_x), d_tokens.nan_to_num(0.0))
    assert d_weight.abs().max() > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_biases_move_by_the_choices_of_all_ranks(case):
    def rank(me):
        layer = make(me.transport(), top_k=K, router=router(case, "loss-free"))
        balancer = LossFreeBalancer(layer, U)
        x, told = given_to(case, me.rank)
        layer(x, **told)
        balancer.step()
        return layer.router.expert_bias_E

    one, _, decision = one_process(case, "loss-free")
    ids = decision.topk_ids_TK if decision.chosen_ids_TK is None else decision.chosen_ids_TK
    allowed = [expert for expert in range(one.num_logits) if expert not in CASES[case].get("masked", ())]
    counts = {expert: int((ids == expert).sum()) for expert in allowed}
    mean = sum(counts.values()) / len(allowed)
    want = torch.zeros(one.num_logits)
    for expert, count in counts.items():
        want[expert] = U * ((count < mean) - (count > mean))
    for bias_E in virtual_world(4).run(rank):
        same_bits(bias_E, want)
    assert want.any()


def test_a_mask_on_some_ranks_only_is_said_on_all_of_them_before_anything_is_sent():
    """One rank would wait for a sum over the ranks in which the others have no part."""

    def rank(me):
        layer = make(me.transport(), top_k=K, router=router("padding", "global"))
        x, told = given_to("padding", me.rank)
        some = told if me.rank == 2 else {}
        with torch.no_grad():  # without gradients there is no loss, and nothing to sum
            layer(x, **some)
        sent = layer.transport.stats.payload_bytes
        with pytest.raises(PlanMismatch, match="router_state.*token_mask"):
            layer(x, **some)
        assert layer.transport.stats.payload_bytes == sent
        layer.transport.reopen()
        y = layer(x, **told)
        return (y.sum() + aux_loss(layer)).detach().isfinite()

    assert all(virtual_world(4).run(rank))


def test_recentred_biases_leave_masked_experts_alone():
    bias_E = torch.tensor([3.0, 0.0, 7.0, 0.0])
    masked_E = torch.tensor([False, False, True, False])
    update_bias_(bias_E, torch.tensor([0, 0, 0, 9]), 0.5, recentre=True, masked_E=masked_E)
    torch.testing.assert_close(bias_E, torch.tensor([2.3333333, -0.6666667, 7.0, -1.6666667]))
