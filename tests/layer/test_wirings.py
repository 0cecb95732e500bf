"""Published wirings against the same models written out with plain layers, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_overlap import ConfigError, MoELayer, RemoteAbort
from moe_overlap.layer.wirings import FarSkip, arctic_block, longcat_block
from moe_overlap.schedule.published import arctic, longcat
from moe_overlap.schedule.recorder import record
from tests.ranks import virtual_world
from tests.tolerances import close

D, F, E, K, LAYERS = 8, 12, 4, 2, 3


class Branch(nn.Module):
    """tanh(h w), with a residual or without."""

    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D, dtype=torch.float64)
        self.residual = residual

    def forward(self, h):
        return torch.tanh(self.linear(h)) + (h if self.residual else 0)


def moes(me, count):
    return [MoELayer(D, F, E, K, transport=me.transport(), dtype=torch.float64) for _ in range(count)]


def norm():
    return nn.LayerNorm(D, dtype=torch.float64)


def plain_arctic(block, x):
    attention, mlp = block.backbone
    return mlp(attention(x)) + block.moe(block.pre_norm(x))


def plain_longcat(block, x):
    h = block.backbone[0](x)
    rest = block.backbone[3](block.backbone[2](block.backbone[1](h)))
    return rest + block.moe(block.pre_norm(h))


def plain_farskip(model, x):
    full, bare = x, x
    for attention, moe, shared, before in zip(model.attentions, model.moes, model.shared, model.norms, strict=True):
        a, h = attention(bare), before(full)
        bare = full + a + shared(h)
        full = bare + moe(h)
    return full


def make(me, name):
    torch.manual_seed(4)
    ops = [Branch(residual=True) for _ in range(4)]
    if name == "arctic":
        return arctic_block(*ops[:2], *moes(me, 1), norm=norm()), plain_arctic
    if name == "longcat":
        return longcat_block(ops[:2], ops[2:], *moes(me, 1), norm=norm()), plain_longcat
    parts = [[Branch(residual=False) for _ in range(LAYERS)] for _ in range(2)]
    return (
        FarSkip(parts[0], moes(me, LAYERS), parts[1], [norm() for _ in range(LAYERS)],
                attention_beside=name.partition("-")[2]),
        plain_farskip,
    )  # fmt: skip


def results(me, name, *, plain):
    model, written_out = make(me, name)
    x = torch.randn(7 - me.rank, D, dtype=torch.float64, generator=torch.Generator().manual_seed(me.rank))
    x.requires_grad_()
    with record() as events:
        y = written_out(model, x) if plain else model(x)
        (y * y).sum().backward()
    order = [event.action for event in events if event.phase == "forward" and event.lane == "comp"]
    return order, [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("name", ["arctic", "longcat", "farskip-combine", "farskip-dispatch"])
def test_the_wiring_is_that_of_the_paper(name):
    got = virtual_world(2).run(lambda me: results(me, name, plain=False))
    want = virtual_world(2).run(lambda me: results(me, name, plain=True))
    for (_, mine), (_, right) in zip(got, want, strict=True):
        for one, other in zip(mine, right, strict=True):
            close(one, other)


@pytest.mark.parametrize(("name", "pair"), [("arctic", arctic()), ("longcat", longcat())])
def test_the_order_is_that_of_the_builder(name, pair):
    planned = [action.text for action in pair.forward if action.lane == "comp"]
    assert [order for order, _ in virtual_world(2).run(lambda me: results(me, name, plain=False))] == [planned] * 2


def test_a_schedule_of_ones_own_stands_in_the_place_of_the_slot():
    block = arctic_block(nn.Identity(), nn.Identity(), MoELayer(D, F, E, K), schedule=arctic(chunks=2))
    assert block.schedule.chunks == 2


def test_numbers_of_parts_are_checked():
    layer, op = MoELayer(D, F, E, K), Branch(residual=True)
    with pytest.raises(ConfigError, match="attentions"):
        longcat_block([op], [op, op], layer)
    with pytest.raises(ConfigError, match="shared"):
        FarSkip([op], [layer], [], [op])
    with pytest.raises(ConfigError, match="twice"):
        FarSkip([op, op], [layer, layer], [op, op], [op, op])
    with pytest.raises(ConfigError, match="attention_beside"):
        FarSkip([op], [layer], [op], [op], attention_beside="both")
    for wrong in (op, MoELayer(D, F, E, K, shared_expert_size=4)):
        with pytest.raises(ConfigError, match="moes"):
            FarSkip([op], [wrong], [op], [op])
    x = torch.randn(2, D)
    assert FarSkip([], [], [], [])(x) is x


@pytest.mark.parametrize("part", ["attentions", "shared", "norms"])
@pytest.mark.parametrize("wrong", [nn.Linear(D + 1, D), nn.Linear(D, 1, dtype=torch.float64)])
def test_a_part_that_fails_on_one_rank_is_heard_by_all(part, wrong):
    """Too wide an input raises; a result of width 1 would be broadcast."""

    def rank(me):
        model, _ = make(me, "farskip-combine")
        if me.rank:
            getattr(model, part)[1] = wrong
        with pytest.raises((RuntimeError, ConfigError) if me.rank else RemoteAbort) as caught:
            model(torch.randn(3, D, dtype=torch.float64))
        return str(caught.value)

    assert part.rstrip("s") in virtual_world(2).run(rank)[0]
