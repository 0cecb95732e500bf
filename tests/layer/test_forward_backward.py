"""One micro-batch's forward under another's backward: the gradients of one after the other, and what is held."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_overlap import ConfigError, RemoteAbort, aux_loss
from moe_overlap.layer.forward_backward import ForwardBackward
from moe_overlap.layer.interleaved import MoEBlock
from moe_overlap.schedule.recorder import record
from tests.layers import D, block_stack, executed, make, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

BATCHES = 3


def stack(transport, *, blocks=3, **options):
    return block_stack(ForwardBackward, transport, blocks=blocks, **options)


def inputs(rank):
    return [tokens(7 + 3 * rank + which, seed=10 * rank + which).requires_grad_() for which in range(BATCHES)]


def loss_of(head, y, which):
    return (1 + which) * (y @ head).square().sum()


def head_of():
    return torch.full((D,), 0.3, dtype=torch.float64, requires_grad=True)


def in_turn(model, rank):
    """Every micro-batch in one graph of its own."""
    batches, head, losses = inputs(rank), head_of(), []
    for which, h in enumerate(batches):
        loss = loss_of(head, model(h), which)
        losses.append(loss.item())
        (loss + aux_loss(model)).backward()
    return results_of(model, batches, head, losses)


def side_by_side(model, rank):
    batches, head = inputs(rank), head_of()
    losses = model.run(batches, lambda y, which: loss_of(head, y, which))
    return results_of(model, batches, head, losses)


def results_of(model, batches, head, losses):
    parameters = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    return [torch.tensor(losses), *(h.grad for h in batches), head.grad, *parameters]


FIRST = "as it comes"
CASES = {
    FIRST: {},
    "the other slots": {"slot": 0, "backward_slot": 1},
    "two ops": {"ops": 2},
    "no ops": {"ops": 0},
    "one block": {"blocks": 1},
    "auxiliary loss": {"layer": {"aux_loss_coef": 0.1}},
    "global balance": {"layer": {"aux_loss_coef": 0.1, "balance": "global"}},
    "deduplicated": {"layer": {"dedup": "on", "top_k": 4}},
}


@pytest.mark.parametrize(("case", "ranks"), [*((case, 2) for case in CASES), (FIRST, 1), (FIRST, 3)])
def test_gradients_are_those_of_one_after_the_other(case, ranks):
    def all_of(how, seed=0, **options):
        return virtual_world(ranks, seed=seed).run(
            lambda me: how(stack(me.transport(), **{**CASES[case], **options}), me.rank)
        )

    want = all_of(in_turn)
    assert all(grad.abs().sum() > 0 for grad in want[0][1:5])
    for seed, options in ((1, {}), (2, {"overlap": False})):
        for got, results in zip(all_of(side_by_side, seed, **options), want, strict=True):
            for a, b in zip(got, results, strict=True):
                same_bits(a, b)


@pytest.mark.parametrize("by", ["tokens", "experts"])
def test_chunks(by):
    want = virtual_world(2).run(lambda me: in_turn(stack(me.transport()), me.rank))
    got = virtual_world(2).run(lambda me: side_by_side(stack(me.transport(), chunks=3, by=by), me.rank))
    for results, expected in zip(got, want, strict=True):
        for a, b in zip(results, expected, strict=True):
            close(a, b)


def on_gloo():
    torch.set_num_threads(1)
    import torch.distributed as dist

    group, rank = dist.group.WORLD, dist.get_rank()
    got = side_by_side(stack(None, layer={"group": group}), rank)
    want = in_turn(stack(None, layer={"group": group}), rank)
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gloo_ranks():
    assert gloo_pool(2).run(on_gloo) == [True, True]


class Noted(nn.Module):
    """An op that says when its forward and its backward run."""

    def __init__(self, name, said):
        super().__init__()
        self.name, self.said = name, said

    def forward(self, h):
        self.said.append(f"{self.name} forward")
        if h.requires_grad:
            h = h.clone()
            h.register_hook(lambda grad: self.said.append(f"{self.name} backward"))
        return h * 1.5


def test_ops_of_one_run_while_rows_of_the_other_travel():
    """Between the start of an exchange and its wait stands the other micro-batch's op."""

    def rank(me):
        said = []
        model = stack(me.transport(), blocks=2, ops=0)
        for at, block in enumerate(model.blocks):
            block.ops.append(Noted(f"op {at}", said))
        held = model.forward_one(tokens(5))
        said.clear()
        with record() as events:
            model.forward_and_backward(tokens(6), held, torch.ones(5, D, dtype=torch.float64))
        return said, events

    said, events = virtual_world(2).run(rank)[0]
    assert said == ["op 0 forward", "op 1 backward", "op 1 forward", "op 0 backward"]
    forward = ["P", "D0.wire", "B0", "D0.wait", "E0", "C0.wire", "C0.wait", "U"]
    assert executed(events, "forward") == forward * 2
    backward = ["Ut", "Ct0.wire", "Bt0", "Ct0.wait", "Ed0", "Dt0.wire", "Ew0", "Dt0.wait", "Pt"]
    assert executed(events, "backward") == backward * 2
    in_turn = [e.phase for e in sorted(events, key=lambda e: e.start_s) if e.action in ("Ut", "U") and e.lane == "comp"]
    assert in_turn == ["backward", "forward"] * 2


def test_a_micro_batch_is_freed_block_by_block():
    """At most one micro-batch and one block are held: counted in what autograd saves."""
    import weakref

    alive = {"now": 0, "most": 0}

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            alive["now"] += tensor.nbytes
            alive["most"] = max(alive.values())
            weakref.finalize(self, freed, tensor.nbytes)

    def freed(count):
        alive["now"] -= count

    def most(blocks, batches):
        alive.update(now=0, most=0)
        model = stack(None, blocks=blocks)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            model.run([tokens(16, seed=which) for which in range(batches)], lambda y, _: y.sum())
        assert alive["now"] == 0
        return alive["most"]

    alone, block = most(6, 1), most(6, 1) - most(5, 1)
    assert alone <= most(6, 3) <= alone + 1.5 * block


def test_two_steps():
    model = stack(None)
    held = model.forward_one(tokens(5))
    dx = model.backward_one(held, torch.ones(5, D, dtype=torch.float64))
    h = tokens(5).requires_grad_()
    model(h).sum().backward()
    same_bits(dx, h.grad)
    with pytest.raises(ConfigError, match="whose backward has run"):
        model.backward_one(held, torch.ones(5, D))


@pytest.mark.parametrize("blocks", [2, 4])
def test_a_micro_batch_of_other_blocks_is_refused(blocks):
    held = stack(None, blocks=blocks).forward_one(tokens(5))
    grad = torch.ones(5, D, dtype=torch.float64)
    for call in (lambda model: model.forward_and_backward(tokens(6), held, grad),
                 lambda model: model.backward_one(held, grad)):  # fmt: skip
        with pytest.raises(ConfigError, match=f"with {blocks} blocks left"):
            call(stack(None))


WRONG = {
    "integers": (lambda h, grad: (h.long(), grad), "h"),
    "no tensor": (lambda h, grad: (None, grad), "h"),
    "another gradient": (lambda h, grad: (h, grad[1:]), "grad"),
    "no gradient": (lambda h, grad: (h, None), "grad"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_one_rank_gives_wrongly_is_heard_by_all(wrong):
    change, field = WRONG[wrong]

    def rank(me):
        model = stack(me.transport())
        given = tokens(6), torch.ones(5, D, dtype=torch.float64)
        h, grad = change(*given) if me.rank else given
        with pytest.raises(ConfigError if me.rank else RemoteAbort, match=f"{field} = "):
            model.forward_and_backward(h, model.forward_one(tokens(5)), grad)

    virtual_world(2).run(rank)


class HalfInFloat32(nn.Module):
    """A part under autocast, and one that says it is not."""

    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h):
        h = h + torch.tanh(self.inside(h))
        with torch.autocast("cpu", enabled=False):
            return h + torch.tanh(self.outside(h.float()))


@pytest.mark.parametrize("ops", [1, 0])
def test_autocast_is_for_the_forwards(ops):
    """Side by side a backward runs where autocast is on; its matmuls are those of a backward outside of it."""

    def stacked(me):
        torch.manual_seed(5)
        blocks = [
            MoEBlock([HalfInFloat32()] * ops, make(me.transport(), dtype=torch.float32), norm=nn.LayerNorm(D))
            for _ in range(2)
        ]
        return ForwardBackward(blocks), [tokens(6, seed=3 * me.rank + at).float().requires_grad_() for at in range(3)]

    def loss(y, _):
        return (y.float() @ torch.ones(D, D)).square().sum()

    def rank(me):
        model, batches = stacked(me)
        with torch.autocast("cpu", torch.bfloat16):
            model.run(batches, loss)
        other, others = stacked(me)
        for h in others:
            with torch.autocast("cpu", torch.bfloat16):
                one = loss(other(h), 0)
            one.backward()
        for a, b in zip([*batches, *model.parameters()], [*others, *other.parameters()], strict=True):
            same_bits(a.grad, b.grad)

    virtual_world(2).run(rank)


def test_auxiliary_losses_are_told():
    model = stack(None, layer={"aux_loss_coef": 0.1})
    held = model.forward_one(tokens(5))
    model(tokens(5))
    close(held.aux_loss, aux_loss(model).detach())
    assert held.aux_loss > 0


def test_an_op_that_fails_in_the_others_backward_is_heard_by_all():
    def rank(me):
        model = stack(me.transport())
        held = model.forward_one(tokens(5))
        if me.rank == 1:
            model.blocks[1].ops[0].linear = None
        with pytest.raises(TypeError if me.rank else RemoteAbort):
            model.forward_and_backward(tokens(6), held, torch.ones(5, D, dtype=torch.float64))

    virtual_world(2).run(rank)


@pytest.mark.parametrize("options", [{"slot": 2}, {"backward_slot": -1}, {"chunks": 0}, {"by": "rows"}, {"slot": True}])
def test_refused(options):
    with pytest.raises(ConfigError):
        stack(None, **options)


def test_no_batches_and_losses_that_are_none():
    with pytest.raises(ConfigError, match="batches"):
        stack(None).run([], lambda y, _: y.sum())
    with pytest.raises(ConfigError, match="loss_of"):
        stack(None).run([tokens(3)], lambda y, _: y)
