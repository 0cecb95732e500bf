"""Copies of experts that FSDP2 has sharded over their replicas: gathered weights sent once, and gradients brought home.

The ranks of the mesh [[0, 1], [2, 3]]: rows share the experts out, columns hold the same ones, a shard on each.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import moe_overlap as mo
from moe_overlap.agreement.seats import seats_of
from moe_overlap.errors import ConfigError, MoeTransportError
from moe_overlap.measure.timeline import record
from moe_overlap.placement import LocalFirst, Placement
from tests.layer.goes import COSTS
from tests.layers import D, E, F, K, exchange_fails
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits

RANKS, SPREAD, STEPS, BATCHES = 4, 2, 5, 2
# 3 experts at home on rank 0, so that their shards are of 2 and of 1.
COPIED = Placement.of_ranks([[0, 1, 2, 7], [3, 4, 5, 6, 7, 0]], homes=[0] * 3 + [1] * 5, selector=LocalFirst())
PLAIN = Placement.of_ranks(seats_of(COPIED).homes)
IDENTITY = Placement.identity(E, SPREAD)
RULES = {
    "rule": lambda: mo.ReplicationRule(phases=COSTS, spare=2),
    "switch": lambda: mo.ParallelismSwitch(phases=COSTS, degrees=[SPREAD]),
}


class Model(nn.Module):
    """Two layers that add to what they read."""

    def __init__(self, grid=None, placement=None, dtype=torch.float64, checkpointed=False, schedule="chunked(2)"):
        super().__init__()
        torch.manual_seed(3)
        self.checkpointed = checkpointed
        self.entry = nn.Linear(D, D, dtype=dtype)
        options = {"group": grid, "placement": placement, "dtype": dtype, "schedule": schedule}
        self.layers = nn.ModuleList([mo.MoELayer(D, F, E, K, **options) for _ in range(2)])

    def forward(self, x):
        h = self.entry(x)
        for layer in self.layers:
            h = h + (checkpoint(layer, h, use_reentrant=False) if self.checkpointed else layer(h))
        return h


def tokens(step, batch, rank, dtype=torch.float64):
    """Positive, so that some experts are wanted more than others."""
    seed = 100 * step + 10 * batch + rank
    return torch.rand(16, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(y, x):
    return (y - x.roll(1, dims=1)).square().mean() / BATCHES


def sharded(how="kept", *, placement=COPIED, reshard=True, policy=None, **options):
    """The model on this rank, the experts sharded over their replicas and all else over all ranks. how: that
    the copies of `placement` are "kept"; else which rule makes copies for a step, None for none at all."""
    grid = init_device_mesh("cpu", (RANKS // SPREAD, SPREAD), mesh_dim_names=("replicas", "experts"))
    data = init_device_mesh("cpu", (RANKS,))
    model = mo.prepare(Model(grid, placement if how == "kept" else PLAIN, **options))
    wrap = {} if policy is None else {"mp_policy": policy}
    for layer in model.layers:
        if how in RULES:
            layer.dispatcher.rule = RULES[how]()
        fully_shard(layer.router, mesh=data, **wrap)
        fully_shard(layer, mesh=grid["replicas"], reshard_after_forward=reshard, **wrap)
    return fully_shard(model, mesh=data, **wrap)


def optimizer_of(model, fused=False):
    return torch.optim.AdamW(mo.param_groups(model) if dist.is_initialized() else model.parameters(), 0.01, fused=fused)


def fetches(events):
    """By phase, of all layers: how often weights were sent for copies."""
    wire = [one.phase for one in events if one.lane == "wire" and one.action.startswith("Wf")]
    return wire.count("forward"), wire.count("recompute")


def experts_of(layer, of=lambda weight: weight):
    """The tensors of this rank's experts, whole; each is a shard of it here."""
    found = [of(weight) for weight in layer.experts.parameters()]
    for one in found:
        assert isinstance(one, DTensor) and one.to_local().shape[0] < one.shape[0]
    return [one.full_tensor().detach() for one in found]


def train(how, dtype, fused, options):
    """Of every step: what came out, the gradients of the experts, and the fetches of each micro-batch; the experts."""
    model = sharded(how, dtype=dtype, **options)
    optimizer = optimizer_of(model, fused)
    outputs, gradients, fetched = [], [], []
    for step in range(STEPS):
        for batch in range(BATCHES):
            x = tokens(step, batch, dist.get_rank(), dtype)
            with record() as events:
                y = model(x)
                loss_of(y, x).backward()
            outputs.append(y.detach())
            fetched.append(fetches(events))
        gradients += [grad for layer in model.layers for grad in experts_of(layer, lambda weight: weight.grad)]
        optimizer.step()
        optimizer.zero_grad()
    return outputs, gradients, fetched, [weight for layer in model.layers for weight in experts_of(layer)]


@lru_cache(maxsize=2)
def one_process(dtype):
    """The same of all experts and all ranks' tokens; outputs by rank."""
    model = Model(dtype=dtype, schedule="serial")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    outputs, gradients = [[] for _ in range(RANKS)], []
    for step in range(STEPS):
        for batch in range(BATCHES):
            for rank in range(RANKS):
                x = tokens(step, batch, rank, dtype)
                y = model(x)
                (loss_of(y, x) / RANKS).backward()
                outputs[rank].append(y.detach())
        gradients += [weight.grad.clone() for layer in model.layers for weight in layer.experts.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return outputs, gradients, [w.detach() for layer in model.layers for w in layer.experts.parameters()]


@pytest.mark.parametrize(("how", "dtype", "fused", "options"), [
    ("kept", torch.float64, False, {}),
    ("kept", torch.float64, True, {"reshard": False}),
    ("kept", torch.float32, False, {"checkpointed": True}),
    ("kept", torch.float64, True, {"checkpointed": True, "reshard": False}),
    ("rule", torch.float64, False, {}),
    ("switch", torch.float32, False, {"reshard": False, "checkpointed": True}),
], ids=str)  # fmt: skip
def test_five_steps_are_those_of_one_process(how, dtype, fused, options):
    outputs, gradients, experts = one_process(dtype)
    for rank, found in enumerate(gloo_pool(RANKS).run(train, how, dtype, fused, options)):
        homes = list(seats_of(COPIED).homes[rank % SPREAD])
        for got, want in zip(found[0], outputs[rank], strict=True):
            close(got, want)
        for got, want in zip((*found[1], *found[3]), (*gradients, *experts), strict=True):
            close(got, want[homes])
        if how == "kept":  # once after each step, for two layers
            assert found[2] == [(2, 0), (0, 0)] * STEPS
        else:  # in the steps that are decided so, and again in a recompute
            again = options.get("checkpointed", False)
            assert any(forward for forward, _ in found[2])
            assert all(recompute == again * forward for forward, recompute in found[2])


# ---------------------------------------------------------------- when a copy is out of date


def called(model, *, train=False):
    """(y, fetches) of a call, with its backward or without gradients."""
    x = tokens(0, 0, dist.get_rank())
    with record() as events, torch.set_grad_enabled(train):
        y = model(x)
        if train:
            loss_of(y, x).backward()
    return y.detach(), fetches(events)[0]


def scaled(model):
    with torch.no_grad():
        for weight in model.layers[0].experts.parameters():
            weight.mul_(1.5)


def scaled_shards(model):
    with torch.no_grad():
        for weight in model.layers[0].experts.parameters():
            weight.to_local().mul_(1.5)


def written(model):
    """As torch.distributed.checkpoint.load does."""
    for name, value in model.layers[0].experts.state_dict().items():
        assert name in ("gate_up_proj", "down_proj")
        value.to_local().mul_(0.9)


def loaded(model):
    layer = model.layers[0]
    state = {name: mo.mark_experts(value * 0.5, layer) for name, value in layer.experts.state_dict().items()}
    layer.experts.load_state_dict(state)


def stepped_in_part(model):
    """One weight of the two, and by a fused optimizer, of which no counter tells."""
    weight = next(model.layers[0].experts.parameters())
    weight.grad = torch.ones_like(weight)
    torch.optim.Adam([weight], lr=0.1, fused=True).step()
    weight.grad = None


def changed():
    model, plain = sharded(), sharded(None)
    for change in (lambda model: None, scaled, scaled_shards, written, loaded, stepped_in_part):
        for one in (model, plain):
            change(one)
        y, fetched = called(model)
        close(y, called(plain)[0])
        assert fetched == (1 if change.__name__ != "<lambda>" else 2), change
        assert called(model)[1] == 0
    for layer in model.layers:
        layer.forget_copies()
    assert called(model)[1] == 2


def test_whatever_changes_shards_makes_copies_out_of_date():
    gloo_pool(RANKS).run(changed)


def left_unsharded():
    """Without reshard_after_forward what a call without gradients has gathered is read until the next backward is over,
    whatever an optimizer has done to the shards. Copies are those of what is read."""
    models = model, plain = sharded(reshard=False), sharded(None, reshard=False)
    optimizers = [optimizer_of(one) for one in models]
    for one in models:
        called(one, train=True)
    seen = [called(one) for one in models]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    results = [seen]
    for train in (False, True, True, False):
        results.append([called(one, train=train) for one in models])
    for (y, _), (want, _) in results:
        close(y, want)
    return [fetched for (_, fetched), _ in results]


def test_copies_of_weights_that_stayed_gathered_are_those_that_are_read():
    assert gloo_pool(RANKS).run(left_unsharded) == [[0, 0, 0, 2, 0]] * RANKS


def rounded(how):
    """Gradients of experts, float32 shards computed in bfloat16 and reduced in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(how, dtype=torch.float32, policy=policy)
    x = tokens(0, 0, dist.get_rank(), torch.float32)
    loss_of(model(x).float(), x).backward()
    return [grad for layer in model.layers for grad in experts_of(layer, lambda weight: weight.grad)]


def test_gradients_come_home_unrounded_under_mixed_precision():
    """Each is one rounding to bfloat16 away from that of the same rows at home."""
    kept, plain = (gloo_pool(RANKS).run(rounded, how) for how in ("kept", None))
    for one, other in zip(kept, plain, strict=True):
        for got, want in zip(one, other, strict=True):
            assert got.dtype == torch.float32
            close(got, want, torch.bfloat16)


# ---------------------------------------------------------------- homes that move


def somewhere(start, seed):
    """As many homes on each rank as in `start`, drawn by a seed, and a copy on the other rank."""
    draw = random.Random(seed)
    order = draw.sample(range(E), E)
    first = len(seats_of(start).homes[0])
    homes = [0 if expert in order[:first] else 1 for expert in range(E)]
    ranks = [[*order[:first], order[-1]], [*order[first:], order[0]]]
    return Placement.of_ranks(ranks, homes=homes, selector=LocalFirst())


def steps_of(model, optimizer, outputs):
    """The number of each step when it is over, its outputs added."""
    for step in range(STEPS):
        for batch in range(BATCHES):
            x = tokens(step, batch, dist.get_rank())
            y = model(x)
            loss_of(y, x).backward()
            outputs.append(y.detach())
        optimizer.step()
        optimizer.zero_grad()
        yield step


def moving(even, reshard):
    """Outputs of steps between which one layer moves; the experts then, and what AdamW keeps of them, by number."""
    start = IDENTITY if even else COPIED
    model = sharded("kept", placement=start, reshard=reshard)
    optimizer = optimizer_of(model)
    outputs = []
    for step in steps_of(model, optimizer, outputs):
        mo.migrate(model.layers[step % 2], somewhere(start, step), optimizer)
    found = {}
    for number, layer in enumerate(model.layers):
        tensors = [*experts_of(layer), *experts_of(layer, lambda weight: optimizer.state[weight]["exp_avg"])]
        for place, expert in enumerate(layer.experts.expert_ids):
            found[number, expert] = [one[place] for one in tensors]
    return outputs, found, whole_of(model, optimizer) if even else None


def whole_of(model, optimizer):
    """The first layer's second weight, of all experts, as a checkpoint has it."""
    with mo.experts_in_order(model, optimizer):
        return model.state_dict()["layers.0.experts.down_proj"].full_tensor()


@pytest.mark.parametrize(("even", "reshard"), [(True, True), (False, False)])
def test_sharded_experts_move_while_they_are_trained(even, reshard):
    outputs, _, experts = one_process(torch.float64)
    results = gloo_pool(RANKS).run(moving, even, reshard)
    assert sorted(key for one in results[:SPREAD] for key in one[1]) == [(n, e) for n in range(2) for e in range(E)]
    for rank, (got, found, whole) in enumerate(results):
        if whole is not None:
            close(whole, experts[1])
        for one, want in zip(got, outputs[rank], strict=True):
            close(one, want)
        for (number, expert), tensors in found.items():
            for one, want in zip(tensors[:2], experts[2 * number : 2 * number + 2], strict=True):
                close(one, want[expert])
            for one, other in zip(tensors, results[(rank + SPREAD) % RANKS][1][number, expert], strict=True):
                same_bits(one, other)


def controlled():
    """Copies that a controller makes and takes back, for the load of all replicas."""
    model = sharded(None)
    optimizer = optimizer_of(model)
    controller = mo.PlacementController(model, mo.copies_planner(COSTS, spare=1), COSTS, interval=2)
    outputs, placements = [], []
    for _ in steps_of(model, optimizer, outputs):
        controller.step()
        placements.append([layer.dispatcher.placement.experts_of_ranks() for layer in model.layers])
    assert any(layer.dispatcher.placement.has_replicas for layer in model.layers)
    return outputs, placements


def test_a_controller_copies_sharded_experts_for_the_load_of_all_replicas():
    outputs, *_ = one_process(torch.float64)
    results = gloo_pool(RANKS).run(controlled)
    for rank, (got, placements) in enumerate(results):
        assert placements == results[0][1]
        for one, want in zip(got, outputs[rank], strict=True):
            close(one, want)


def refused():
    model = sharded(reshard=False)
    optimizer = optimizer_of(model)
    before = [weight for layer in model.layers for weight in experts_of(layer)]
    with pytest.raises(ConfigError, match="what is sharded keeps its shape"):
        mo.migrate(model, IDENTITY, optimizer)
    called(model)
    with pytest.raises(ConfigError, match=r"gathered.*reshard\(\)"):
        mo.migrate(model, somewhere(COPIED, 0), optimizer)
    for layer in model.layers:
        layer.reshard()
    for one, want in zip((w for layer in model.layers for w in experts_of(layer)), before, strict=True):
        same_bits(one, want)
    mo.set_placement(model, PLAIN)
    assert called(model)[1] == 0


def test_sharded_experts_that_cannot_move_stay():
    gloo_pool(RANKS).run(refused)


def untold():
    """Replicas that fully_shard knows and the layer does not."""
    mesh = init_device_mesh("cpu", (RANKS // SPREAD, SPREAD), mesh_dim_names=("replicas", "experts"))
    layer = mo.prepare(mo.MoELayer(D, F, E, K, group=mesh["experts"]))
    fully_shard(layer.router, mesh=init_device_mesh("cpu", (RANKS,)))
    fully_shard(layer, mesh=mesh["replicas"])
    with pytest.raises(ConfigError, match="replicas that the layer was told of"):
        mo.migrate(layer, somewhere(IDENTITY, 0))


def test_replicas_that_the_layer_was_not_told_of_do_not_move():
    gloo_pool(RANKS).run(untold)


def failing(where):
    """Rank 2 fails at an exchange: of shards with its replica, or of experts."""
    model = sharded("kept", placement=IDENTITY)
    optimizer = optimizer_of(model)
    called(model, train=True)
    optimizer.step()
    optimizer.zero_grad()
    before = [weight for layer in model.layers for weight in experts_of(layer)]
    ownership = model.layers[0].ownership
    transport = ownership.replicas.transport if where == "shards" else ownership.transport
    fails = exchange_fails(transport, "migrate") if dist.get_rank() == 2 else nullcontext()
    with fails, pytest.raises(OSError if dist.get_rank() == 2 else MoeTransportError, match="no memory"):
        mo.migrate(model.layers[0], somewhere(IDENTITY, 0), optimizer)
    for one, want in zip((w for layer in model.layers for w in experts_of(layer)), before, strict=True):
        same_bits(one, want)
    mo.reopen(model)
    mo.migrate(model, somewhere(IDENTITY, 1), optimizer)
    called(model, train=True)


@pytest.mark.parametrize("where", ["shards", "experts"])
def test_a_rank_that_fails_while_shards_move_leaves_all_as_they_were(where):
    gloo_pool(RANKS).run(failing, where)
