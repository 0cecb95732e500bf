"""What ops beside the layer may return: a tensor as their input is. Anything else is refused, on all ranks alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_overlap import ShortcutBlock
from tests.layers import D, make, tokens
from tests.ranks import gloo_pool, virtual_world

BAD = {
    "a tuple": lambda h: (h, h),
    "nothing": lambda h: None,
    "a row": lambda h: h[:1],
    "a column": lambda h: h[..., :1],
    "flat": lambda h: h.reshape(-1),
    "on another device": lambda h: h.to("meta"),
}
SAME = torch.clone


def run_block(transport, place: str, bad, *, schedule=None, rank_of_it: int | None = None):
    """A forward call of a block in which something returns `bad(h)`; on one rank only, where one is given."""
    wrong = bad if rank_of_it in (None, transport.rank) else SAME
    ops = [SAME, SAME, SAME]
    norms = {}
    if place.startswith("op"):
        ops[int(place[-1])] = wrong
    elif place != "shared":
        norms[place] = wrong
    shared = wrong if place == "shared" else None
    how = {"schedule": "auto"} if schedule == "auto" else {"slot": 1, "chunks": 2}
    block = ShortcutBlock(ops, make(transport), tap=1, shared_expert=shared, **norms, **how)
    return block(tokens(8, transport.rank).requires_grad_())


def error_of(call, *args, **options) -> tuple[str, str]:
    try:
        call(*args, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


PLACES = {"op0": "backbone op 0 before the tap", "op1": "backbone op 0", "op2": "backbone op 1",
          "pre_norm": "pre_norm", "post_norm": "post_norm"}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", PLACES)
def test_all_ranks_raise_the_same_error(place, bad):
    for seed in range(3):
        found = virtual_world(2, seed=seed).run(lambda me: error_of(run_block, me.transport(), place, BAD[bad]))
        assert found[0] == found[1], found
        assert found[0][0] == "ConfigError" and found[0][1].startswith(f"{PLACES[place]} = "), found


@pytest.mark.parametrize("bad", ["a tuple", "a row"])
def test_a_branch_is_refused_where_its_sum_is_none(bad):
    """h + branch(h) would be broadcast for a row, and is a TypeError of its own for a tuple."""
    found = virtual_world(2).run(lambda me: error_of(run_block, me.transport(), "shared", BAD[bad]))
    assert [kind for kind, _ in found] == ["ConfigError"] * 2 and "shared_expert" in found[0][1], found


def test_probes_of_auto_refuse_it_too(cache):
    found = virtual_world(2).run(lambda me: error_of(run_block, me.transport(), "op1", BAD["a row"], schedule="auto"))
    assert [kind for kind, _ in found] == ["ConfigError"] * 2, found


def test_a_mistake_of_one_rank_is_told_to_the_others():
    """Rank 1 may be done before it learns of it: then it is told in its next call."""

    def rank(me):
        transport = me.transport()
        found = error_of(run_block, transport, "op1", BAD["a row"], rank_of_it=0)
        return found if found[0] else error_of(run_block, transport, "op1", SAME)

    (kind, _), (other, text) = virtual_world(2).run(rank)
    assert kind == "ConfigError" and other in ("RemoteAbort", "TransportClosed") and "backbone op 0" in text


def on_gloo(place: str, bad: str) -> tuple[str, str]:
    from moe_overlap.transport import ProcessGroupTransport

    return error_of(run_block, ProcessGroupTransport(timeout_s=20), place, BAD[bad])


@pytest.mark.parametrize(("place", "bad"), [("op1", "a row"), ("op2", "a tuple"), ("op0", "nothing")])
def test_all_ranks_raise_the_same_error_between_processes(place, bad):
    found = gloo_pool(2).run(on_gloo, place, bad)
    assert [kind for kind, _ in found] == ["ConfigError"] * 2, found


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("world", [1, 2])
def test_a_shared_expert_of_the_layer(world):
    def rank(me):
        layer = make(me.transport(), shared_expert=Pair())
        return error_of(layer, tokens(8))

    for kind, text in virtual_world(world).run(rank):
        assert kind == "ConfigError" and "shared_expert = 'tuple'" in text


def test_what_is_no_tensor_at_the_entry():
    assert error_of(ShortcutBlock([SAME], make(), tap=0, slot=0), (tokens(8),))[1].startswith("h = 'tuple'")


def test_a_result_in_another_dtype_is_none_of_this():
    """As under autocast."""
    block = ShortcutBlock([lambda h: h.float(), lambda h: h.double()], make(dtype=torch.float64), tap=0, slot=1)
    assert block(tokens(8)).shape == (8, D)
