"""Copies of experts on other ranks: when weights travel, where gradients go, and that training stays the same."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_overlap import ShortcutBlock
from moe_overlap.agreement.seats import seats_of
from moe_overlap.errors import ConfigError, MoeTransportError
from moe_overlap.placement import LocalFirst, Placement
from moe_overlap.schedule.builders import window
from tests.layers import D, E, F, exchange_fails, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

COPIED = Placement.of_ranks([[0, 1, 2, 3, 7], [4, 5, 6, 7, 0, 1]], homes=[0] * 4 + [1] * 4)
EXPERT_BYTES = 3 * F * D * 8


def whole_layer(**options):
    """One rank's layer of all experts: the reference."""
    return make(**options)


def placed(me, placement, **options):
    """This rank's layer with the weights of `whole_layer`."""
    layer = make(me.transport(), placement=placement, **options)
    homes = list(seats_of(placement).homes[me.rank])
    with torch.no_grad():
        for weight, whole in zip(layer.expert_weights, whole_layer().expert_weights, strict=True):
            weight.copy_(whole[homes])
    return layer


def text(layer):
    return layer.stats().schedule


def train(layer, steps, rank, lr=0.05, after=lambda step: None, **how):
    """Losses of some steps on a rank's tokens, which each rank has others of."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, **how)
    losses = []
    for step in range(steps):
        x = tokens(13, seed=100 * step + rank)
        loss = (layer(x) - x.roll(1, dims=1)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        for parameter in layer.router.parameters():  # the job's sum over ranks of a dense gradient
            parameter.grad = layer.transport.all_reduce(parameter.grad).wait()
        optimizer.step()
        losses.append(loss.item())
        after(step)
    return losses


def test_weights_travel_when_they_have_changed_and_gradients_in_every_backward():
    def rank(me):
        layer = placed(me, COPIED)
        sent = []

        def call(*, grad=True):
            before = layer.transport.stats.weight_bytes
            y = layer(tokens(9, me.rank)) if grad else layer(tokens(9, me.rank)).detach()
            fetched = layer.transport.stats.weight_bytes - before
            if grad:
                y.sum().backward()
            sent.append((fetched, layer.transport.stats.weight_bytes - before - fetched))
            return text(layer)

        assert call().startswith("Wf0 P ") and "Wf0" not in call()
        with torch.no_grad():
            assert "Wf0" not in call(grad=False)
            if me.rank == 1:  # its weights alone: rank 1 says so, rank 0 hears it
                layer.experts.down_proj.add_(1.0)
            assert call(grad=False).startswith("Wf0 P ")
        layer.forget_copies()
        assert call().startswith("Wf0 P ")
        homes = (2, 1)[me.rank] * EXPERT_BYTES, (1, 2)[me.rank] * EXPERT_BYTES  # weights sent, gradients sent
        assert sent == [homes, (0, homes[1]), (0, 0), (EXPERT_BYTES if me.rank else 0, 0), homes]

    virtual_world(2).run(rank)


def loaded(layer):
    state = copy.deepcopy(layer.state_dict())
    layer.load_state_dict(state, assign=True)
    return lambda: state["experts.down_proj"].add_(1.0)  # the parameter's own memory


def emptied(layer):
    first = [weight.detach().clone() for weight in layer.expert_weights]
    layer.to_empty(device="cpu")
    for weight in layer.router.parameters():  # what lies in fresh memory may be NaN
        weight.zero_()

    def write():
        for weight, values in zip(layer.expert_weights, first, strict=True):
            weight.copy_(values)

    return write


@pytest.mark.parametrize("put", [loaded, emptied])
def test_of_weights_that_have_come_in_the_place_of_others_changes_are_known(put):
    def rank(me):
        layer = placed(me, COPIED)

        def fetches():
            layer(tokens(9, me.rank))
            return "Wf0" in text(layer)

        with torch.no_grad():
            assert fetches()
            write = put(layer)
            assert fetches() and not fetches()
            write()
            assert fetches() and not fetches()

    virtual_world(2).run(rank)


def test_copies_fetched_in_inference_mode_are_trained_with():
    """They are kept, and are no inference tensors, which autograd does not save."""

    def rank(me):
        layer = placed(me, COPIED)
        with torch.inference_mode():
            layer(tokens(9, me.rank))
        assert text(layer).startswith("Wf0 P ")
        x, twin_x = (tokens(9, me.rank).requires_grad_() for _ in range(2))
        layer(x).square().sum().backward()
        assert "Wf0" not in text(layer)
        placed(me, COPIED)(twin_x).square().sum().backward()
        same_bits(x.grad, twin_x.grad)

    virtual_world(2).run(rank)


@pytest.mark.parametrize("schedule", ["serial", "chunked(3)", "chunked(2,experts)"])
def test_twenty_steps_of_training_are_those_of_one_slot_each(schedule):
    def rank(me):
        losses = train(placed(me, COPIED, schedule=schedule), 20, me.rank)
        close(torch.tensor(losses), torch.tensor(train(placed(me, Placement.identity(E, 2)), 20, me.rank)))
        assert losses[-1] < losses[0]

    virtual_world(2, seed=1).run(rank)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_every_form_of_an_optimizer_makes_copies_out_of_date(how):
    """Fused ones write parameters without raising their version."""

    def rank(me):
        losses = train(placed(me, COPIED), 6, me.rank, **how)
        close(torch.tensor(losses), torch.tensor(train(placed(me, Placement.identity(E, 2)), 6, me.rank, **how)))

    virtual_world(2).run(rank)


class Flips:
    """A copy of the expert that all ranks want most, on the rank that wants it most; none in some steps."""

    digest = 5

    def __call__(self, counts, base):
        wanted = counts.sum(axis=1)  # [W, E]
        expert = int(wanted.sum(axis=0).argmax())
        rank = int(wanted[:, expert].argmax())
        if rank == base.home_ranks[expert]:
            return base
        ranks = base.experts_of_ranks()
        ranks[rank].append(expert)
        return Placement.of_ranks(ranks, homes=base.home_ranks, selector=LocalFirst())


@pytest.mark.parametrize("dedup", ["off", "on", "auto"])
@pytest.mark.parametrize("schedule", ["serial", "chunked(4)", "chunked(2,experts)"])
def test_copies_of_one_step_are_fetched_in_it_and_not_kept(schedule, dedup):
    def rank(me):
        layer = placed(me, Placement.identity(E, 3), schedule=schedule, dedup=dedup)
        layer.dispatcher.rule = Flips()
        seen = []
        layer.watch(lambda last: seen.append(last.pair.forward.count("Wf")))
        losses = train(layer, 12, me.rank)
        close(torch.tensor(losses), torch.tensor(train(placed(me, Placement.identity(E, 3)), 12, me.rank)))
        assert 0 < sum(seen) <= 12 and layer.dispatcher.copy_store.held is None
        x = tokens(13, me.rank)
        texts = []
        for _ in range(2):  # the same counts again: not kept, fetched again
            layer(x)
            texts.append(text(layer))
        assert texts[0] == texts[1]

    virtual_world(3, seed=2).run(rank)


def test_a_rule_that_moves_a_home_is_refused_on_all_ranks():
    class Moves(Flips):
        def __call__(self, counts, base):
            return Placement.of_ranks([[0, 1, 2], [3, 4, 5, 6, 7]])

    def rank(me):
        layer = placed(me, Placement.identity(E, 2))
        layer.dispatcher.rule = Moves()
        with pytest.raises(ConfigError, match="rule = .*migrate"):
            layer(tokens(5))
        layer.dispatcher.rule = None
        layer(tokens(5))

    virtual_world(2).run(rank)


def test_a_recompute_has_the_copies_of_its_forward():
    def rank(me):
        layer, twin = placed(me, COPIED), placed(me, COPIED)
        x = tokens(11, me.rank)
        for one, call in ((layer, lambda x: checkpoint(layer, x, use_reentrant=False)), (twin, twin)):
            call(x.requires_grad_()).square().sum().backward()
            assert one.experts.down_proj.grad.abs().sum() > 0
        for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
            same_bits(a.grad, b.grad)

    virtual_world(2).run(rank)


@pytest.mark.parametrize("dedup", ["off", "on"])
def test_a_recompute_decides_as_its_forward_did(dedup):
    def rank(me):
        layer, twin = (placed(me, Placement.identity(E, 2), dedup=dedup) for _ in range(2))
        x = tokens(11, me.rank)
        for one, call in ((layer, lambda x: checkpoint(layer, x, use_reentrant=False)), (twin, twin)):
            one.dispatcher.rule = Flips()
            call(x.requires_grad_()).square().sum().backward()
            assert text(one).startswith("Wf0 P ")
        for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
            same_bits(a.grad, b.grad)

    virtual_world(2).run(rank)


def test_an_earlier_call_keeps_the_copies_that_it_ran_with():
    """Its backward comes after the weights of the copies were fetched anew: a buffer is never written twice."""

    def rank(me):
        layer = placed(me, COPIED)
        x = tokens(11, me.rank).requires_grad_()
        y = layer(x)
        (wanted,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        with torch.no_grad():
            before = [(weight.clone(), weight._version) for weight in layer.expert_weights]
            for weight in layer.expert_weights:
                weight.mul_(2.0)
            layer(x)
            for weight, (old, version) in zip(layer.expert_weights, before, strict=True):
                weight.data.copy_(old)  # as far as autograd knows, they are the old ones
                torch._C._autograd._unsafe_set_version_counter((weight,), (version,))
        (found,) = torch.autograd.grad(y.square().sum(), x)
        same_bits(found, wanted)

    virtual_world(2).run(rank)


def test_in_a_shortcut_block_weights_are_fetched_under_the_backbone():
    def rank(me):
        ops = [torch.nn.Linear(D, D, dtype=torch.float64) for _ in range(2)]
        layer = placed(me, COPIED)
        block = ShortcutBlock(copy.deepcopy(ops), layer, tap=0, slot=2, ahead=1)
        block(tokens(9, me.rank).requires_grad_()).sum().backward()
        assert text(layer) == "N B0 Wf0 P D0 B1 E0 C0 U"
        actions = [event.action for event in layer.last_events if event.lane == "wire"]
        assert actions == ["N", "Wf0", "D0", "C0", "Ct0", "Dt0", "Wg"]

    virtual_world(2).run(rank)


def test_weights_waited_for_where_they_start_change_no_bit_and_hide_nothing():
    """Rows still overlap: only Wf and Wg are waited for at once."""

    def rank(me):
        found = []
        for exposed in (False, True):
            layer = placed(me, COPIED)
            pair = replace(window(1, 1, chunks=2), joined_copies=exposed)
            block = ShortcutBlock([torch.nn.Tanh()], layer, tap=0, schedule=pair)
            x = tokens(13, me.rank).requires_grad_()
            y = block(x)
            y.square().sum().backward()
            order = [event.action for event in layer.last_events if event.lane != "wire"]
            assert (order.index("Wf0") < order.index("P")) == exposed and order.index("P") < order.index("D0")
            found.append((y.detach(), x.grad, *(weight.grad for weight in layer.experts.parameters())))
        for hidden, waited in zip(*found, strict=True):
            same_bits(hidden, waited)

    virtual_world(2).run(rank)


def test_a_copy_of_a_layer_fetches_for_itself():
    def rank(me):
        layer = placed(me, COPIED)
        x = tokens(9, me.rank)
        y = layer(x)
        twin = copy.deepcopy(layer)
        same_bits(twin(x), y)
        assert text(twin).startswith("Wf0 P ")

    virtual_world(2).run(rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_copies_are_added_before_they_are_rounded(dtype):
    """Expert 0 has rows on both ranks; its gradient is at most one rounding away from that of the same rows here."""

    def rank(me):
        layer = placed(me, COPIED, dtype=dtype)
        x = torch.cat([tokens(40, source, dtype=dtype) for source in range(2)])[me.rank * 40 : (me.rank + 1) * 40]
        layer(x).float().square().sum().backward()
        return layer.experts.down_proj.grad.double()

    def single(me):
        layer = placed(me, Placement.identity(E, 2), dtype=dtype)
        x = tokens(40, me.rank, dtype=dtype)
        layer(x).float().square().sum().backward()
        return layer.experts.down_proj.grad.double()

    for copied, alone in zip(virtual_world(2).run(rank), virtual_world(2).run(single), strict=True):
        close(copied, alone, dtype)


def test_frozen_experts_return_nothing():
    def rank(me):
        layer = placed(me, COPIED)
        for weight in layer.expert_weights:
            weight.requires_grad_(False)
        x = tokens(9, me.rank).requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None and all(event.action != "Wg" for event in layer.last_events)

    virtual_world(2).run(rank)


@pytest.mark.parametrize("action", ["Wf0", "Wg"])
def test_a_rank_that_fails_while_weights_travel_leaves_them_whole(action):
    def rank(me):
        layer = placed(me, COPIED)
        before = [weight.detach().clone() for weight in layer.expert_weights]
        transport = layer.transport
        broken = exchange_fails(transport, action) if me.rank == 1 else nullcontext()
        with broken, pytest.raises(OSError if me.rank else MoeTransportError, match="no memory"):
            layer(tokens(9, me.rank)).sum().backward()
        for weight, old in zip(layer.expert_weights, before, strict=True):
            same_bits(weight.detach(), old)
        transport.reopen()
        layer.zero_grad()
        layer(tokens(9, me.rank)).sum().backward()
        assert text(layer).startswith("Wf0 P ")

    virtual_world(2).run(rank)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mode": "static", "static_capacity": "no_drop"}, "mode"),
        ({"dedup": "on", "hierarchical": True, "ranks_per_node": 2}, "hierarchical"),
        ({"placement": "copied"}, "placement"),
        ({"placement": Placement.identity(E, 2)}, "placement"),
    ],
)
def test_what_does_not_go_with_copies_is_refused(options, field):
    four = Placement.of_ranks([[0, 1], [2, 3], [4, 5, 0], [6, 7, 0]])

    def rank(me):
        with pytest.raises(ConfigError) as caught:
            make(me.transport(), **{"placement": four, **options})
        assert caught.value.field == field

    virtual_world(4).run(rank)


def test_a_rule_beside_hierarchical_exchanges_is_refused():
    def rank(me):
        layer = placed(me, Placement.identity(E, 4), dedup="on", hierarchical=True, ranks_per_node=2)
        layer.dispatcher.rule = Flips()
        with pytest.raises(ConfigError, match="rule = .*hierarchical"):
            layer(tokens(4))

    virtual_world(4).run(rank)
