"""The auxiliary loss over the tokens of all ranks: the mean over ranks is the loss of one process, gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moe_overlap import MoELayer, ShortcutBlock, aux_loss, moe_forward, prepare
from moe_overlap.routing import LinearRouter, LocMoEPlusRouter, Nodes, RoutingDecision
from tests.layers import D, E, F, make, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close

SIZES = (7, 0, 12, 5)  # of each rank: uneven, and one without tokens
OPTIONS = {"aux_loss_coef": 0.3, "z_loss_coef": 0.0, "balance": "global"}


def all_tokens(ranks):
    return [tokens(size, seed=rank + 1) for rank, size in enumerate(SIZES[:ranks])]


def one_process(ranks, **options):
    """(loss, gradient of the router, gradient of x) of a router that has all tokens."""
    torch.manual_seed(3)
    router = LinearRouter(D, E, 2, dtype=torch.float64, **options)
    router.load_state_dict(make(**OPTIONS).router.state_dict(), strict=False)
    x = torch.cat(all_tokens(ranks)).requires_grad_()
    loss = router(x).aux_loss
    return loss.detach(), *torch.autograd.grad(loss, [router.weight, x])


def of_rank(me, call, **options):
    """What one rank has: (its loss, its gradients of the router and of x), both over the number of ranks."""
    layer = make(me.transport(), **OPTIONS, **options)
    x = all_tokens(me.world_size)[me.rank].requires_grad_()
    loss = call(layer, x) / me.world_size
    return loss.detach(), *torch.autograd.grad(loss, [layer.router.weight, x])


def check_sum(results, want):
    loss, d_router, d_x = zip(*results, strict=True)
    close(sum(loss), want[0])
    close(sum(d_router), want[1])
    close(torch.cat(d_x), want[2])
    assert want[1].abs().max() > 1e-6


def called(layer, x):
    layer(x)
    return aux_loss(layer)


def by_tickets(layer, x):
    ticket = layer.begin(x)
    layer.run_experts(ticket)
    layer.finish(ticket)
    return aux_loss(layer)


def in_a_block(layer, x):
    ShortcutBlock([torch.nn.Identity()], layer, tap=0, slot=0)(x)
    return aux_loss(layer)


def recomputed(layer, x):
    y = checkpoint(layer, x, use_reentrant=False)
    return aux_loss(layer) + 0.0 * y.sum()


CALLS = [called, by_tickets, in_a_block, recomputed]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", [{}, {"schedule": "chunked(2)", "dedup": "on"}, {"capacity_factor": 0.5}])
def test_ranks_together_have_the_gradients_of_one_process(call, options):
    """With a capacity the counts that the ranks agree on are not those of the choices."""
    if call is in_a_block:  # which orders the exchanges itself
        options = {name: value for name, value in options.items() if name != "schedule"}
    check_sum(virtual_world(4).run(lambda me: of_rank(me, call, **options)), one_process(4, aux_loss_coef=0.3))


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_numbers_of_ranks(ranks):
    check_sum(virtual_world(ranks).run(lambda me: of_rank(me, called)), one_process(ranks, aux_loss_coef=0.3))


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.5}])
def test_where_ranks_do_not_hear_all_counts(options):
    """As with more than 64 ranks: the sums over the ranks are all that is known of the others."""

    def rank(me):
        transport = me.transport()
        transport.gathered_ranks = 2
        layer = make(transport, **OPTIONS, **options)
        x = all_tokens(4)[me.rank].requires_grad_()
        loss = called(layer, x) / 4
        assert layer.last_exchange.counts.table is None
        return loss.detach(), *torch.autograd.grad(loss, [layer.router.weight, x])

    check_sum(virtual_world(4).run(rank), one_process(4, aux_loss_coef=0.3))


def test_who_calls_the_router_sums_over_the_ranks():
    """The functional form: the counts are the caller's, as the routing is."""

    def rank(me):
        layer = make(me.transport(), **OPTIONS)
        x = all_tokens(4)[me.rank].requires_grad_()
        routing = layer.router(x)
        y = moe_forward(x, routing.topk_ids_TK, routing.topk_weights_TK, *layer.expert_weights,
                        transport=layer.transport)  # fmt: skip
        rest = routing.global_balance
        counted = torch.cat([rest.counts_E, rest.tokens.reshape(1)])
        counted = layer.transport.all_reduce(counted).wait()
        loss = (rest.loss(counted[:-1], counted[-1], 4) + 0.0 * y.sum()) / 4
        return loss.detach(), *torch.autograd.grad(loss, [layer.router.weight, x])

    check_sum(virtual_world(4).run(rank), one_process(4, aux_loss_coef=0.3))


def test_each_level_is_another_loss_where_tokens_are_uneven():
    """And the sequence level is that of each row of x, whatever the ranks."""

    def rank(me, balance):
        layer = make(me.transport(), aux_loss_coef=1.0, balance=balance)
        x = tokens(12, seed=me.rank).reshape(3, 4, D)
        layer(x)
        return aux_loss(layer).detach(), [layer.router(row, sequence_length=4).aux_loss for row in x]

    got = {balance: virtual_world(2).run(lambda me, b=balance: rank(me, b)) for balance in ("micro", "sequence")}
    for loss, rows in got["sequence"]:
        close(loss, sum(rows).detach() / 3)
    assert abs(got["micro"][0][0] - got["sequence"][0][0]) > 1e-3


def test_counts_come_from_the_agreement_unless_something_is_dropped():
    def rank(me, **options):
        layer = make(me.transport(), **OPTIONS | options)
        stats = layer.transport.stats
        with set_checkpoint_early_stop(False):
            y = checkpoint(layer, all_tokens(2)[0].requires_grad_(), use_reentrant=False)
            said = stats.meta_bytes
            y.sum().backward()
        with torch.no_grad():
            layer(all_tokens(2)[0])
        return said, stats.meta_bytes - said

    local = virtual_world(2).run(lambda me: rank(me, balance="micro"))
    free = virtual_world(2).run(rank)
    paid = virtual_world(2).run(lambda me: rank(me, capacity_factor=1.0))
    assert free == local, "nothing is said for it"
    for (more, later), (less, as_before) in zip(paid, free, strict=True):
        assert more > less, "one sum over the ranks"
        assert later == as_before, "and none in a recompute, or where nothing needs a gradient"


class OwnRouter(torch.nn.Module):
    """A user's: it has heard of no level, and returns a loss of its own."""

    def __init__(self):
        super().__init__()
        self.inner = LinearRouter(D, E, 2, dtype=torch.float64)

    def forward(self, x):
        found = self.inner(x)
        return RoutingDecision(topk_ids_TK=found.topk_ids_TK, topk_weights_TK=found.topk_weights_TK,
                               tokens_per_expert_E=found.tokens_per_expert_E, dropped_tokens=found.dropped_tokens,
                               status=found.status, aux_loss=found.topk_weights_TK.sum())  # fmt: skip


def test_a_router_with_a_loss_of_its_own_goes_on_working():
    def rank(me):
        layer = make(me.transport(), router=OwnRouter())
        x = tokens(6)
        layer(x)
        close(aux_loss(layer), layer.router(x).aux_loss)

    virtual_world(2).run(rank)


def test_losses_of_several_calls_add_up():
    def rank(me, calls):
        layer = make(me.transport(), **OPTIONS)
        outputs = [layer(tokens(5, seed=call)) for call in calls]
        return aux_loss(layer).detach(), outputs

    both, first, second = (virtual_world(2).run(lambda me, c=calls: rank(me, c)) for calls in ([0, 1], [0], [1]))
    for rank_of in range(2):
        close(both[rank_of][0], first[rank_of][0] + second[rank_of][0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("balance", ["sequence", "global"])
def test_one_rank_compiles_without_a_graph_break(backend, balance):
    torch._dynamo.reset()
    layer = make(aux_loss_coef=0.3, balance=balance)
    x = tokens(12).reshape(3, 4, D)
    call = torch.compile(layer, backend=backend, fullgraph=True)
    got, want = [], []
    for found, one in ((got, call), (want, layer)):
        y = one(x)
        loss = y.square().mean() + aux_loss(layer)
        found += [loss.detach(), *torch.autograd.grad(loss, list(layer.parameters()))]
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs)


def replicated(replicas, prepared):
    """On a gloo rank of four: what `of_rank` gives, of a layer on a mesh (replicas, experts)."""
    mesh = init_device_mesh("cpu", (replicas, 4 // replicas), mesh_dim_names=("replicas", "experts"))
    torch.manual_seed(3)
    layer = MoELayer(D, F, E, 2, group=mesh, dtype=torch.float64, **OPTIONS)
    if prepared:
        prepare(layer)
    x = all_tokens(4)[dist.get_rank()].requires_grad_()
    results = []
    for call in (called, recomputed):
        loss = call(layer, x) / 4
        results.append((loss.detach(), *torch.autograd.grad(loss, [layer.router.weight, x])))
    with torch.no_grad():  # replicas may evaluate as often as they like
        for _ in range(mesh.get_local_rank(0)):
            layer(x)
    return results


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("replicas", [2, 4])
def test_expert_parallel_in_data_parallel(replicas, prepared):
    want = one_process(4, aux_loss_coef=0.3)
    for results in zip(*gloo_pool(4).run(replicated, replicas, prepared), strict=True):
        check_sum(results, want)


def under_ddp():
    """On a gloo rank of four that has all experts: the router's gradient, of which DDP has made a mean."""
    torch.manual_seed(3)
    layer = MoELayer(D, F, E, 2, replicate_group=dist.group.WORLD, dtype=torch.float64, **OPTIONS)
    ddp = DistributedDataParallel(prepare(layer))
    y = ddp(all_tokens(4)[dist.get_rank()])
    (aux_loss(ddp) + 0.0 * y.sum()).backward()
    return layer.router.weight.grad


def test_plain_data_parallel():
    _, want, _ = one_process(4, aux_loss_coef=0.3)
    for found in gloo_pool(4).run(under_ddp):
        close(found, want)


def test_tokens_that_take_fewer_experts_than_top_k_are_counted():
    """LocMoE+'s share, in eval mode without a capacity: the counts of the exchange are not K a token."""
    options = {"share": 0.5, "gate": "linear", "mu": 0.0, "eval_capacity_factor": None, "aux_loss_coef": 0.3}
    given = all_tokens(2)

    def rank(me):
        router = LocMoEPlusRouter(D, E, 2, dtype=torch.float64, **options)
        layer = make(me.transport(), router=router, ranks_per_node=1).eval()
        with torch.no_grad():
            router.weight.copy_(20 * make().router.weight)
        x = given[me.rank].requires_grad_()
        layer(x)
        loss = aux_loss(layer) / 2
        return loss.detach(), *torch.autograd.grad(loss, [router.weight, x])

    results = virtual_world(2).run(rank)
    x = torch.cat(given).detach().requires_grad_()
    router = LocMoEPlusRouter(D, E, 2, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        router.weight.copy_(20 * make().router.weight)
    decision = router(x, local_experts=Nodes(of_expert=(0,) * E, num_nodes=1, own=0))
    assert 0 < (decision.topk_ids_TK < 0).sum() < len(x)
    loss = decision.aux_loss if decision.global_balance is None else decision.global_balance.alone()
    check_sum(results, (loss.detach(), *torch.autograd.grad(loss, [router.weight, x])))
