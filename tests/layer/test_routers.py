"""Every router in a layer over several ranks: the answer is one process's, with overlap and without, in the same bits.

Two or four ranks as two nodes, uneven tokens, one rank without any, a number of experts that is no power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, MoELayer, ShortcutBlock, prepare
from moe_overlap.placement.placement import Placement
from moe_overlap.routing import (
    BaseRouter,
    ExpertChoiceRouter,
    HashRouter,
    LinearRouter,
    Locality,
    LocMoEPlusRouter,
    LocMoERouter,
    Nodes,
    QuantileRouter,
    RecurrentRouter,
    SinkhornRouter,
    SmileRouter,
    SwitchRouter,
    VariableK,
)
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.transport.wrapper import Wrapper
from tests import oracle
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

F, NODES, VOCAB, STATE = 8, 2, 50, 6
TOKENS = {2: (7, 0), 4: (5, 17, 0, 9)}
EXPERTS = {2: 18, 4: 20}
DTYPE = torch.float64

ROUTERS = {
    "linear": partial(LinearRouter, aux_loss_coef=0.1, z_loss_coef=0.1),
    "sigmoid-groups": partial(LinearRouter, score="sigmoid", bias=True, n_group=2, topk_group=1, scale=2.5),
    "switch": partial(SwitchRouter, jitter=0.0),
    "locmoe": partial(LocMoERouter, mu=0.3, locality_bias=NODES),
    "locmoe-grap": partial(LocMoERouter, mu=0.3, gate="grap", capacity_factor=1.0, delta=0.1),
    "locmoe-capped": partial(LocMoERouter, mu=0.3, off_node_share=0.2),
    "locmoe+": partial(LocMoEPlusRouter, mu=0.3, gate="linear", share=0.9),
    "locmoe+max": partial(LocMoEPlusRouter, mu=0.3, gate="linear", delta="max", capacity_factor=0.3),
    "smile": partial(SmileRouter, num_nodes=NODES, alpha=0.1, beta=0.2),
    "smile-global": partial(SmileRouter, num_nodes=NODES, alpha=0.1, beta=0.2, balance="global"),
    "sinkhorn": partial(SinkhornRouter, aux_loss_coef=0.1),
    "base": partial(BaseRouter, aux_loss_coef=0.1),
    "quantile": QuantileRouter,
    "expert-choice": partial(ExpertChoiceRouter, average=3.0, allow_noncausal=True),
    "variable-k": partial(LinearRouter, variable_k=VariableK(threshold=0.4), aux_loss_coef=0.1, balance="global"),
    "recurrent": partial(RecurrentRouter, router_size=STATE, aux_loss_coef=0.1),
    "hash": lambda hidden, experts, k, dtype: HashRouter(VOCAB, experts, k),
}


@dataclass(frozen=True)
class Case:
    name: str
    world: int
    top_k: int

    @property
    def experts(self):
        return EXPERTS[self.world]

    @property
    def hidden(self):
        return 3 * self.experts

    def router(self):
        """With the same parameters on every rank."""
        router = ROUTERS[self.name](self.hidden, self.experts, self.top_k, dtype=DTYPE)
        fill(router.parameters(), seed=3)
        fill([bias for name, bias in router.named_buffers() if name == "expert_bias_E"], seed=5)
        return router

    def tokens(self, rank):
        generator = torch.Generator().manual_seed(50 + rank)
        x, dy = (torch.randn(TOKENS[self.world][rank], self.hidden, generator=generator, dtype=DTYPE) for _ in range(2))
        return x, dy, torch.randint(0, VOCAB, (len(x),), generator=generator)

    def told(self, rank):
        """What a call says beside its tokens: the state that a layer before has made."""
        if self.name != "recurrent":
            return {}
        generator = torch.Generator().manual_seed(70 + rank)
        return {"state": torch.randn(TOKENS[self.world][rank], STATE, generator=generator, dtype=DTYPE)}

    def weights(self):
        w_in, w_out = torch.empty(self.experts, 2 * F, self.hidden), torch.empty(self.experts, self.hidden, F)
        weights = [w_in.to(DTYPE), w_out.to(DTYPE)]
        fill(weights, seed=4)
        return weights


@torch.no_grad()
def fill(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=DTYPE) * tensor.shape[-1] ** -0.5)


def run_rank(case, me, schedule, *, overlap):
    """Output, gradients of x, experts and router, auxiliary loss."""
    layer = MoELayer(case.hidden, F, case.experts, case.top_k, transport=me.transport(), router=case.router(),
                     ranks_per_node=case.world // NODES, schedule=schedule, overlap=overlap, dtype=DTYPE)  # fmt: skip
    here = layer.ownership.expert_ids
    with torch.no_grad():
        for parameter, full in zip(layer.expert_weights, case.weights(), strict=True):
            parameter.copy_(full[list(here)])
    x, dy, token_ids = case.tokens(me.rank)
    x.requires_grad_()
    if case.name == "hash":
        layer.router.give(token_ids)
    y = layer(x, **case.told(me.rank))
    y = y[0] if isinstance(y, tuple) else y  # with the router's state
    aux = layer.take_aux_loss()
    loss = (y * dy).sum()
    (loss if aux is None else loss + aux).backward()
    results = {"y": y.detach(), "dx": x.grad, "aux": torch.zeros(()) if aux is None else aux.detach()}
    return results | {name: parameter.grad for name, parameter in layer.named_parameters()}


def one_process(case):
    """The same from one router in one process, called once for each rank's tokens: losses are summed over ranks."""
    router, weights = case.router(), [w.requires_grad_() for w in case.weights()]
    of_expert = tuple(expert * NODES // case.experts for expert in range(case.experts))
    losses, outputs, xs, decisions = [], [], [], []
    for rank in range(case.world):
        x, dy, token_ids = case.tokens(rank)
        xs.append(x.requires_grad_())
        told = case.told(rank)
        if getattr(router, "needs_nodes", False):
            told = {"local_experts": Nodes(of_expert=of_expert, num_nodes=NODES, own=rank * NODES // case.world)}
        if case.name == "hash":
            router.give(token_ids)
        decisions.append(router(x, **told))
        outputs.append(oracle.moe(x, decisions[-1].topk_ids_TK, decisions[-1].topk_weights_TK, *weights))
        losses.append((outputs[-1] * dy).sum())
    auxes = aux_losses(decisions, case.world)
    total = sum(losses) + sum(auxes)
    names = [f"router.{name}" for name, _ in router.named_parameters()]
    grads = torch.autograd.grad(total, [*xs, *weights, *router.parameters()], allow_unused=True)
    grads = [torch.zeros(()) if g is None else g for g in grads]
    named = dict(zip(["experts.gate_up_proj", "experts.down_proj", *names], grads[case.world :], strict=True))
    return outputs, grads[: case.world], auxes, named


def aux_losses(decisions, world):
    rests = [d.global_balance for d in decisions if d.global_balance is not None]
    losses = [torch.zeros((), dtype=DTYPE) if d.aux_loss is None else d.aux_loss for d in decisions]
    if rests:
        counts, tokens = sum(rest.counts_E for rest in rests), sum(rest.tokens for rest in rests)
        losses = [loss + rest.loss(counts, tokens, world) for loss, rest in zip(losses, rests, strict=True)]
    return losses


@pytest.mark.parametrize(
    ("name", "top_k"),
    [(name, top_k) for name in ROUTERS for top_k in (1, 8) if (name, top_k) != ("base", 8)],  # which is for top-1
)
@pytest.mark.parametrize("world", [2, 4])
def test_it_is_one_process_with_overlap_and_without_in_the_same_bits(name, world, top_k):
    case = Case(name, world, top_k)
    outputs, dxs, auxes, named = one_process(case)
    for seed, schedule in enumerate(("serial", "chunked(3)")):

        def both(me, schedule=schedule):
            return run_rank(case, me, schedule, overlap=True), run_rank(case, me, schedule, overlap=False)

        ranks = virtual_world(world, seed=seed).run(both)
        for on, off in ranks:
            for key in on:
                same_bits(on[key], off[key])
        for rank, (got, _) in enumerate(ranks):
            close(got["y"], outputs[rank].detach(), DTYPE)
            close(got["dx"], dxs[rank], DTYPE)
            close(got["aux"].to(DTYPE), auxes[rank].detach(), DTYPE)
        for key, want in named.items():
            parts = [got[key] for got, _ in ranks]
            if key.startswith("experts"):
                close(torch.cat(parts), want, DTYPE)
            else:
                assert want.abs().max() > 0, f"{key} has no gradient"
                close(sum(parts), want, DTYPE)


BUILDERS = ("chunked(2,tokens)", "chunked(2,experts)", "shared_expert", "shared_expert(ahead)", "shortcut",
            "shortcut, ahead")  # fmt: skip


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("name", ["linear", "locmoe", "hash"])
def test_every_builder_gives_the_same_bits_with_overlap_and_without(name, builder):
    case = Case(name, 4, 2)

    def run(me, overlap):
        shared = F if builder.startswith("shared_expert") else None
        schedule = "serial" if builder.startswith("shortcut") else builder
        layer = MoELayer(case.hidden, F, case.experts, 2, transport=me.transport(), router=case.router(),
                         ranks_per_node=2, schedule=schedule, overlap=overlap, shared_expert_size=shared,
                         dtype=DTYPE)  # fmt: skip
        model = layer
        if schedule == "serial":
            ops = [torch.nn.Linear(case.hidden, case.hidden, dtype=DTYPE) for _ in range(2)]
            model = ShortcutBlock(
                ops, layer, tap=1, slot=1, chunks=2, overlap=overlap, ahead=int(builder.endswith("ahead"))
            )
        fill(model.parameters(), seed=9)
        fill(layer.experts.parameters(), seed=me.rank)
        x, dy, token_ids = case.tokens(me.rank)
        if name == "hash":
            layer.router.give(token_ids)
        y = model(x.requires_grad_())
        aux = layer.take_aux_loss()
        loss = (y * dy).sum()
        (loss if aux is None else loss + aux).backward()
        return [y.detach(), x.grad, *(p.grad for p in model.parameters())]

    for on, off in virtual_world(4).run(lambda me: (run(me, True), run(me, False))):
        for got, want in zip(on, off, strict=True):
            same_bits(got, want)


def ddp_gradients():
    """Of the router's parameters, on one rank, from the layer in DistributedDataParallel."""
    case = Case("locmoe", 2, 1)
    layer = prepare(MoELayer(case.hidden, F, case.experts, 1, group=dist.group.WORLD, router=case.router(),
                             ranks_per_node=1, dtype=DTYPE))  # fmt: skip
    wrapped = DistributedDataParallel(layer)  # alive until backward, or it reduces nothing
    y = wrapped(case.tokens(dist.get_rank())[0])
    (layer.take_aux_loss() + 0 * y.sum()).backward()
    return {name: parameter.grad for name, parameter in layer.router.named_parameters()}


def test_under_ddp_the_router_s_gradients_are_one_process_s_with_a_node_for_each_token():
    """The losses alone: their mean over ranks is what one process has whose tokens say their node."""
    case = Case("locmoe", 2, 1)
    router = case.router()
    xs = [case.tokens(rank)[0] for rank in range(2)]
    own_T = torch.cat([torch.full((len(x),), rank) for rank, x in enumerate(xs)])
    of_expert = tuple(expert * 2 // case.experts for expert in range(case.experts))
    decision = router(torch.cat(xs), local_experts=Nodes(of_expert=of_expert, num_nodes=2, own=own_T))
    (decision.aux_loss + decision.global_balance.alone()).backward()
    for grads in gloo_pool(2).run(ddp_gradients):
        for name, parameter in router.named_parameters():
            close(grads[name], parameter.grad, DTYPE)


def test_a_rank_learns_its_node_s_row_and_no_other():
    case = Case("locmoe", 4, 1)
    grads = [
        results["router.locality_bias.weight"]
        for results in virtual_world(4).run(lambda me: run_rank(case, me, "serial", overlap=True))
    ]
    for rank, grad_NE in enumerate(grads):
        other = 1 - rank // 2
        assert grad_NE[other].abs().max() == 0
    assert grads[0][0].abs().max() > 0 and grads[3][1].abs().max() > 0


def test_nodes_are_those_of_the_placement():
    """Expert i is in slot 3 - i: node 0 has experts 2 and 3, whatever i // experts_per_rank says."""
    seen = {}

    class Spy(LinearRouter):
        def forward(self, x_TD, *, sequence_length=None, local_experts=None):
            seen[local_experts.own] = local_experts
            return super().forward(x_TD, local_experts=local_experts)

    def rank(me):
        placement = Placement(4, 4, 2, (3, 2, 1, 0))
        dispatcher = Dispatcher(transport=me.transport(), placement=placement, hidden=8, ffn_hidden=F, top_k=1,
                                activation="swiglu", dtype=torch.float32, ranks_per_node=1)  # fmt: skip
        layer = MoELayer(8, F, 4, 1, dispatcher=dispatcher, router=Spy(8, 4, 1, locality=Locality(mu=1.0)))
        layer(torch.ones(2, 8))
        layer.take_aux_loss()

    virtual_world(2).run(rank)
    assert seen[0].of_expert == seen[1].of_expert == (1, 1, 0, 0)


def test_a_layer_without_known_nodes_refuses_such_a_router():
    def rank(me):
        with pytest.raises(ConfigError) as caught:
            MoELayer(8, F, 4, 1, transport=me.transport(), router=LocMoERouter(8, 4))
        return caught.value.field

    assert virtual_world(2).run(rank) == ["ranks_per_node"] * 2


@pytest.mark.parametrize("top_k", [1, 2])
def test_another_number_of_nodes_is_refused_on_all_ranks_and_nothing_is_sent(top_k):
    """The bias has three rows on one rank and two on the other: the step is refused by one and raised by both."""

    def rank(me):
        router = LocMoERouter(8, 4, top_k, locality_bias=3 if me.rank else 2)
        layer = MoELayer(8, F, 4, top_k, transport=me.transport(), ranks_per_node=1, router=router)
        with pytest.raises(ConfigError):
            layer(torch.randn(3, 8))
        torch.manual_seed(0)
        layer.router = LocMoERouter(8, 4, top_k, locality_bias=2)
        y = layer(torch.randn(3, 8))
        layer.take_aux_loss()
        return y.shape

    assert virtual_world(2).run(rank) == [torch.Size([3, 8])] * 2


def test_noise_of_a_recompute_is_the_same_or_it_is_refused():
    torch.manual_seed(0)
    layer = MoELayer(8, F, 16, 1, router=SwitchRouter(8, 16, jitter=0.9, aux_loss_coef=0.0))
    with torch.no_grad():
        layer.router.weight.normal_()
    x = torch.randn(64, 8, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert x.grad.isfinite().all()
    y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    torch.randn(7)
    with pytest.raises(ConfigError, match="another choice"):
        y.sum().backward()


def test_hash_refuses_a_recompute_with_the_ids_of_another_forward():
    layer = MoELayer(8, F, 16, 2, router=HashRouter(VOCAB, 16, 2))
    x = torch.randn(20, 8, requires_grad=True)
    layer.router.give(torch.arange(20))
    y = checkpoint(layer, x, use_reentrant=False)
    layer.router.give(torch.arange(20, 40))
    with pytest.raises(ConfigError, match="another choice"):
        y.sum().backward()


class Peers(Wrapper):
    """Notes to which ranks rows were sent."""

    name = "peers"

    def __init__(self, inner):
        super().__init__(inner)
        self.met = set()

    def _start(self, exchange):
        sent, _ = exchange.counts()
        self.met |= {peer for peer, rows in enumerate(sent) if rows and peer != self.rank}
        return super()._start(exchange)


@pytest.mark.parametrize("name", ["locmoe", "smile", "hash"])
def test_hierarchical_exchanges_give_a_flat_dispatch_s_answer_and_meet_fewer_peers(name):
    """SMILE's two steps: (n - 1) + (m - 1) peers for 2 nodes of 2 ranks in the place of n m - 1."""
    case = Case(name, 4, 8)

    def rank(me, **options):
        transport = Peers(me.transport())
        layer = MoELayer(case.hidden, F, case.experts, case.top_k, transport=transport, router=case.router(),
                         ranks_per_node=2, dtype=DTYPE, **options)  # fmt: skip
        with torch.no_grad():
            for parameter, full in zip(layer.expert_weights, case.weights(), strict=True):
                parameter.copy_(full[list(layer.ownership.expert_ids)])
        x, _, token_ids = case.tokens(me.rank)
        if name == "hash":
            layer.router.give(token_ids)
        with torch.no_grad():
            return layer(x), transport.met

    flat = virtual_world(4).run(rank)
    two_steps = virtual_world(4).run(partial(rank, dedup="on", hierarchical=True))
    for (want, many), (got, few) in zip(flat, two_steps, strict=True):
        close(got, want, DTYPE)
        assert len(many) <= 3 and len(few) <= 2
    assert max(len(many) for _, many in flat) == 3 and max(len(few) for _, few in two_steps) == 2
