"""Experts with replicas that move while a model trains: every group of ranks moves its own, all of them or none.

The ranks of the mesh [[0, 1], [2, 3]]: rows share the experts out, columns hold the same ones.
"""

from __future__ import annotations

import os
import random
import signal
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from moe_overlap import (
    ConfigError,
    GradScaler,
    MoELayer,
    MoeTransportError,
    PlacementController,
    PlanMismatch,
    clip_grad_norm_,
    migrate,
    no_sync,
    nominal_costs,
    param_groups,
    prepare,
    reopen,
    set_placement,
)
from moe_overlap.placement import LocalFirst, Placement
from tests.ranks import Ranks, gloo_pool
from tests.tolerances import close, same_bits

RANKS, SPREAD, D, F, E = 4, 2, 16, 24, 8
IDENTITY = Placement.identity(E, SPREAD)
OTHER = Placement.of_ranks([[0, 1, 7], [2, 3, 4, 5, 6, 1]], homes=[0, 0, 1, 1, 1, 1, 1, 0], selector=LocalFirst())
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
}


def mesh():
    return init_device_mesh("cpu", (RANKS // SPREAD, SPREAD), mesh_dim_names=("replicas", "experts"))


class Model(nn.Module):
    """Two layers that read what came before them and add to it."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(3)
        grid, options = mesh(), {"dtype": torch.float64, **options}
        self.entry = nn.Linear(D, D, dtype=options["dtype"])
        self.layers = nn.ModuleList([MoELayer(D, F, E, 2, group=grid, **options) for _ in range(2)])

    def forward(self, x):
        h = self.entry(x)
        for layer in self.layers:
            h = h + layer(h)
        return h

    def average_dense(self):
        """What a loop without wrappers does."""
        for parameter in (*self.entry.parameters(), *(layer.router.weight for layer in self.layers)):
            dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS


def tokens(step, count=12):
    seed = 100 * step + dist.get_rank()
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def somewhere(seed):
    """A placement drawn by a seed: any homes, any copies, a rank without experts too."""
    draw = random.Random(seed)
    homes = [draw.randrange(SPREAD) if seed % 7 else 1 for _ in range(E)]
    ranks = [[expert for expert in range(E) if homes[expert] == rank] for rank in range(SPREAD)]
    for expert in draw.sample(range(E), draw.randrange(3)):
        ranks[1 - homes[expert]].append(expert)
    return Placement.of_ranks(ranks, homes=homes, selector=LocalFirst())


def state_of(model, optimizer):
    """layer, expert -> its weights and what the optimizer keeps of them, copied."""
    found = {}
    for number, layer in enumerate(model.layers):
        held = [t for w in layer.expert_weights for t in (w, *optimizer.state.get(w, {}).values()) if t.dim()]
        for place, expert in enumerate(layer.experts.expert_ids):
            found[number, expert] = [one[place].detach().clone() for one in held]
    return found


def train(way, kind, moves, steps=20):
    """Losses of the steps and norms of their gradients, the state, and the scale, which an overflow halves."""
    model = prepare(Model())
    run = DistributedDataParallel(model) if way == "ddp" else model
    optimizer = OPTIMIZERS[kind](param_groups(model))
    scaler, losses, norms = GradScaler("cpu", init_scale=1024.0), [], []
    for step in range(steps):
        for batch in range(2):
            with (run.no_sync() if way == "ddp" else no_sync(model)) if batch == 0 else nullcontext():
                x = tokens(batch)
                loss = (run(x) - x.roll(1, dims=1)).square().mean() / 2
                overflow = step == 5 and dist.get_rank() == 2
                scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        if way == "loop":
            model.average_dense()
        scaler.unscale_(optimizer)
        norms.append(clip_grad_norm_(model.parameters(), 0.1).item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        if moves:
            migrate(model.layers[step % 2], somewhere(step), optimizer)
    del norms[5]
    return torch.tensor([losses[:-1], norms]), state_of(model, optimizer), scaler.get_scale()


@pytest.mark.parametrize(("way", "kind"), [("loop", "adamw"), ("ddp", "sgd")])
def test_twenty_steps_with_one_layer_moved_in_each_are_those_of_a_static_run(way, kind):
    moved, static = (gloo_pool(RANKS).run(train, way, kind, moves, limit_s=240.0) for moves in (True, False))
    for (curves, _, scale), (wanted, _, _) in zip(moved, static, strict=True):
        assert scale == 512.0 and wanted[0, -1] < wanted[0, 0] and wanted[1, 0] > 0.1, "it learns, and clips"
        close(curves, wanted)
    of_experts = {key: tensors for _, state, _ in static for key, tensors in state.items()}
    for rank, (_, state, _) in enumerate(moved):
        replica = moved[(rank + SPREAD) % RANKS][1]
        assert state.keys() == replica.keys()
        for key, tensors in state.items():
            for one, other, want in zip(tensors, replica[key], of_experts[key], strict=True):
                same_bits(one, other)
                close(one, want)
    assert {key for _, state, _ in moved[:SPREAD] for key in state} == of_experts.keys()


def accumulated():
    """Gradients of half-precision experts that have moved: their dtype, and those of an expert by its number."""
    model = prepare(Model(dtype=torch.float32).bfloat16(), accumulate_fp32=True)
    model.layers[1].requires_grad_(False)  # frozen for a while
    with no_sync(model):
        migrate(model, OTHER)
    model.layers[1].requires_grad_(True)
    model(tokens(0).bfloat16()).float().square().sum().backward()
    layer = model.layers[1]
    weights = layer.expert_weights
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert {weight.grad.dtype for weight in weights} == {torch.float32}
    both = [*weights, *model.layers[0].expert_weights]
    return {expert: [w.grad[place] for w in both] for place, expert in enumerate(layer.experts.expert_ids)}


def test_gradients_of_moved_experts_are_kept_in_float32_and_reduced():
    results = gloo_pool(RANKS).run(accumulated)
    for rank in range(SPREAD):
        assert results[rank].keys() == results[rank + SPREAD].keys()
        for expert, grads in results[rank].items():
            for one, other in zip(grads, results[rank + SPREAD][expert], strict=True):
                assert one.any()
                same_bits(one, other)


def whole_replicas():
    """Every rank has all experts: there is nowhere to go, and all agree on that."""
    layer = MoELayer(D, F, E, 2, replicate_group=dist.group.WORLD, timeout_s=20.0)
    assert migrate(layer, Placement.identity(E, 1)) == 0
    with pytest.raises(PlanMismatch, match="different placements"):
        migrate(layer, Placement.identity(E, 1) if dist.get_rank() else Placement.of_ranks([[*range(1, E), 0]]))


def test_replicas_of_whole_layers_have_nothing_to_move():
    gloo_pool(RANKS).run(whole_replicas)


# ---------------------------------------------------------------- all of them or none


def stepped():
    """A model that has made a step, and its optimizer."""
    model = prepare(Model(timeout_s=20.0))
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.01)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    model(tokens(0)).square().sum().backward()
    model.average_dense()
    optimizer.step()
    optimizer.zero_grad()


def check_as_before(model, before, optimizer):
    """Nothing has moved; and, once usable again, everything moves."""
    after = state_of(model, optimizer)
    assert after.keys() == before.keys()
    for key, tensors in before.items():
        for one, other in zip(after[key], tensors, strict=True):
            same_bits(one, other)
    assert all(layer.dispatcher.placement.digest == IDENTITY.digest for layer in model.layers)
    dist.barrier()
    reopen(model)
    migrate(model, OTHER, optimizer)
    step(model, optimizer)


def another_placement():
    model, optimizer = stepped()
    before = state_of(model, optimizer)
    swapped = Placement.of_ranks([[4, 1, 2, 3], [0, 5, 6, 7]])
    with pytest.raises(PlanMismatch, match="different placements.*nothing was sent"):
        migrate(model, OTHER if dist.get_rank() < SPREAD else swapped, optimizer)
    if dist.get_rank() < SPREAD:  # other copies than in the other replica
        copied = Placement.of_ranks([[0, 1, 2, 3, 7], [4, 5, 6, 7]], homes=IDENTITY.home_ranks)
        set_placement(model, copied)
    with pytest.raises(PlanMismatch, match="different placements.*nothing was sent"):
        migrate(model, OTHER, optimizer)
    if dist.get_rank() < SPREAD:
        set_placement(model, IDENTITY)
    check_as_before(model, before, optimizer)


def test_replicas_that_mean_different_placements_all_raise():
    gloo_pool(RANKS).run(another_placement)


def refused_on_one():
    model, optimizer = stepped()
    before, rank = state_of(model, optimizer), dist.get_rank()
    weight = model.layers[0].experts.down_proj
    if rank == 3:
        weight.grad = torch.zeros_like(weight)
    with pytest.raises(ConfigError, match="zero_grad" if rank == 3 else "what rank 3 has"):
        migrate(model, OTHER, optimizer)
    weight.grad = None
    with pytest.raises(ConfigError, match="what rank 2 has" if rank != 2 else "AdamW, which keeps states"):
        migrate(model, OTHER, [] if rank == 2 else optimizer)
    hook = weight.register_post_accumulate_grad_hook(lambda parameter: None) if rank == 1 else None
    with pytest.raises(ConfigError, match="what rank 1 has" if rank != 1 else "hooks of down_proj"):
        migrate(model, OTHER, optimizer)
    if hook is not None:
        hook.remove()
    check_as_before(model, before, optimizer)


def test_what_one_rank_of_one_replica_refuses_is_refused_by_all():
    gloo_pool(RANKS).run(refused_on_one)


def not_asked():
    model, optimizer = stepped()
    before, replicas = state_of(model, optimizer), model.layers[0].ownership.replicas
    waiting = (replicas.transport, replicas.returning)
    usual_s = replicas.transport.timeout_s
    for transport in waiting:
        transport.timeout_s = 2.0
    if dist.get_rank() < SPREAD:
        with pytest.raises(MoeTransportError):
            migrate(model, OTHER, optimizer)
    else:
        with pytest.raises(MoeTransportError):
            step(model, optimizer)
    optimizer.zero_grad()
    for transport in waiting:
        transport.timeout_s = usual_s
    check_as_before(model, before, optimizer)


def test_a_replica_that_trains_on_instead_leaves_nobody_waiting():
    gloo_pool(RANKS).run(not_asked)


def failing(start):
    """Rank 2 fails at its first, second ... exchange."""
    model, optimizer = stepped()
    before, transport = state_of(model, optimizer), model.layers[0].transport
    if dist.get_rank() == 2:
        begun, plain = [], transport.start

        def fails(*args, **kwargs):
            begun.append(1)
            if len(begun) == start:
                raise OSError("no memory")
            return plain(*args, **kwargs)

        transport.start = fails
    with pytest.raises(OSError if dist.get_rank() == 2 else MoeTransportError, match="no memory"):
        migrate(model.layers[0], OTHER, optimizer)
    if dist.get_rank() == 2:
        del transport.start
    check_as_before(model, before, optimizer)


@pytest.mark.parametrize("start", [1, 4, 6])
def test_a_rank_that_fails_on_the_way_leaves_all_replicas_as_they_were(start):
    gloo_pool(RANKS).run(failing, start)


def dying(start):
    """Rank 3 dies at an exchange; what the others have then."""
    model, optimizer = stepped()
    before, transport, begun = state_of(model, optimizer), model.layers[0].transport, []
    if dist.get_rank() == 3:
        plain = transport.start

        def dies(*args, **kwargs):
            begun.append(1)
            if len(begun) == start:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **kwargs)

        transport.start = dies
    with pytest.raises(MoeTransportError) as caught:
        migrate(model.layers[0], OTHER, optimizer)
    after = state_of(model, optimizer)
    assert model.layers[0].dispatcher.placement == IDENTITY and after.keys() == before.keys()
    for key, tensors in before.items():
        for one, other in zip(after[key], tensors, strict=True):
            same_bits(one, other)
    return type(caught.value).__name__


@pytest.mark.parametrize("start", [2, 6])
def test_a_rank_that_dies_on_the_way_leaves_the_others_as_they_were(start):
    with Ranks(RANKS) as ranks:
        ranks.start(dying, start)
        ended = ranks.wait()
        assert ended[3].exitcode == -signal.SIGKILL
        for one in ended[:3]:
            assert one.value in ("PeerFailed", "RemoteAbort"), one


def other_order():
    """Two groups that hold the same experts, and count their ranks from different ends."""
    expert_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    crossed = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    rank = dist.get_rank()
    group, replicas = expert_groups[rank // 2], crossed[0 if rank in (0, 3) else 1]
    layer = MoELayer(D, F, E, 2, group=group, replicate_group=replicas, timeout_s=20.0)
    with pytest.raises(PlanMismatch, match="different places among the ranks"):
        migrate(layer, OTHER)


def test_replicas_in_another_order_are_told():
    gloo_pool(RANKS).run(other_order)


# ---------------------------------------------------------------- a controller


def busiest_moved(load_E, current):
    """The expert that is wanted most goes to the other rank."""
    homes = list(current.home_ranks)
    homes[load_E.argmax()] = 1 - homes[load_E.argmax()]
    return Placement.of_ranks([[e for e in range(E) if homes[e] == rank] for rank in range(SPREAD)])


def controlled(follows):
    """Replica 0 wants expert 0 and replica 1 expert 5, more of it: alone, each would decide otherwise."""
    model = prepare(Model())
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.01)
    with torch.no_grad():  # the first layer reads x, in which its router finds what is wanted
        model.entry.weight.copy_(torch.eye(D))
        model.entry.bias.zero_()
    free = nominal_costs(hidden=D, ffn=F, flop_per_s=1e9, inter_bytes_per_s=1e15, intra_bytes_per_s=1e15)
    seen = []

    def planner(counts_WE, current):
        seen.append(counts_WE.sum(axis=0))
        return busiest_moved(seen[-1], current)

    controller = PlacementController(model, planner, free, optimizers=[optimizer], interval=3)
    controller._price = lambda one, counts_WE, placement: float(placement.home_ranks == IDENTITY.home_ranks)
    counted, losses, changed = torch.zeros(2, E, dtype=torch.int64), [], []
    for number in range(7):
        first = dist.get_rank() < SPREAD
        x = tokens(number, 8 if first else 24)
        wanted = model.layers[0].router.weight.detach()[0 if first else 5]
        loss = model(x + (2.0 if first else 4.0) * wanted).square().sum()
        loss.backward()
        if number < 3:
            for layer, counts_E in zip(model.layers, counted, strict=True):
                counts_E += layer.stats().tokens_per_expert
        model.average_dense()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if follows:
            changed.append(controller.step())
    placements = [layer.dispatcher.placement.home_ranks for layer in model.layers]
    return torch.tensor(losses), counted, seen, changed, placements, [one.calls for one in controller.progress]


def test_a_controller_follows_the_load_of_all_replicas():
    results = gloo_pool(RANKS).run(controlled, True)
    for (losses, *_), (wanted, *_) in zip(results, gloo_pool(RANKS).run(controlled, False), strict=True):
        close(losses, wanted)
    of_all = results[0][1] + results[2][1]
    assert of_all[0].argmax() != results[0][1][0].argmax(), "replica 0 alone would decide otherwise"
    for _, _, seen, changed, placements, calls in results:
        assert [one.tolist() for one in seen[:2]] == of_all.tolist()
        assert changed == results[0][3] and changed[2] == [0, 1] and calls == [14, 14]
        assert placements == results[0][4] and placements[0] != IDENTITY.home_ranks
