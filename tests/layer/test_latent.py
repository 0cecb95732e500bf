"""Latent experts: rows of L elements, the rest of the layer at full width; the same answer as projecting by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, Experts, MoELayer, RemoteAbort, ShortcutBlock, prepare
from moe_overlap.placement.placement import Placement
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.schedule.recorder import record
from moe_overlap.transport.local import LocalTransport
from tests import oracle
from tests.auto.planted import cost_model, measured_as
from tests.layers import D, F, K, tokens
from tests.parallel.model import whole
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

L, E = 6, 12  # twelve experts lie evenly on 1, 2, 3 and 4 ranks
COUNTS = (7, 0, 11, 4)  # tokens of each rank
SHARED = {"schedule": "shared_expert", "shared_expert_size": 10}


def make(transport=None, **options):
    torch.manual_seed(3)
    return MoELayer(D, F, E, K, transport=transport, **{"dtype": torch.float64, "latent_size": L, **options})


def seed_of(y, rank):
    return torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(50 + rank)).to(y.dtype)


def dense(layer, x):
    """What a layer of one rank computes, with every projection written out."""
    routing = layer.router(x)
    w_in, w_out = (part.weight.double() for part in (layer.latent_in, layer.latent_out))
    weights = routing.topk_weights_TK
    y = oracle.moe(x.double() @ w_in.T, routing.topk_ids_TK, weights, *layer.expert_weights) @ w_out.T
    if layer.shared_expert is not None:
        y = y + oracle.mlp(x.double(), layer.shared_expert.up.weight, layer.shared_expert.down.weight, "swiglu")
    return y


def step(layer, rank, call=None, count=None, *, wants=True):
    """Output, input gradient and every parameter's."""
    x = tokens(COUNTS[rank] if count is None else count, rank).requires_grad_(wants)
    y = (call or layer)(x)
    y.backward(seed_of(y, rank))
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def same(got, want, check=same_bits):
    assert got.keys() == want.keys()
    for name in want:
        check(got[name], want[name])


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


# ---------------------------------------------------------------- gradients that are not wanted, or missing


@pytest.mark.parametrize("frozen", [False, True])
def test_a_rank_whose_input_needs_no_gradient(frozen):
    """Its projection does need one, unless it is frozen; and the other ranks' rows come back to it anyway."""

    def rank(me, everywhere):
        layer = make(me.transport(), schedule="chunked(2)")
        layer.latent_in.requires_grad_(not frozen)
        return step(layer, me.rank, count=6, wants=everywhere or me.rank == 1)

    partly, wholly = (virtual_world(2).run(lambda me, e=everywhere: rank(me, e)) for everywhere in (False, True))
    assert partly[0].pop("dx") is None and wholly[0].pop("dx") is not None
    assert (partly[0]["latent_in.weight"] is None) == frozen
    for got, want in zip(partly, wholly, strict=True):
        same(got, want)


@pytest.mark.parametrize("how", ["aux", "aux, x without gradient", "attach"])
def test_a_loss_that_does_not_reach_the_output_runs_the_pending_exchanges(how):
    """Experts then have the gradients of the other rank's tokens alone, and the projections zeros or none."""

    def rank(me, how):
        layer = make(me.transport(), schedule="chunked(2)", aux_loss_coef=0.1)
        x = tokens(6, me.rank).requires_grad_("without" not in how)
        y = layer(x)
        loss = layer.take_aux_loss()
        if me.rank == 1:
            loss = y.square().sum()
        elif how == "nothing":
            loss = 0 * y.sum()
        elif how == "attach":
            loss = layer.attach(torch.ones((), dtype=torch.float64, requires_grad=True).clone())
        loss.backward()
        if me.rank == 0:
            assert layer.latent_in.weight.grad is not None and not layer.latent_in.weight.grad.any()
            assert (layer.latent_out.weight.grad is None) == how.startswith("aux")
        if me.rank == 1 or not how.startswith("aux"):
            assert layer.attach(x) is x, "the engine has freed the call's graph"
        return [p.grad for p in layer.expert_weights]

    with_zeros = virtual_world(2).run(lambda me: rank(me, "nothing"))
    assert with_zeros[0][0].any()
    for got, want in zip(virtual_world(2).run(lambda me: rank(me, how)), with_zeros, strict=True):
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine, theirs)  # not bit for bit: a zero gradient may be -0.0


def test_a_second_derivative_is_refused():
    layer = make(schedule="chunked(2)", shared_expert_size=F)
    x = tokens(4).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---------------------------------------------------------------- in a training job


def mean_gradients(ranks):
    """One process with all experts: the gradient of the mean over the ranks of the ranks' losses."""
    layer = make(shared_expert_size=F)
    losses = [layer(tokens(5 + rank, rank)).square().mean() for rank in range(ranks)]
    (sum(losses) / ranks).backward()
    return {name: p.grad for name, p in layer.named_parameters()}


def trained(wrapper, replicas):
    """One backward, wrapped; with `replicas`, expert parallel inside data parallel on a mesh of two dimensions."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD if replicas == 1 else init_device_mesh("cpu", (replicas, ranks // replicas))
    torch.manual_seed(3)
    layer = MoELayer(D, F, E, K, group=group, dtype=torch.float64, latent_size=L, shared_expert_size=F,
                     schedule="shared_expert")  # fmt: skip
    prepare(layer)
    if wrapper == "ddp":
        assert set(layer._ddp_params_and_buffers_to_ignore) == {"experts.gate_up_proj", "experts.down_proj"}
        call = DistributedDataParallel(layer)
    else:
        mesh = init_device_mesh("cpu", (ranks,))
        call = fully_shard(layer, mesh=mesh, ignored_params=set(layer.experts.parameters()))
        assert isinstance(layer.latent_in.weight, DTensor)
    call(tokens(5 + rank, rank)).square().mean().backward()
    return layer.ownership.expert_ids, {name: whole(p.grad) for name, p in layer.named_parameters()}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (4, 2)], ids=["spread", "replicas"])
def test_projections_are_reduced_as_every_dense_weight(ranks, replicas, wrapper):
    want = mean_gradients(ranks)
    for ids, got in gloo_pool(ranks).run(trained, wrapper, replicas):
        for name, grad in got.items():
            close(grad, want[name][list(ids)] if name.startswith("experts.") else want[name])


# ---------------------------------------------------------------- what there is of it, and what is refused


def test_names_shapes_and_start_of_the_projections():
    layer = make(shared_expert_size=F)
    state = layer.state_dict()
    assert {name: tuple(state[name].shape) for name in state if name.startswith("latent")} == {
        "latent_in.weight": (L, D), "latent_out.weight": (D, L)}  # fmt: skip
    assert tuple(layer.experts.down_proj.shape) == (E, L, F)
    assert layer.router.weight.shape[1] == layer.shared_expert.up.weight.shape[1] == D
    for weight in (layer.latent_in.weight, layer.latent_out.weight):
        limit = weight.shape[1] ** -0.5  # nn.Linear's
        assert 0.5 * limit < weight.abs().max() <= limit
    other = make(shared_expert_size=F, schedule="chunked(2)")
    torch.manual_seed(4)
    other.reset_parameters()
    assert not torch.equal(other.latent_in.weight, layer.latent_in.weight)
    other.load_state_dict(state)
    for same_layer in (other, copy.deepcopy(layer)):
        assert same_layer.latent_in.weight is not layer.latent_in.weight
        close(same_layer(tokens(5)), layer(tokens(5)).detach())


def test_a_layer_without_has_no_such_modules():
    layer = make(latent_size=None)
    assert {name for name, _ in layer.named_children()} == {"experts", "router"}
    assert layer.latent_in is None and layer.latent_out is None
    assert not [name for name in layer.state_dict() if "latent" in name]
    assert "latent" not in layer.explain()


def test_it_says_so():
    layer = make()
    layer(tokens(5))
    for text in (layer.explain(), "\n".join(layer.stats().implementation)):
        assert f"latents of width {L} instead of {D}" in text


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "6"])
def test_a_size_that_is_none(value):
    with pytest.raises(ConfigError) as caught:
        make(latent_size=value)
    assert caught.value.field == "latent_size"


def test_given_parts_have_the_width_of_the_latents():
    def experts(width):
        return Experts(width, F, E, dtype=torch.float64)

    def dispatcher(width):
        transport = LocalTransport()
        return Dispatcher(transport=transport, placement=Placement.identity(E, 1), hidden=width, ffn_hidden=F, top_k=K,
                          activation="swiglu", dtype=torch.float64)  # fmt: skip

    layer = make(experts=experts(L), dispatcher=dispatcher(L))
    close(layer(tokens(5)), dense(layer, tokens(5)))
    for field, parts in (("gate_up_proj", {"experts": experts(D)}),
                         ("dispatcher.hidden", {"dispatcher": dispatcher(D)})):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            make(**parts)
        assert caught.value.field == field


def test_a_projection_may_be_replaced():
    """By what an adapter library puts there, say: it is called as a module."""
    layer = make()
    layer.latent_in = nn.Sequential(layer.latent_in, nn.Tanh())
    x = tokens(5)
    routing = layer.router(x)
    rows = torch.tanh(x @ layer.latent_in[0].weight.T)
    want = oracle.moe(rows, routing.topk_ids_TK, routing.topk_weights_TK, *layer.expert_weights)
    close(layer(x), want @ layer.latent_out.weight.T)


@pytest.mark.parametrize("world", [1, 2])
def test_a_projection_to_another_width_is_refused_on_all_ranks_before_anything_is_sent(world):
    def rank(me):
        layer = make(me.transport() if world > 1 else None)
        right = layer.latent_in
        if me.rank == 0:
            layer.latent_in = nn.Linear(D, L + 1, bias=False, dtype=torch.float64)
        with pytest.raises(ConfigError) as caught:
            layer(tokens(5, me.rank))
        assert layer.transport.stats.exchanges == 0
        layer.latent_in = right
        layer(tokens(5, me.rank))  # and the next call is right
        return caught.value.field

    assert virtual_world(world).run(rank)[0] == "latent_in"


def test_a_projection_back_to_another_width_is_named_and_the_peer_learns_of_it():
    def rank(me):
        layer = make(me.transport())
        if me.rank == 0:
            layer.latent_out = nn.Linear(L, 1, bias=False, dtype=torch.float64)
            with pytest.raises(ConfigError) as caught:
                layer(tokens(5))
            assert caught.value.field == "latent_out"
        else:
            with pytest.raises(RemoteAbort, match="latent_out"):
                for _ in range(2):  # the first may be over before the other rank has failed
                    layer(tokens(5, 1))

    virtual_world(2).run(rank)
