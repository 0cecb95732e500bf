import pytest
import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.routing import LinearRouter, RecurrentRouter

D, R, E, K, T = 8, 5, 6, 2, 20


def chain(layers=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    cell = nn.GRUCell(R, R, dtype=dtype)
    routers = nn.ModuleList(RecurrentRouter(D, E, K, cell=cell, dtype=dtype, **options) for _ in range(layers))
    for router in routers:
        nn.init.normal_(router.head.weight)
    return routers, torch.randn(layers, T, D, dtype=dtype)


def test_a_chain_of_routers_is_a_gru_over_the_layers():
    routers, x_LTD = chain(score="sigmoid", renormalize=True)
    gru = nn.GRU(R, R, dtype=torch.float64)  # torch's own, whose time is the layers
    with torch.no_grad():
        for name, value in routers[0].cell.named_parameters():
            getattr(gru, name + "_l0").copy_(value)
    x_LTD.requires_grad_()
    r_LTR = torch.stack([x_TD @ router.project.weight.t() for router, x_TD in zip(routers, x_LTD, strict=True)])
    h_LTR, _ = gru(r_LTR)
    state, got, want = None, [], []
    for router, x_TD, h_TR in zip(routers, x_LTD, h_LTR, strict=True):
        decision = router(x_TD, state=state)
        state = decision.state
        torch.testing.assert_close(state, h_TR)
        plain = LinearRouter(R, E, K, score="sigmoid", renormalize=True, dtype=torch.float64)
        plain.weight = router.head.weight
        same = plain(h_TR)
        assert torch.equal(same.topk_ids_TK, decision.topk_ids_TK)
        got.append(decision.topk_weights_TK)
        want.append(same.topk_weights_TK)
    mix = torch.randn(3, T, K, dtype=torch.float64)
    ours = [x_LTD, *routers.parameters()]
    grads = torch.autograd.grad((torch.stack(got) * mix).sum(), ours, retain_graph=True)
    projections = [router.project.weight for router in routers]
    theirs = torch.autograd.grad((torch.stack(want) * mix).sum(), [x_LTD, *projections, *gru.parameters()])
    by_id = {id(one): grad for one, grad in zip(ours, grads, strict=True)}
    cell = dict(routers[0].cell.named_parameters())
    mine = [x_LTD, *projections, *(cell[name.removesuffix("_l0")] for name, _ in gru.named_parameters())]
    for one, want_grad in zip(mine, theirs, strict=True):
        torch.testing.assert_close(by_id[id(one)], want_grad)
    assert len(list(routers.parameters())) == 4 + 2 * 3, "the cell is shared"


def test_it_computes_in_float32_whatever_autocast_says():
    routers, x_LTD = chain(dtype=torch.float32)
    want = routers[0](x_LTD[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = routers[0](x_LTD[0])
    assert got.state.dtype == torch.float32
    assert torch.equal(got.state, want.state) and torch.equal(got.topk_weights_TK, want.topk_weights_TK)
    assert routers[0](x_LTD[0].bfloat16()).state.dtype == torch.float32


def test_padding_leaves_no_trace_in_any_gradient():
    routers, x_LTD = chain(layers=2)
    mask_T = torch.arange(T) % 3 > 0

    def gradients(x_LTD, **told):
        first = routers[0](x_LTD[0], **told)
        second = routers[1](x_LTD[1], state=first.state, **told)
        loss = first.topk_weights_TK.square().sum() + second.topk_weights_TK.square().sum()
        return torch.autograd.grad(loss, list(routers.parameters()))

    want = gradients(x_LTD[:, mask_T])
    junk = x_LTD.masked_fill(~mask_T[:, None], float("nan"))
    for got, expected in zip(gradients(junk, token_mask=mask_T), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("router_size", {}),
        ("router_size", {"router_size": 0}),
        ("router_size", {"router_size": R, "cell": nn.GRUCell(R, R)}),
        ("cell", {"cell": nn.GRUCell(R, R + 1)}),
        ("cell", {"cell": nn.Linear(R, R)}),
    ],
)
def test_parts_that_do_not_fit(field, options):
    with pytest.raises(ConfigError) as caught:
        RecurrentRouter(D, E, K, **options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "bad", [torch.zeros(T, R + 1).double(), torch.zeros(T - 1, R).double(), torch.zeros(T, R), [0.0], torch.zeros(R)]
)
def test_a_state_that_does_not_fit(bad):
    routers, x_LTD = chain()
    with pytest.raises(ConfigError) as caught:
        routers[0](x_LTD[0], state=bad)
    assert caught.value.field == "state"
