"""Latent experts: rows of L elements, the rest of the layer at full width; the same answer as projecting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_overlap import ShortcutBlock
from moe_overlap.schedule.recorder import record
from moe_overlap.transport.local import LocalTransport
from tests.auto.planted import cost_model, measured_as
from tests.layer.latents import COUNTS, SHARED, L, dense, make, same, seed_of, step
from tests.layers import D, F, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

# ---------------------------------------------------------------- the same answer


def check_dense(results, options):
    """`results` of all ranks against the oracle: dense gradients are a rank's own, experts' those of all tokens."""
    layer = make(**options)
    losses = []
    for rank, got in enumerate(results):
        x = tokens(COUNTS[rank], rank).requires_grad_()
        y = dense(layer, x)
        close(got["y"], y)
        losses.append((y * seed_of(y, rank)).sum())
        names = [name for name, _ in layer.named_parameters() if not name.startswith("experts.")]
        wanted = [x, *(layer.get_parameter(name) for name in names)]
        for name, want in zip(["dx", *names], torch.autograd.grad(losses[-1], wanted, retain_graph=True), strict=True):
            close(got[name], want)
    for name, want in zip(
        ("experts.gate_up_proj", "experts.down_proj"), torch.autograd.grad(sum(losses), layer.expert_weights),
        strict=True,
    ):  # fmt: skip
        close(torch.cat([got[name] for got in results]), want)


@pytest.mark.parametrize("options", [{}, {"schedule": "chunked(3)"}, {"schedule": "chunked(2,experts)"}, SHARED,
                                     {"capacity_factor": 0.5, "schedule": "chunked(2)"},
                                     {"dedup": "on", "schedule": "chunked(2)"}, {"dedup": "on", **SHARED}],
                         ids=["serial", "tokens", "experts", "shared", "capacity", "dedup", "dedup shared"],
)  # fmt: skip
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_overlap_on_equals_off_and_projections_by_hand(world, options):
    def rank(me):
        on, off = (step(make(me.transport(), overlap=overlap, **options), me.rank) for overlap in (True, False))
        same(on, off)
        return on

    check_dense(virtual_world(world, seed=world).run(rank), options)


@pytest.mark.parametrize("options", [{}, SHARED, {"capacity_factor": 0.5}], ids=["plain", "shared", "capacity"])
def test_one_rank_with_its_ops_in_a_row(options):
    layer = make(**options)
    check_dense([step(layer, 0)], options)
    if options.get("capacity_factor"):
        assert layer.stats().dropped_tokens > 0


def test_one_rank_in_a_row_equals_the_executor_bit_for_bit():
    executed = make(LocalTransport())
    executed.transport.name = "local, through the executor"
    same(step(make(), 0), step(executed, 0))


def test_zero_tokens_on_every_rank():
    for result in virtual_world(2).run(lambda me: step(make(me.transport()), me.rank, count=0)):
        assert result["y"].shape == (0, D)
        assert not any(result[name].any() for name in result if name not in ("y", "dx"))


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
@pytest.mark.parametrize("dtype", ["autocast", torch.bfloat16])
def test_sixteen_bits(dtype, schedule):
    """Under autocast the weights and their gradients stay float32, and rows are bfloat16 as y is."""
    under = dtype == "autocast"
    layer = make(dtype=torch.float32 if under else dtype, schedule=schedule)
    x = tokens(9).to(layer.latent_in.weight.dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    want = dense(layer, x)
    close(y, want, torch.bfloat16)
    seed = seed_of(y, 0)
    inputs = [x, *layer.parameters()]
    wanted = torch.autograd.grad(want, inputs, seed.double())
    for one, got, expected in zip(inputs, torch.autograd.grad(y, inputs, seed), wanted, strict=True):
        assert got.dtype == one.dtype
        close(got, expected, torch.bfloat16)


def test_rows_on_the_wire_have_the_width_of_the_latents():
    def rank(me):
        plain, latent = make(me.transport(), latent_size=None), make(me.transport())
        with torch.no_grad():  # alike: the experts' seed is drawn after the projections, the router before them
            same_bits(plain.router.weight, latent.router.weight)
        for layer in (plain, latent):
            layer(tokens(9, me.rank))
        return plain.stats().payload_bytes, latent.stats().payload_bytes

    for full, projected in virtual_world(2).run(rank):
        assert projected > 0 and projected * D == full * L


# ---------------------------------------------------------------- every way to call it


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_shortcut_block(slot):
    """Backward, too, starts its exchanges before the ops beside them, although the projection back comes first."""

    def rank(me, overlap):
        moe = make(me.transport(), overlap=overlap)
        ops = [nn.Linear(D, D, dtype=torch.float64) for _ in range(2)]
        branch = nn.Linear(D, D, dtype=torch.float64)
        block = ShortcutBlock(ops, moe, tap=0, slot=slot, chunks=2, overlap=overlap, shared_expert=branch,
                              combine="gated")  # fmt: skip
        with record() as events:
            result = step(block, me.rank)
        order = [event.action for event in events if event.phase == "backward" and event.lane == "comp"]
        assert order == [action.text for action in block.schedule.backward if action.lane == "comp"]
        return result, block

    world = 3
    on, off = (virtual_world(world, seed=3).run(lambda me, o=overlap: rank(me, o)) for overlap in (True, False))
    layer = make()
    for me, ((got, block), (joined, _)) in enumerate(zip(on, off, strict=True)):
        same(got, joined)
        x = tokens(COUNTS[me], me).requires_grad_()
        h = x
        for op in block.backbone:
            h = op(h)
        want = h + dense(layer, x)
        close(got["y"], want)
        inputs = {"dx": x, "moe.router.weight": layer.router.weight, "moe.latent_in.weight": layer.latent_in.weight,
                  "moe.latent_out.weight": layer.latent_out.weight, "backbone.0.weight": block.backbone[0].weight,
                  "backbone.2.gate.weight": block.backbone[2].gate.weight}  # fmt: skip
        grads = torch.autograd.grad(want, list(inputs.values()), seed_of(want, me))
        for name, grad in zip(inputs, grads, strict=True):
            close(got[name], grad)


@pytest.mark.parametrize("slot", [0, 1])
def test_the_engine_executes_the_backward_schedule(slot):
    """Beside a shared expert: the projections' own backwards, which no schedule names, move nothing."""

    def rank(me):
        layer = make(me.transport(), schedule=f"shared_expert({slot})", shared_expert_size=F)
        with record() as events:
            step(layer, me.rank)
        order = [event.action for event in events if event.phase == "backward" and event.lane == "comp"]
        assert order == [action.text for action in layer.schedule.backward if action.lane == "comp"]

    virtual_world(2).run(rank)


def test_tickets_equal_the_layer():
    def by_hand(layer):
        def call(x):
            ticket = layer.begin(x)
            layer.run_experts(ticket)
            return layer.finish(ticket)

        return call

    def rank(me):
        plain, staged = make(me.transport(), schedule="chunked(2)"), make(me.transport(), schedule="chunked(2)")
        same(step(plain, me.rank), step(staged, me.rank, by_hand(staged)))

    virtual_world(3).run(rank)


@pytest.mark.parametrize("options", [{"schedule": "chunked(2)"}, SHARED], ids=["chunked", "shared"])
def test_a_recompute_changes_nothing(options):
    def rank(me):
        plain, recomputed = make(me.transport(), **options), make(me.transport(), **options)
        want = step(plain, me.rank)
        got = step(recomputed, me.rank, lambda x: checkpoint(recomputed, x, use_reentrant=False))
        same(got, want)

    virtual_world(3).run(rank)


def test_compiled_on_one_rank():
    layer = make(dtype=torch.float32, shared_expert_size=F)
    compiled = torch.compile(layer, fullgraph=True)
    for count in (16, 24):
        x1, x2 = (tokens(count).float().requires_grad_() for _ in range(2))
        y1, y2 = layer(x1), compiled(x2)
        close(y2, y1.double())
        inputs = [*layer.parameters()]
        first, second = (torch.autograd.grad(y.sum(), [x, *inputs]) for y, x in ((y1, x1), (y2, x2)))
        for got, want in zip(second, first, strict=True):
            close(got, want.double())


@pytest.mark.parametrize("shape", ["layer", "shared", "block"])
def test_auto_probes_rows_of_latents(shape):
    """The probes run for real; an experts' row of another width, or a shared expert on latents, would fail in them."""

    def rank(me, schedule):
        auto = schedule == "auto"
        if shape != "block":
            model = moe = make(me.transport(), schedule=schedule, shared_expert_size=F if shape == "shared" else None)
        else:
            moe = make(me.transport())
            choice = {"schedule": "auto"} if auto else {"slot": 1}
            model = ShortcutBlock([nn.Linear(D, D, dtype=torch.float64) for _ in range(2)], moe, tap=0, **choice)
        result = step(model, me.rank, count=5 + me.rank)
        if auto:
            (planned,) = model.schedule.found.values()
            assert planned.row_bytes == L * 8
            assert moe._last_step.schedule is planned
            assert "chosen by the planner" in moe.explain()
        return result

    model = cost_model(2 if shape == "block" else 0, hide=())
    with measured_as(model):
        got = virtual_world(2, seed=1).run(lambda me: rank(me, "auto"))
    for mine, want in zip(got, virtual_world(2).run(lambda me: rank(me, "serial")), strict=True):
        same(mine, want, close)
