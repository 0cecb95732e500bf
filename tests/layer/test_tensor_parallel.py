"""Experts split over a tensor-parallel group: the same layer as with whole experts, on virtual and on gloo ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_overlap import ConfigError, LossFreeBalancer, MoELayer, aux_loss
from moe_overlap.layer.tensor_parallel import TensorParallelMoE, expert_parts
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.builders import chunked
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests import oracle
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

D, F, E, K = 8, 12, 4, 2
TOKENS = (7, 4)  # of each group
WAYS = {
    "plain": {},
    "deduplicated": {"dedup": "on"},
    "gathered": {"dedup": "on", "hierarchical": True},
}


def weights():
    generator = torch.Generator().manual_seed(5)
    shapes = {"router": (E, D), "w_in": (E, 2 * F, D), "w_out": (E, D, F)}
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64) / 3 for name, shape in shapes.items()}


def inputs(group):
    generator = torch.Generator().manual_seed(group)
    return [torch.randn(TOKENS[group], D, generator=generator, dtype=torch.float64) for _ in range(2)]


def run(transport, size, way, overlap=True):
    """(y, dx, router gradient, w_in gradient, w_out gradient) of one rank."""
    given = weights()
    rank, ranks = transport.rank, transport.world_size
    hierarchical = way == "gathered" and ranks > size
    options = WAYS[way] | {"hierarchical": hierarchical, "ranks_per_node": size if ranks > size else None}
    layer = TensorParallelMoE(D, F, E, K, tensor_ranks=size, transport=transport, dtype=torch.float64,
                              schedule=chunked(2), overlap=overlap, **options)  # fmt: skip
    parts = expert_parts(given["w_in"], given["w_out"], rank=rank, ranks=ranks, tensor_ranks=size)
    with torch.no_grad():
        layer.router.weight.copy_(given["router"])
        for parameter, value in zip(layer.moe.experts.parameters(), parts, strict=True):
            parameter.copy_(value)
    x, dy = inputs(rank // size)
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, layer.router.weight.grad, *(p.grad for p in layer.moe.experts.parameters())]


def right(groups):
    """The same of whole experts in one process, by group."""
    given = {name: value.requires_grad_() for name, value in weights().items()}
    router = LinearRouter(D, E, K, dtype=torch.float64)
    found, losses = [], []
    for group in range(groups):
        x, dy = inputs(group)
        x.requires_grad_()
        with torch.no_grad():
            router.weight.copy_(given["router"])
        decision = router(x)
        y = oracle.moe(x, decision.topk_ids_TK, decision.topk_weights_TK, given["w_in"], given["w_out"])
        losses.append((y * dy).sum())
        found.append([y.detach(), *torch.autograd.grad(losses[-1], [x, router.weight], retain_graph=True)])
    experts = torch.autograd.grad(sum(losses), [given["w_in"], given["w_out"]])
    return found, experts


def check(results, size):
    found, experts = right(len(results) // size)
    for rank, (*mine, dw_in, dw_out) in enumerate(results):
        for got, want in zip(mine, found[rank // size], strict=True):
            close(got, want)
        wanted = expert_parts(*experts, rank=rank, ranks=len(results), tensor_ranks=size)
        close(dw_in, wanted[0])
        close(dw_out, wanted[1])
        for got, same in zip(mine, results[rank // size * size], strict=False):
            same_bits(got, same)  # alike on all ranks of a group


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("ranks", "size"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_it_is_the_layer_of_whole_experts(ranks, size, way):
    results = virtual_world(ranks).run(lambda me: run(me.transport(), size, way))
    joined = virtual_world(ranks, seed=1).run(lambda me: run(me.transport(), size, way, overlap=False))
    check(results, size)
    for mine, other in zip(results, joined, strict=True):
        for got, same in zip(mine, other, strict=True):
            same_bits(got, same)


def run_on_gloo(size, ways):
    return [run(ProcessGroupTransport(dist.group.WORLD, timeout_s=20.0), size, way) for way in ways]


def test_on_gloo():
    for results in zip(*gloo_pool(4).run(run_on_gloo, 2, list(WAYS)), strict=True):
        check(list(results), 2)


def test_a_token_crosses_to_each_group_once():
    """Rows between groups: with duplicates each of the two ranks of a group would send all of its tokens."""

    def rank(me):
        transport = me.transport()
        run(transport, 2, "gathered")
        return transport.stats.inter_node_bytes

    sent = virtual_world(4).run(rank)
    router = LinearRouter(D, E, K, dtype=torch.float64)
    with torch.no_grad():
        router.weight.copy_(weights()["router"])
    for group in range(2):
        x, _ = inputs(group)
        other = (router(x).topk_ids_TK // (E // 2) == 1 - group).any(dim=1)
        begins = [TOKENS[group] * part // 2 for part in range(3)]
        for part in range(2):
            mine = int(other[begins[part] : begins[part + 1]].sum())
            assert sent[2 * group + part] >= mine * D * 8
    back = [int((router(inputs(g)[0]).topk_ids_TK // (E // 2) == 1 - g).any(dim=1).sum()) for g in range(2)]
    assert sum(sent) == 4 * sum(back) * D * 8  # there, back, and both gradients


def test_what_does_not_divide_is_refused():
    for size in (0, 5, "2"):
        with pytest.raises(ConfigError, match="tensor_ranks"):
            TensorParallelMoE(D, F, E, K, tensor_ranks=size)
    with pytest.raises(ConfigError, match="tensor_ranks"):
        TensorParallelMoE(D, F, E, K, tensor_ranks=2)  # of one rank
    layer = TensorParallelMoE(D, F, E, K, tensor_ranks=1, router=LinearRouter(D, E, K, zero_experts=1))
    with pytest.raises(NotImplementedError, match="zero experts"):
        layer(torch.randn(3, D))
    assert isinstance(layer.moe, MoELayer)


def small(transport, **options):
    torch.manual_seed(3)
    return TensorParallelMoE(D, F, E, K, tensor_ranks=2, transport=transport, dtype=torch.float64, **options)


def test_auto_asks_the_router_for_its_probes_too():
    def rank(me):
        x = inputs(me.rank // 2)[0]
        return small(me.transport(), schedule="auto")(x), small(me.transport())(x)

    for one, other in virtual_world(4).run(rank):
        close(one, other)


def test_the_router_is_built_from_its_options():
    def rank(me):
        x = inputs(me.rank // 2)[0]
        options = {"aux_loss_coef": 0.1, "capacity_factor": 1.0, "bad_logits": "drop"}
        torch.manual_seed(3)
        router = LinearRouter(D, E, K, score="sigmoid", dtype=torch.float64, **options)
        built, given = small(me.transport(), router="sigmoid", **options), small(me.transport(), router=router)
        with torch.no_grad():
            given.router.weight.copy_(built.router.weight)
            for one, other in zip(given.moe.experts.parameters(), built.moe.experts.parameters(), strict=True):
                one.copy_(other)
        same_bits(built(x), given(x))
        same_bits(aux_loss(built), aux_loss(given))
        return aux_loss(built) is not None

    assert all(virtual_world(2).run(rank))


def test_what_the_router_of_one_rank_refuses_is_heard_by_all_and_the_layer_goes_on():
    def rank(me):
        layer, x = small(me.transport()), inputs(me.rank // 2)[0]
        with pytest.raises(ConfigError, match="hidden_size"):
            layer(x[:, 1:] if me.rank == 1 else x)
        assert layer.moe.router.of is None
        return layer(x)

    results = virtual_world(4).run(rank)
    same_bits(results[0], results[1])


def test_a_balancer_sums_over_the_groups():
    """A router by itself is one rank's alone: biases of groups with other tokens would part."""

    def biases(me, size):
        torch.manual_seed(3)
        layer = TensorParallelMoE(D, F, E, K, tensor_ranks=size, transport=me.transport(), bias=True)
        balancer = LossFreeBalancer(layer, update_rate=0.5)
        for _ in range(3):
            layer(inputs(me.rank // size)[0].float())
            balancer.step()
        return layer.router.expert_bias_E

    whole = virtual_world(2).run(lambda me: biases(me, 1))
    for bias in virtual_world(4).run(lambda me: biases(me, 2)):
        same_bits(bias, whole[0])
    assert whole[0].abs().sum() > 0


@pytest.mark.parametrize("options", [{"shared_expert_size": 4}, {"latent_size": 4}])
def test_parts_that_would_read_a_share_of_the_tokens_are_refused(options):
    with pytest.raises(NotImplementedError, match="share of the tokens"):
        TensorParallelMoE(D, F, E, K, tensor_ranks=1, **options)


def test_the_layer_of_the_parts_is_not_called_alone():
    layer = TensorParallelMoE(D, F, E, K, tensor_ranks=1)
    with pytest.raises(RuntimeError, match="call the TensorParallelMoE"):
        layer.moe(torch.randn(3, D))
