"""schedule="auto": the same answer whatever is chosen, in every mode, and nothing of the caller disturbed."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, ShortcutBlock, prepare
from moe_overlap.measure.timeline import record
from moe_overlap.planning.pair import pair_of
from moe_overlap.planning.search import search
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests.auto.planted import (
    BACKWARD,
    FORWARD,
    FREE,
    OPS,
    SHAPES,
    SOME,
    build,
    cost_model,
    layer_of,
    measured_as,
    planted,
    same,
    step,
)
from tests.layers import D, E, K, make, tokens
from tests.parallel.model import Shell, whole
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

# ---------------------------------------------------------------- the same answer

FREE_WIRE = {"exchange": {"inter": FREE}}
CHOICES = {
    "serial": (FREE_WIRE, (1, 1)),
    "chunked_2": ({"alpha_s": 1.5e-6}, (2, 2)),
    "chunked_16": ({}, (16, 16)),
    "only_forward": ({"hide": FORWARD}, (16, 1)),
    "only_backward": ({"hide": BACKWARD}, (1, 16)),
    "ops": ({"hide": (), "backbone_s": (2e-6,) * OPS, "backbone_backward_s": (4e-6,) * OPS, "shared_s": 1e-6,
             "shared_backward_s": 2e-6}, (1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CHOICES)
def test_whatever_is_chosen_overlap_changes_no_bit(name, shape):
    options, chunks = CHOICES[name]
    options = {"backbone_s": (0.0,) * OPS, "backbone_backward_s": (0.0,) * OPS} | options
    if shape != "block":
        options = {key: value for key, value in options.items() if not key.startswith("backbone")}

    def rank(me):
        models = [build(shape, me.transport(), overlap=overlap) for overlap in (True, False)]
        on, off = (step(model, me.rank) for model in models)
        same(on, off)
        plain = build(shape, me.transport(), "serial")
        same(on, step(plain, me.rank), close)
        pairs = [layer_of(model)._last_step.pair for model in models]
        assert pairs[1] == pairs[0].join()
        overlaps = chunks != (1, 1) or (name == "ops" and shape != "layer")
        assert pairs[0].joined != overlaps
        return pairs[0].chunks, pairs[0].backward_chunks

    with planted(cost_model(**options)):
        assert virtual_world(2, seed=1).run(rank) == [chunks] * 2


@pytest.mark.parametrize("shape", SHAPES)
def test_every_candidate_gives_the_same_bits_joined(shape):
    """What the planner could have chosen: every candidate of a phase beside a few of the other's."""
    verb, num_ops = ("S" if shape == "shared" else "B"), OPS if shape == "block" else 0

    def rank(me):
        model = build(shape, me.transport())
        step(model, me.rank)
        last = layer_of(model)._last_step
        windows = last.schedule.planned(last.plan.exchange).windows
        found = {phase: search(window) for phase, window in windows.items()}
        forward, backward = ([one for one in found[phase] if one.chunks <= 4] for phase in ("forward", "backward"))
        plain = build(shape, me.transport(), "serial")
        want = step(plain, me.rank)
        most = max(len(forward), len(backward))
        for number in range(most):
            pair = pair_of(
                forward[number % len(forward)], backward[number % len(backward)], num_ops=num_ops, op_verb=verb
            )
            results = []
            for chosen in (pair, pair.join()):
                model.schedule = chosen
                model.zero_grad()
                results.append(step(model, me.rank))
            same(*results)
            same(results[0], want, close)
        return most

    given = {"shared_s": 1e-6, "shared_backward_s": 2e-6}
    with planted(cost_model(num_ops, alpha_s=1e-6, **given)):
        assert virtual_world(2, seed=2).run(rank)[0] >= 4


@pytest.mark.parametrize("counts", [(0, 9), (12, 0), (0, 0), (1, 40)], ids=str)
def test_uneven_and_missing_tokens_in_the_first_step(counts):
    def rank(me):
        for shape in SHAPES:
            same(step(build(shape, me.transport()), me.rank, counts),
                 step(build(shape, me.transport(), "serial"), me.rank, counts), close)  # fmt: skip

    with measured_as(cost_model(OPS)):  # only the block has ops; the others never look at them
        virtual_world(2).run(rank)


def test_one_rank_runs_serial_and_measures_nothing(cache):
    with planted(cost_model()) as calls:
        for shape in SHAPES:
            same(step(build(shape, None), 0), step(build(shape, None, "serial"), 0), close)
    assert not calls and not cache.exists()


# ---------------------------------------------------------------- nothing of the caller is disturbed


class Stateful(nn.Module):
    """An op with a buffer that it writes, one that it replaces, one that it only reads, and random numbers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("scale", torch.full((D,), 0.5, dtype=torch.float64))

    def forward(self, h):
        self.calls += 1
        self.last = h.detach().sum(dim=1)
        return h + self.scale * torch.dropout(self.linear(h), 0.5, self.training)


def leave_no_trace(folder):
    os.environ["MOE_OVERLAP_CACHE_DIR"] = folder
    rank, hooks, op = dist.get_rank(), [], Stateful()
    block = ShortcutBlock([op], make(ProcessGroupTransport(timeout_s=20.0)), tap=0, schedule="auto")
    with measured_as(cost_model(1)):
        for parameter in block.parameters():
            parameter.grad = torch.full_like(parameter, 7.0)
            parameter.register_hook(lambda grad: hooks.append("tensor"))
            parameter.register_post_accumulate_grad_hook(lambda parameter: hooks.append("accumulated"))
        early = op(tokens(4).requires_grad_())  # saved op.scale, and goes backward after the calibration
        random_before, calls_before = torch.get_rng_state(), op.calls.item()
        seen = []
        op.linear.register_forward_hook(lambda *_: seen.append(torch.get_rng_state()))
        with record() as events:
            y = block(tokens(SOME[rank], rank))
        same_bits(seen[-1], random_before)
        assert op.calls.item() == calls_before + 1 and op.last.shape == (SOME[rank],)
        assert not hooks
        assert all((parameter.grad == 7.0).all() for parameter in block.parameters())
        assert [event.lane for event in events if event.action == "N"] == ["wait", "wire"]
        assert len(seen) > 4, "it did measure"
    early.sum().backward()
    y.sum().backward()


def test_calibration_leaves_no_trace(cache):
    """Gradients, hooks, buffers, random numbers, recorders; what autograd saved of a buffer before is still good."""
    gloo_pool(2).run(leave_no_trace, str(cache))


class Adds(nn.Module):
    def forward(self, h):
        h += 1
        return h


def test_an_op_that_works_in_place_in_inference():
    def rank(me):
        results = []
        for options in ({"slot": 1}, {"schedule": "auto"}):
            torch.manual_seed(0)
            block = ShortcutBlock(
                [nn.Linear(D, D, dtype=torch.float64), Adds()], make(me.transport()), tap=1, **options
            )
            with torch.no_grad():
                results.append(block(tokens(8)))
        close(*results)

    with measured_as(cost_model(1)):
        virtual_world(2).run(rank)


class Noisy(nn.Module):
    """A router with noise in its choice, from the global generator."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, E, bias=False, dtype=torch.float64)

    def forward(self, x_TD):
        scores = torch.softmax(self.linear(x_TD) + torch.rand(x_TD.shape[0], E, dtype=x_TD.dtype), dim=-1)
        weights_TK, ids_TK = scores.topk(K, dim=-1)
        zero = torch.zeros((), dtype=torch.int64)
        return RoutingDecision(topk_ids_TK=ids_TK.int(), topk_weights_TK=weights_TK, dropped_tokens=zero, aux_loss=None,
                               tokens_per_expert_E=torch.bincount(ids_TK.reshape(-1), minlength=E),
                               status=torch.zeros(1, dtype=torch.int32))  # fmt: skip


def noisy_router(folder):
    """Under a checkpoint, whose recompute starts from the random state at its entry."""
    os.environ["MOE_OVERLAP_CACHE_DIR"] = folder
    results = []
    with measured_as(cost_model()):
        for schedule in ("serial", "auto"):
            torch.manual_seed(4)
            layer = make(ProcessGroupTransport(timeout_s=20.0), schedule=schedule, router=Noisy())
            torch.manual_seed(5)
            found = step(layer, dist.get_rank(), call=partial(checkpoint, layer, use_reentrant=False))
            results.append(found | {"next": torch.rand(1, dtype=torch.float64)})
    same(*results, close)


def test_a_router_with_noise_draws_what_it_would_have_drawn(cache):
    gloo_pool(2).run(noisy_router, str(cache))


# ---------------------------------------------------------------- modes


def in_mode(mode, folder):
    """One rank, two steps: "auto" that calibrates in the first one, and the fixed schedules, in one mode."""
    os.environ["MOE_OVERLAP_CACHE_DIR"] = folder
    rank, results = dist.get_rank(), []
    for schedule in ("serial", "auto"):
        block = build("block", ProcessGroupTransport(timeout_s=20.0), schedule, mode=mode)
        model = prepare(Shell(block, mode if mode in ("block", "selective", "nested") else "none"))
        call = DistributedDataParallel(model) if mode == "ddp" else model
        around = torch.autocast("cpu", dtype=torch.bfloat16) if mode == "autocast" else nullcontext()
        if mode == "autocast":
            call = model.float()
        with measured_as(cost_model(OPS)), around:
            found = []
            for batch in range(2):
                x = tokens(8 + rank, rank + 2 * batch).to(torch.float32 if mode == "autocast" else torch.float64)
                if mode == "no_grad":
                    with torch.no_grad():
                        found.append({"y": call(x)})
                    continue
                model.zero_grad()
                y = call(x.requires_grad_())
                pair = block.moe._last_step.pair
                y.square().sum().backward()
                assert schedule == "serial" or not pair.joined
                grads = {name: parameter.grad for name, parameter in model.named_parameters()}
                found.append({"y": y.detach(), "dx": x.grad, **grads})
        results.append(found)
    for got, want in zip(*results, strict=True):
        for name in want:
            tolerance = torch.bfloat16 if mode == "autocast" else None
            close(got[name], want[name], tolerance)


@pytest.mark.parametrize("mode", ["none", "no_grad", "autocast", "op", "block", "selective", "nested", "ddp"])
def test_modes(mode, cache):
    gloo_pool(2).run(in_mode, mode, str(cache))


def sharded(folder, mode, units):
    """FSDP2 around the block, and around each of its ops."""
    os.environ["MOE_OVERLAP_CACHE_DIR"] = folder
    results = []
    for schedule in ("serial", "auto"):
        block = build("block", ProcessGroupTransport(timeout_s=20.0), schedule, mode=mode)
        prepare(block)
        model = Shell(block, mode)
        mesh = init_device_mesh("cpu", (2,))
        for unit in [*(block.backbone if units == "ops" else ()), model]:
            fully_shard(unit, mesh=mesh, ignored_params=set(block.moe.expert_weights))
        x = tokens(8, dist.get_rank()).requires_grad_()
        with measured_as(cost_model(OPS)):
            if (schedule, units) == ("auto", "ops"):
                with pytest.raises(ConfigError, match="FSDP2 units of their own"):
                    model(x)
                with torch.no_grad():
                    close(model(x), results[0]["y"])
                return
            y = model(x)
        y.square().sum().backward()
        grads = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        results.append({"y": y.detach(), "dx": x.grad, **grads})
    same(*results, close)


@pytest.mark.parametrize("units", ["block", "ops"])
@pytest.mark.parametrize("mode", ["none", "block"])
def test_fsdp(mode, units, cache):
    gloo_pool(2).run(sharded, str(cache), mode, units)


def recompute_takes_the_same(folder):
    os.environ["MOE_OVERLAP_CACHE_DIR"] = folder
    block = build("block", ProcessGroupTransport(timeout_s=20.0))
    with measured_as(cost_model(OPS)), record() as events:
        step(block, dist.get_rank(), call=lambda x: checkpoint(block, x, use_reentrant=False))
    ran = {
        phase: [e.action for e in events if e.phase == phase and e.lane == "comp"] for phase in ("forward", "recompute")
    }
    # A recompute may end before U, when everything is there that backward needs.
    assert ran["recompute"] == ran["forward"][: len(ran["recompute"])] and "E1" in ran["recompute"]


def test_a_recompute_takes_the_schedules_of_its_forward(cache):
    gloo_pool(2).run(recompute_takes_the_same, str(cache))


def test_a_reentrant_checkpoint_is_refused_before_anything_is_measured():
    def rank(me):
        layer = make(me.transport(), schedule="auto")
        with torch.no_grad():
            layer(tokens(4))  # what a reentrant checkpoint's forward does
        y = checkpoint(layer, tokens(4).requires_grad_(), use_reentrant=True)
        exchanges = layer.transport.stats.exchanges
        with pytest.raises(ConfigError, match="use_reentrant=False"):
            y.sum().backward()
        assert layer.transport.stats.exchanges == exchanges

    with measured_as(cost_model()):
        virtual_world(2).run(rank)
