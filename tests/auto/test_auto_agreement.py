"""schedule="auto": every input of the choice is the same on all ranks, whatever each has cached or runs into."""

from __future__ import annotations

import itertools
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_overlap import ConfigError, ShortcutBlock
from moe_overlap.auto import auto, cost_cache
from moe_overlap.auto import calibrate as measuring
from moe_overlap.errors import MoeTransportError, PeerFailed, PlanMismatch, RemoteAbort, TransportTimeout
from moe_overlap.transport.emulated_link import EmulatedLinkTransport
from moe_overlap.transport.link import LinkSpec, NodeTopology
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests.auto.planted import (
    FREE,
    OPS,
    SHAPES,
    SOME,
    build,
    cost_model,
    layer_of,
    measured_as,
    planted,
    step,
)
from tests.layers import D, make, tokens
from tests.ranks import Ranks, gloo_pool, mark, virtual_world

FREE_WIRE = {"exchange": {"inter": FREE}}


# ---------------------------------------------------------------- one model on all ranks


def own_caches(folder):
    """The chunks of fresh layers. Each rank has a directory of its own and measures something else."""
    rank, seen = dist.get_rank(), []
    for place, model in ((rank, cost_model()), (rank, cost_model(**FREE_WIRE)), (1 - rank, cost_model(alpha_s=1.5e-6))):
        os.environ["MOE_OVERLAP_CACHE_DIR"] = f"{folder}/{place}"
        layer = make(ProcessGroupTransport(timeout_s=20.0), schedule="auto")
        with planted(model if rank == 0 else cost_model(**FREE_WIRE)):
            layer(tokens(SOME[rank], rank))
        seen.append(layer._last_step.pair.chunks)
    return seen


def test_ranks_take_rank_0s_model(cache):
    """What it measured, what its cache has though its peer has none, and not what only the peer's cache has."""
    assert gloo_pool(2).run(own_caches, str(cache)) == [[16, 16, 2]] * 2


def test_ranks_on_different_hardware_agree(monkeypatch):
    """The model says where it was measured, and the digest of a step covers the model."""
    numbers = itertools.count()
    for module in (auto, cost_cache):
        monkeypatch.setattr(module, "hardware", lambda: f"machine {next(numbers)}")

    def rank(me):
        layer = make(me.transport(), schedule="auto")
        layer(tokens(8))
        return next(iter(layer.schedule.found.values())).digest

    monkeypatch.setattr(measuring, "ROUNDS", (1, 1))
    monkeypatch.setattr(measuring, "fit", lambda *_, source, **__: cost_model(source=source))
    first, second = virtual_world(2).run(rank)
    assert first == second and next(numbers) > 2


def other_nodes(folder):
    os.environ["MOE_OVERLAP_CACHE_DIR"] = folder
    with measured_as(cost_model()):
        for per_node, lane in ((1, "inter"), (2, "intra"), (1, "inter")):
            topology = NodeTopology(world_size=2, ranks_per_node=per_node)
            link = LinkSpec.parse("10gbit:1us")
            transport = EmulatedLinkTransport(ProcessGroupTransport(timeout_s=20.0), link, topology)
            layer = make(transport, schedule="auto")
            with planted(cost_model(exchange={lane: FREE})):
                layer(tokens(8))
            assert lane in layer.explain() or layer._last_step.pair.joined


def test_other_nodes_are_another_key(cache):
    gloo_pool(2).run(other_nodes, str(cache))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bad_input_on_one_rank_is_an_error_on_all_and_the_layer_lives_on(shape):
    def rank(me):
        model = build(shape, me.transport())
        bad = tokens(4)[:, 1:] if shape != "block" else tokens(4).float()
        if shape != "block":
            with pytest.raises(ConfigError, match=r"x\.shape"):
                model(bad if me.rank == 1 else tokens(4))
        nan = tokens(4)
        nan[1, 2] = float("nan") if me.rank == 0 else 0.0
        with pytest.raises(ConfigError, match="logits"):
            model(nan)
        assert layer_of(model).transport.stats.exchanges == 0
        return step(model, me.rank)["y"].shape[0]

    with planted(cost_model(OPS if shape == "block" else 0)):
        assert virtual_world(2).run(rank) == list(SOME)


@pytest.mark.parametrize("other", [{"schedule": "serial"}, {"schedule": "chunked(2)"}, {"overlap": False},
                                   {"max_in_flight_bytes": 1 << 30}], ids=str)  # fmt: skip
def test_a_rank_that_is_told_otherwise_is_refused_before_anything_is_sent(other):
    """A fixed schedule, or other settings of "auto", beside a rank that calibrates."""

    def rank(me):
        layer = make(me.transport(), **{"schedule": "auto"} | (other if me.rank else {}))
        with pytest.raises(PlanMismatch, match='schedule="auto".*nothing was sent|nothing was sent.*schedule="auto"'):
            layer(tokens(4))
        return layer.transport.stats.exchanges, layer.transport.stats.agreements

    with measured_as(cost_model()):
        assert virtual_world(2).run(rank) == [(0, 1)] * 2


def test_blocks_with_other_ops_beside_the_exchanges_are_refused_before_anything_is_sent():
    def rank(me):
        ops = [nn.Linear(D, D, dtype=torch.float64) for _ in range(1 + me.rank)]
        block = ShortcutBlock(ops, make(me.transport()), tap=0, schedule="auto")
        with pytest.raises(PlanMismatch, match="other ops"):
            block(tokens(4))
        return block.moe.transport.stats.exchanges, block.moe.transport.stats.agreements

    with measured_as(cost_model()):
        assert virtual_world(2).run(rank) == [(0, 1)] * 2


class Fails(nn.Module):
    """An op that raises at its n-th call on rank 1."""

    def __init__(self, rank, at, kind=MemoryError):
        super().__init__()
        self.rank, self.left, self.kind = rank, at, kind

    def forward(self, h):
        self.left -= 1
        if self.rank == 1 and self.left == 0:
            raise self.kind("no memory left for this op")
        return h * 1.0


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 3, 9])
def test_an_op_that_fails_in_a_probe(at, kind):
    """The rank that fails raises its error, the others learn of it; after reopen() the layer calibrates again."""

    def rank(me):
        block = ShortcutBlock([Fails(me.rank, at, kind)], make(me.transport()), tap=0, schedule="auto")
        with pytest.raises(kind if me.rank == 1 else RemoteAbort, match="no memory left"):
            block(tokens(4))
        block.moe.transport.reopen()
        return block(tokens(4)).shape[0]

    with measured_as(cost_model(1)):
        assert virtual_world(2).run(rank) == [4, 4]


def test_a_timeout_of_a_probe_speaks_of_no_loss():
    """Rank 1 leaves its first probe without a word; the other one waits for it in backward."""

    def rank(me):
        block = ShortcutBlock([Fails(me.rank, 1)], make(me.transport()), tap=0, schedule="auto")
        if me.rank == 1:
            block.moe.transport.close = lambda reason: None
        with pytest.raises(MemoryError if me.rank == 1 else TransportTimeout) as error:
            block(tokens(4))
        return getattr(error.value, "action", None), str(error.value)

    with measured_as(cost_model(1)):
        (action, text), _ = virtual_world(2).run(rank)
    assert action == "Ut" and "attach" not in text


def test_ranks_of_which_only_one_had_finished_calibrate_again_after_reopen():
    def rank(me):
        layer = make(me.transport(), schedule="auto")
        layer(tokens(4))
        if me.rank == 1:
            layer.schedule.found.clear()  # as if it had failed just before the end
        with pytest.raises(PlanMismatch):
            layer(tokens(4))
        layer.transport.reopen()
        return layer(tokens(4)).shape[0]

    with planted(cost_model()):
        assert virtual_world(2).run(rank) == [4, 4]


LIMIT_S = 20.0  # more than a busy machine makes of a calibration


class Dies(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.left = at

    def forward(self, h):
        self.left -= 1
        if dist.get_rank() == 1 and self.left == 0:
            mark()
            os._exit(3)
        return h * 1.0


def dying(at, folder):
    os.environ["MOE_OVERLAP_CACHE_DIR"] = folder
    block = ShortcutBlock([Dies(at)], make(ProcessGroupTransport(timeout_s=LIMIT_S)), tap=0, schedule="auto")
    measuring.ROUNDS = (1, 1)
    begin = time.monotonic()
    try:
        block(tokens(8).requires_grad_())
    except MoeTransportError as error:
        return type(error).__name__, error.peer, time.monotonic() - begin
    return "no error", None, 0.0


def test_a_rank_that_dies_during_calibration(cache):
    with Ranks(2) as ranks:
        ranks.start(dying, 4, str(cache))
        first, second = ranks.wait()
    assert second.exitcode == 3
    name, peer, seconds = first.value
    assert (name, peer) == (PeerFailed.__name__, 1) and seconds < LIMIT_S
