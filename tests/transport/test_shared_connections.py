"""Connections belong to a group of ranks: layers share them, a failure is everybody's, and one reopen repairs all."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from moe_overlap import ConfigError, MoELayer, MoeTransportError, PlanMismatch, prepare
from moe_overlap.errors import RemoteAbort, TransportClosed, TransportTimeout
from moe_overlap.transport import ProcessGroupTransport, connections
from tests.ranks import gloo_pool
from tests.transport.worlds import F32, agreed, counts_of, exchange_all, header, received, record

D, F, E = 16, 24, 12


def layer(**options):
    torch.manual_seed(0)
    return MoELayer(D, F, E, 2, group=dist.group.WORLD, dtype=torch.float64, timeout_s=20.0, **options)


def x(rank=None):
    rank = dist.get_rank() if rank is None else rank
    return torch.randn(6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


# ---------------------------------------------------------------- resources


def many_layers(count):
    first = layer()
    first(x()).sum().backward()
    gc.collect()
    before = descriptors(), threads()
    others = [layer() for _ in range(count - 1)]
    for one in others:
        one(x()).sum().backward()
    return before, (descriptors(), threads())


@pytest.mark.parametrize(("ranks", "count"), [(2, 8), (4, 64)])
def test_more_layers_take_no_descriptor_and_no_thread(ranks, count):
    for before, after in gloo_pool(ranks).run(many_layers, count):
        assert after[0] <= before[0] and after[1] <= before[1], (before, after)


def ending():
    before = descriptors()
    one = layer()
    one(x())
    connections.end_all()
    with pytest.raises(TransportClosed, match="all connections were ended"):
        one(x())
    layer()(x())
    connections.end_all()
    return before, descriptors()


def test_connections_can_be_ended_and_made_anew():
    for _ in range(2):
        results = gloo_pool(2).run(ending)
    for before, after in results:
        assert after <= before + 2


# ---------------------------------------------------------------- one failure, one reopen


def one_failure():
    layers = [layer() for _ in range(3)]
    for one in layers:
        one(x())
    want = [one(x()) for one in layers]
    if dist.get_rank() == 0:
        layers[1].transport.close("a fault")
    for one in layers:
        with pytest.raises((TransportClosed, RemoteAbort)):
            one(x())
    layers[2].transport.reopen()
    got = [one(x()) for one in layers]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for one in layers:
        one.transport.reopen()  # nothing is left to do, and nobody waits
    assert torch.equal(layers[0](x()), want[0])


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_failure_is_everybodys_and_one_reopen_repairs_all(ranks):
    gloo_pool(ranks).run(one_failure)


def reopened_unequally():
    """Rank 1 tries to reopen alone, in vain, and again; then all do: they meet in the latest generation."""
    one = ProcessGroupTransport(timeout_s=1.0)
    one.open(header(2))
    one.close("a fault")
    dist.barrier()
    if dist.get_rank() == 1:
        for _ in range(2):
            with pytest.raises(TransportTimeout, match="no sign of rank 0") as caught:
                one.reopen()
            assert caught.value.peer == 0
    dist.barrier()
    one.timeout_s = one.connections.limit_s = 20.0
    one.reopen()
    plan = agreed(one, slots=2, seed=0).chunked(2)
    got = exchange_all(one, plan, F32, wait_order=[1, 0])
    return all(torch.equal(got[c], received(one.rank, plan, c, F32)) for c in range(2))


def test_ranks_that_reopened_unequally_often_meet_all_the_same():
    assert gloo_pool(2).run(reopened_unequally) == [True, True]


def reopened_by_some():
    one = layer()
    one(x())
    one.transport.close("a fault")
    one.transport.timeout_s = 2.0
    dist.barrier()  # so that the others come within the limit, however busy the machine is
    begin = time.monotonic()
    if dist.get_rank() < 2:
        with pytest.raises(MoeTransportError, match="no sign of rank 2|rank . reports") as caught:
            one.transport.reopen()
        assert caught.value.peer == 2
    dist.barrier()
    return time.monotonic() - begin


def test_a_rank_that_does_not_reopen_is_named():
    gloo_pool(3).run(reopened_by_some)


# ---------------------------------------------------------------- ranks in different places of the program


def raises_mismatch(call, *words):
    with pytest.raises(PlanMismatch) as caught:
        call()
    assert caught.value.rank == dist.get_rank() and caught.value.peer is not None
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def other_layer(named):
    model = torch.nn.ModuleDict({"first": layer(), "second": layer()})
    if named:
        prepare(model)
    both = list(model.values())
    for one in both:
        one(x())
    order = both if dist.get_rank() == 0 else both[::-1]
    names = ("layer 'first'", "layer 'second'") if named else ("layer number 1", "layer number 2")
    raises_mismatch(lambda: order[0](x()), *names, "in a forward call of")
    both[0].transport.reopen()
    for one in both:
        one(x())


@pytest.mark.parametrize("named", [True, False])
def test_layers_in_another_order_are_named(named):
    gloo_pool(2).run(other_layer, named)


def other_opening():
    first, second = layer(), MoELayer(D, F, 2 * E, 2, group=dist.group.WORLD, dtype=torch.float64)
    raises_mismatch(lambda: (first if dist.get_rank() == 0 else second)(x()), "opening layer number 1",
                    "opening layer number 2")  # fmt: skip


def test_layers_of_other_sizes_that_open_in_another_order_are_named():
    gloo_pool(2).run(other_opening)


def backwards_in_another_order():
    one = layer()
    losses = [one(x(rank=dist.get_rank() + 10 * n)).sum() for n in range(2)]
    first = losses[0] if dist.get_rank() == 0 else losses[1]
    raises_mismatch(first.backward, "different backwards", "step", "nothing was sent")


def test_backwards_in_another_order():
    """Gradients were wrong by half of their size, without a word, where the counts of rows happened to be equal."""
    gloo_pool(2).run(backwards_in_another_order)


def a_loss_left_out():
    one = layer()
    losses = [one(x(rank=dist.get_rank() + 10 * n)).sum() for n in range(2)]

    def backward():
        for loss in losses[dist.get_rank() :][::-1]:
            loss.backward()
        one(x())

    if dist.get_rank() == 0:
        raises_mismatch(backward, "rank 0 is in a backward of", "rank 1 in a forward call of")
    else:
        raises_mismatch(backward, "rank 0 is in a backward of", "rank 1 in a forward call of")


def test_a_loss_that_one_rank_leaves_out():
    gloo_pool(2).run(a_loss_left_out)


def a_step_skipped():
    """Rank 1 found a NaN and goes on with the next step."""
    one = layer()
    loss = one(x()).sum()
    raises_mismatch(
        loss.backward if dist.get_rank() == 0 else lambda: one(x()),
        "rank 0 is in a backward of",
        "(step 1)",
        "(step 2)",
    )


def test_a_step_that_one_rank_skips():
    gloo_pool(2).run(a_step_skipped)


def checkpointed_on_one_rank():
    one = layer()
    h = x().requires_grad_()
    if dist.get_rank() == 1:
        y = torch.utils.checkpoint.checkpoint(one, h, use_reentrant=False)
    else:
        y = one(h)
    raises_mismatch(y.sum().backward, "rank 0 is in a backward of", "rank 1 in a forward call of")


def test_a_checkpoint_on_one_rank_alone():
    gloo_pool(2).run(checkpointed_on_one_rank)


def second_backward():
    one = layer()
    loss = one(x()).sum()
    loss.backward(retain_graph=True)
    raises_mismatch(
        (lambda: loss.backward()) if dist.get_rank() == 0 else (lambda: one(x())), "in a backward of", "in a forward"
    )


def test_a_second_backward_on_one_rank_alone():
    gloo_pool(2).run(second_backward)


def copies_in_another_order():
    import copy

    one = layer()
    other = copy.deepcopy(one)
    for each in (one, other):
        each(x())
    order = (one, other) if dist.get_rank() == 0 else (other, one)
    raises_mismatch(lambda: order[0](x()), "a copy of layer number 1")


def test_copies_that_share_a_transport_have_an_identity_of_their_own():
    gloo_pool(2).run(copies_in_another_order)


def shared_transport_in_another_order():
    transport = ProcessGroupTransport(timeout_s=20)
    both = [MoELayer(D, F, E, 2, transport=transport, dtype=torch.float64) for _ in range(2)]
    order = both if dist.get_rank() == 0 else both[::-1]
    raises_mismatch(lambda: order[0](x()), "another user of its transport")


def test_layers_given_one_transport_are_told_apart():
    gloo_pool(2).run(shared_transport_in_another_order)


def linked_on_one_rank(how):
    from moe_overlap.transport import EmulatedLinkTransport, LinkSpec, NodeTopology

    inner = ProcessGroupTransport(timeout_s=20)
    spec = "100mbit:50us" if how == "missing" or dist.get_rank() == 0 else "200mbit:50us"
    if how == "missing" and dist.get_rank() == 1:
        one = MoELayer(D, F, E, 2, transport=inner, dtype=torch.float64)
    else:
        link = EmulatedLinkTransport(inner, LinkSpec.parse(spec), NodeTopology(world_size=2))
        one = MoELayer(D, F, E, 2, transport=link, dtype=torch.float64)
    with pytest.raises((PlanMismatch, ConfigError), match="agreeing about|link = 'another one on rank 1"):
        one(x())


@pytest.mark.parametrize("how", ["missing", "another"])
def test_ranks_with_other_links_are_refused(how):
    gloo_pool(2).run(linked_on_one_rank, how)


def sum_against_step():
    one = layer()
    one(x())
    call = (lambda: one.transport.all_reduce(torch.ones(3))) if dist.get_rank() == 0 else (lambda: one(x()))
    raises_mismatch(call, "in a sum over ranks of", "in a forward call of")


def test_a_sum_and_a_step_are_told_apart():
    gloo_pool(2).run(sum_against_step)


# ---------------------------------------------------------------- threads


def two_threads():
    """The second thread comes while the first one waits for rank 1."""
    one, other = layer(), layer()
    for each in (one, other):
        each(x())
    errors = []
    if dist.get_rank() == 0:
        original = one.transport.connections.begin

        def slow(make, where, limit_s):
            time.sleep(0.5)
            return original(make, where, limit_s)

        one.transport.connections.begin = slow

        def call(each):
            try:
                each(x())
            except (ConfigError, MoeTransportError) as error:
                errors.append(error)

        both = [threading.Thread(target=call, args=(each,)) for each in (one, other)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join(30)
        assert any(isinstance(error, ConfigError) and "two threads" in str(error) for error in errors), errors
    else:
        with pytest.raises(MoeTransportError, match="two threads"):
            one(x())
            other(x())


def test_two_threads_at_once_are_refused():
    gloo_pool(2).run(two_threads)


def test_counts_of_messages():
    """What is read back is what was said, whatever the room that other layers need."""
    gloo_pool(2).run(growing)


def growing():
    small, large = ProcessGroupTransport(timeout_s=20), ProcessGroupTransport(timeout_s=20)
    small.open(header(2))
    plan = small.agree(record(counts_of(small.rank, 2, 2, 5)))
    large.open(header(64))
    large.agree(record(counts_of(large.rank, 2, 64, 6)))
    again = small.agree(record(counts_of(small.rank, 2, 2, 5)))
    assert (plan.counts.sent == again.counts.sent).all()
    assert small.life is large.life and small.life.capacity > 16 * 64 / 2
