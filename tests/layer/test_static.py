"""mode="static": fixed shapes, nothing read by the host, and what did not fit is said at the next call."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from moe_overlap import CapacityExceeded, ConfigError, MoELayer, PlanMismatch, ShortcutBlock
from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.static_plan import StaticExchange, StaticLayout, segments_of
from moe_overlap.schedule import static_dispatch
from moe_overlap.schedule.builders import chunked
from moe_overlap.schedule.static_rows import place, static_order
from tests.equality import FixedChoice
from tests.layers import D, E, F, K, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

SCHEDULES = ("serial", "chunked(3)", "chunked(2,experts)", "chunked(16)")
T = 33


def fixed(transport, ids_TK, dtype=torch.float64, **options):
    """A layer whose choice is given; the same parameters in every mode."""
    torch.manual_seed(3)
    router = FixedChoice(ids_TK, E, dtype)
    layer = MoELayer(D, F, E, ids_TK.shape[1], router=router, transport=transport, dtype=dtype, **options)
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(5)))
    return layer


def step(layer, x_TD):
    """Output, gradient of x, and gradients of the parameters."""
    x_TD = x_TD.clone().requires_grad_()
    y_TD = layer(x_TD)
    (y_TD * torch.linspace(-1, 1, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)).sum().backward()
    found = [y_TD.detach(), x_TD.grad, *(p.grad.clone() for p in layer.parameters())]
    layer.zero_grad()
    return found


def choices(rank, kind):
    if kind == "one expert":  # of rank 0 on the last expert, of the others on the first
        return torch.full((T, K), E - 1 if rank == 0 else 0, dtype=torch.int32)
    ids = torch.randint(-1, E, (T, K), generator=torch.Generator().manual_seed(rank), dtype=torch.int32)
    return ids.clamp_max(2) if kind == "uneven" and rank == 0 else ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "uneven", "one expert"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_static_is_host_to_tolerance_and_overlap_off_bit_for_bit(world, schedule, kind, dtype):
    def rank(me):
        ids, x = choices(me.rank, kind), tokens(T, me.rank, dtype)

        def of(**options):
            return step(fixed(me.transport(), ids, dtype, schedule=schedule, **options), x)

        host, static = of(), of(mode="static", static_capacity="no_drop")
        joined = of(mode="static", static_capacity="no_drop", overlap=False)
        for a, b, off in zip(static, host, joined, strict=True):
            close(a, b.double(), dtype)
            same_bits(a, off)

    virtual_world(world, seed=world).run(rank)


def test_backward_in_other_chunks_a_shared_expert_latents_and_tickets():
    apart = chunked(3).with_backward(chunked(4))

    def rank(me):
        x = tokens(T, me.rank)
        for options in (
            {"schedule": apart},
            {"schedule": "shared_expert", "shared_expert_size": F},
            {"schedule": "chunked(2)", "latent_size": 8},
        ):
            host = step(make(me.transport(), **options), x)
            static = step(make(me.transport(), mode="static", static_capacity=4.0, **options), x)
            for a, b in zip(static, host, strict=True):
                close(a, b)
        host, static = make(me.transport()), make(me.transport(), mode="static", static_capacity=4.0)
        ticket = static.begin(x)
        static.run_experts(ticket)
        close(static.finish(ticket), host(x))
        static.check_static()

    virtual_world(2).run(rank)


def test_checkpointing_recomputes_in_the_same_rows():
    def rank(me):
        layer = make(me.transport(), mode="static", static_capacity=4.0, schedule="chunked(2)")
        x = tokens(T, me.rank)
        want = step(layer, x)
        got = step_of_checkpoint(layer, x)
        for a, b in zip(got, want, strict=True):
            same_bits(a, b)

    def step_of_checkpoint(layer, x):
        x = x.clone().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]

    virtual_world(2).run(rank)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_overflow_raises_on_all_ranks_at_the_same_step_and_the_layer_goes_on(world):
    def rank(me):
        balanced = torch.arange(T * K, dtype=torch.int32).reshape(T, K) % E
        layer = fixed(me.transport(), balanced, schedule="chunked(2)", mode="static", static_capacity=1.25)
        x = tokens(T, me.rank)
        before = step(layer, x)
        if me.rank == world - 1:
            layer.router.ids_TK = torch.full((T, K), 3, dtype=torch.int32)
        layer(x)  # what does not fit is left out
        layer.router.ids_TK = balanced
        with pytest.raises(CapacityExceeded) as caught:
            layer(x)
        # 16 and 17 tokens in two chunks, 1.25 * 32 / 8 and 1.25 * 34 / 8 rows an expert.
        assert "55 choices" in caught.value.message and "5 or 6 rows" in caught.value.message
        assert "static_capacity = 1.25" in caught.value.message and "static_capacity = 8.0 would do" in str(
            caught.value
        )
        assert caught.value.peer == world - 1
        for a, b in zip(step(layer, x), before, strict=True):
            same_bits(a, b)
        layer.check_static()
        return caught.value.step

    assert len(set(virtual_world(world).run(rank))) == 1


def test_the_factor_that_the_error_names_does():
    ids = torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    x = tokens(T)
    layer = fixed(None, ids, schedule="chunked(4)", mode="static", static_capacity=1.0)
    layer(x)
    with pytest.raises(CapacityExceeded) as caught:
        layer.check_static()
    factor = float(caught.value.message.rpartition("static_capacity = ")[2].split()[0])
    enough = fixed(None, ids, schedule="chunked(4)", mode="static", static_capacity=factor)
    close(enough(x), fixed(None, ids)(x))
    enough.check_static()
    short = fixed(None, ids, schedule="chunked(4)", mode="static", static_capacity=factor - 0.6)
    short(x)
    with pytest.raises(CapacityExceeded):
        short.check_static()


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
@pytest.mark.parametrize("world", [1, 2])
def test_bad_logits_and_ids_are_said_at_the_next_call(world, schedule):
    def rank(me):
        transport = me.transport() if world > 1 else None
        layer = make(transport, mode="static", static_capacity="no_drop", schedule=schedule)
        x = tokens(T, me.rank)
        bad = x.clone()
        bad[3] = float("nan")
        layer(bad if me.rank == 0 else x)
        with pytest.raises(ConfigError) as caught:
            layer(x)
        assert caught.value.field == "logits" and "rank 0" in str(caught.value)
        layer(x)
        layer.check_static()

    virtual_world(world).run(rank)
    ids = torch.full((T, K), E, dtype=torch.int32)
    layer = fixed(None, ids, schedule="chunked(2)", mode="static", static_capacity="no_drop")
    assert not layer.dispatcher.begin(ids, tokens(T), layer.schedule).wait().key_TK.ge(0).any()
    layer.dispatcher.end_step()
    with pytest.raises(ConfigError, match="topk_ids"):
        layer.check_static()


def test_other_tokens_are_refused():
    layer = make(mode="static", static_capacity=2.0, schedule="chunked(2)")
    layer(tokens(T))
    with pytest.raises(ConfigError, match=rf"x.shape\[0\] = {T + 1}: expected {T}"):
        layer(tokens(T + 1))
    layer(tokens(T))

    def rank(me):
        layer = make(me.transport(), mode="static", static_capacity="no_drop")
        with pytest.raises(PlanMismatch, match="static_tokens: rank 0 has 5, rank 1 has 6"):
            layer(tokens(5 + me.rank))
        layer.transport.reopen()
        layer(tokens(7))
        with pytest.raises((ConfigError, RuntimeError), match=r"x\.shape\[0\] = 8: expected 7"):
            layer(tokens(7 + me.rank))

    virtual_world(2).run(rank)


@pytest.mark.parametrize("world", [1, 2])
def test_inference_mode_first_and_training_after_it(world):
    def rank(me):
        layer = make(me.transport(), mode="static", static_capacity="no_drop", schedule="chunked(2)")
        twin = make(me.transport(), schedule="chunked(2)")
        with torch.inference_mode():
            layer(tokens(T, me.rank))
        for got, want in zip(step(layer, tokens(T, me.rank)), step(twin, tokens(T, me.rank)), strict=True):
            close(got, want)

    virtual_world(world).run(rank)


def test_a_copy_has_words_of_its_own():
    layer = make(mode="static", static_capacity=0.1, schedule="chunked(2)")
    layer(tokens(T))
    copied = deepcopy(layer)
    copied.check_static()
    with pytest.raises(CapacityExceeded):
        layer.check_static()


def words_of(layer):
    """The memory that a graph of a step of this layer adds its words to, at each replay."""
    return layer.dispatcher._watch._latched


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
@pytest.mark.parametrize("step_before", [False, True])
def test_what_a_graph_of_before_reopen_meets_is_said_after_it(schedule, step_before):
    layer = make(mode="static", static_capacity="no_drop", schedule=schedule)
    layer(tokens(T))
    graphs = words_of(layer)
    layer.transport.reopen()
    if step_before:
        layer(tokens(T))
        layer.check_static()
    graphs[0, 2] = 1  # a replay with an id that is none
    with pytest.raises(ConfigError, match="topk_ids"):
        layer.check_static()
    layer.check_static()


def test_words_of_before_reopen_that_not_all_ranks_have_are_not_raised():
    def rank(me):
        layer = make(me.transport(), mode="static", static_capacity="no_drop", schedule="chunked(2)")
        layer(tokens(T))
        graphs = words_of(layer)
        if me.rank == 0:
            graphs[1, 2] = 1  # the step broke off before rank 1 had this word
        layer.transport.reopen()
        layer(tokens(T))
        layer.check_static()
        graphs[1, 2] = 1  # a replay, which all ranks take part in
        with pytest.raises(ConfigError, match="topk_ids.*rank 1"):
            layer.check_static()

    virtual_world(2).run(rank)


def test_a_first_step_in_a_graph_is_refused_after_reopen_too(monkeypatch):
    layer = make(mode="static", static_capacity="no_drop", schedule="chunked(2)")
    layer(tokens(T))
    layer.transport.reopen()
    with monkeypatch.context() as capture:
        capture.setattr(static_dispatch, "_capturing", lambda: True)
        with pytest.raises(ConfigError, match="a step before the capture"):
            layer(tokens(T))
    layer(tokens(T))


class Reads(TorchFunctionMode):
    """Where Python reads the values of a tensor, outside the operators, whose checks are a CPU's alone."""

    NAMES = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            frame = sys._getframe(1)
            files = []
            while frame is not None:
                files.append((Path(frame.f_code.co_filename), frame.f_code.co_name))
                frame = frame.f_back
            ours = [(path.name, name) for path, name in files if "moe_overlap" in path.parts]
            inside = [path for path, _ in files if path.parent.name == "ops"]
            if ours and not inside:
                self.found.add(ours[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", ["serial", "chunked(4)", "chunked(2,experts)"])
def test_the_host_reads_nothing_but_the_words_of_the_step_before(schedule):
    def reads(**options):
        layer = make(schedule=schedule, **options)
        step(layer, tokens(T))
        with Reads() as found:
            step(layer, tokens(T, 1))
        return found.found

    assert reads(mode="static", static_capacity="no_drop") == {("static_word.py", "read")}
    assert reads() & {("counts.py", "_count"), ("arguments.py", "check_choice")}


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("static_capacity", {"mode": "static"}),
        ("static_capacity", {"mode": "static", "static_capacity": 0}),
        ("static_capacity", {"mode": "static", "static_capacity": -1.0}),
        ("static_capacity", {"mode": "static", "static_capacity": float("inf")}),
        ("static_capacity", {"mode": "static", "static_capacity": True}),
        ("static_capacity", {"mode": "static", "static_capacity": "all"}),
        ("static_capacity", {"static_capacity": 1.0}),
        ("dedup", {"mode": "static", "static_capacity": 1.0, "dedup": "on"}),
        ("schedule", {"mode": "static", "static_capacity": 1.0, "schedule": "auto"}),
    ],
)
def test_bad_construction_names_the_field(field, options):
    with pytest.raises(ConfigError) as caught:
        make(**options)
    assert caught.value.field == field


def test_auto_in_a_block_and_check_static_in_host_mode_are_refused():
    with pytest.raises(ConfigError, match="schedule"):
        ShortcutBlock([torch.nn.Identity()], make(mode="static", static_capacity=1.0), tap=0, schedule="auto")
    with pytest.raises(ConfigError, match="mode"):
        make().check_static()


def test_a_budget_for_the_rows():
    def layer(budget):
        return make(mode="static", static_capacity="no_drop", schedule="chunked(2)", max_in_flight_bytes=budget)

    rows = T * K * E
    needed = rows * (4 * D + 2 * F) * 8
    with pytest.raises(ConfigError, match=f"max_in_flight_bytes = {needed - 1}: expected at least {needed}"):
        layer(needed - 1)(tokens(T))
    enough = layer(needed)
    enough(tokens(T))
    assert f"capacity no_drop: {rows} rows for {T * K} choices, {needed} bytes" in enough.explain()
    assert enough.stats().tokens_per_expert.sum() == T * K


def test_a_factor_beyond_all_choices_is_no_drop():
    x = tokens(T)
    whole, huge = (make(mode="static", static_capacity=c, schedule="chunked(2)") for c in ("no_drop", 1e308))
    same_bits(huge(x), whole(x))
    assert huge.dispatcher.layout.send_rows == whole.dispatcher.layout.send_rows


def test_the_layout_by_hand():
    """Two ranks of two slots, 16 tokens of one choice, forward in two chunks and backward in four by experts."""
    assert segments_of([(2, "tokens"), (4, "experts")]) == (0, 8)
    assert segments_of([(2, "tokens"), (3, "tokens")]) == (0, 5, 8, 10)
    layout = StaticLayout(rank=1, world_size=2, num_slots=4, tokens=BLOCKS, top_k=1, capacity=1.5, segments=(0, 8))
    assert layout.capacities.tolist() == [3, 3]  # ceil(1.5 * 8 / 4)
    slots = torch.tensor([[0]] * 4 + [[3]] * 4 + [[0], [-1]] * 4, dtype=torch.int32)
    placed = place(layout, slots)
    assert placed.word.tolist() == [3, 2000, 0]  # one of each group of four; 4 choices of a slot whose share is 2
    exchange = StaticExchange(rank=1, world_size=2, step=1, phase="forward", grad_enabled=False, x_requires_grad=False,
                              counts=layout.counts, layout=layout, key_TK=placed.key_TK,
                              place_TK=placed.place_TK)  # fmt: skip
    found, ends = static_order(exchange.chunked(2))
    # Chunk, slot, token: 0, 9 of slot 3 in chunk 0; 12 of slot 0 in chunk 1.
    assert found.reshape(-1).tolist() == [0, 1, 2, -1, 9, 10, 11, -1, 12, -1, 13, -1, 14, -1, -1, -1]
    assert ends.reshape(2, 4).tolist() == [[3, 6, 9, 12], [15, 18, 21, 24]]
    found, _ = static_order(exchange.chunked(2, "experts"))
    # Local slot 0 of both ranks, then local slot 1; both segments of a slot beside each other.
    assert found.reshape(-1).tolist() == [0, 1, 2, -1, 18, 19, 20, -1, 3, -1, 4, -1, 5, -1, -1, -1]
