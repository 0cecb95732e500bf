"""What a layer that deduplicates refuses: alike on all ranks, with nothing sent; and metadata that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_overlap import ConfigError, PlanMismatch, RemoteAbort, ShortcutBlock
from moe_overlap.layer.functional import moe_forward
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import chunked, deduplicate
from tests.layers import D, E, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import same_bits

K = 4


def layer_of(me, **options):
    return make(me.transport(), **{"dedup": "on", "top_k": K, "schedule": "chunked(2)", **options})


class Repeating(LinearRouter):
    """Of a batch of five tokens, the last one has one expert twice."""

    def forward(self, x_TD, **kwargs):
        decision = super().forward(x_TD, **kwargs)
        if len(x_TD) != 5:
            return decision
        ids_TK = decision.topk_ids_TK.clone()
        ids_TK[-1, 0] = ids_TK[-1, 3]
        return replace(decision, topk_ids_TK=ids_TK)


@pytest.mark.parametrize("dedup", ["on", "auto"])
@pytest.mark.parametrize("where", [(0,), (1,), (0, 1)])
def test_an_id_twice_in_a_token_is_refused_by_all_and_the_layer_stays_usable(where, dedup):
    def rank(me):
        layer = layer_of(me, router=Repeating(D, E, K, dtype=torch.float64), dedup=dedup)
        before = layer(tokens(6)).detach()
        sent = layer.transport.stats.exchanges
        with pytest.raises(ConfigError, match="twice in a token") as caught:
            layer(tokens(5 if me.rank in where else 7))
        assert caught.value.field == "topk_ids" and layer.transport.stats.exchanges == sent
        same_bits(layer(tokens(6)).detach(), before)

    virtual_world(2).run(rank)


@pytest.mark.parametrize(("here", "there"), [("on", "off"), ("auto", "off"), ("on", "auto")])
def test_ranks_that_deduplicate_otherwise_are_told_before_anything_is_sent(here, there):
    def rank(me):
        layer = layer_of(me, dedup=here if me.rank else there)
        with pytest.raises(PlanMismatch):
            layer(tokens(6))
        assert layer.transport.stats.exchanges == 0
        layer.transport.reopen()
        with pytest.raises(PlanMismatch):
            layer(tokens(6))

    virtual_world(2).run(rank)


@pytest.mark.parametrize("word", ["yes", "ON", True, None, 1])
def test_an_unknown_word(word):
    with pytest.raises(ConfigError) as caught:
        make(dedup=word)
    assert caught.value.field == "dedup"


def test_the_all_gather_of_rows_is_not_there():
    with pytest.raises(NotImplementedError, match="all-gather"):
        make(dedup="gather")


FORWARD, BACKWARD = "P M D0 D1 O E0 C0 E1 C1 U", "Ut Ct0 Ct1 Od Ed0 Dt0 Ed1 Mt Dt1 Ew0 Pt"
BAD_SCHEDULES = {
    "only M": ("tokens", FORWARD.replace(" O", ""), BACKWARD),
    "only O": ("tokens", FORWARD.replace(" M", ""), BACKWARD),
    "only Mt": ("tokens", FORWARD, BACKWARD.replace(" Od", "")),
    "only Od": ("tokens", FORWARD, BACKWARD.replace(" Mt", "")),
    "forward alone": ("tokens", FORWARD, BACKWARD.replace(" Od", "").replace(" Mt", "")),
    "backward alone": ("tokens", FORWARD.replace(" O", "").replace(" M", ""), BACKWARD),
    "M twice": ("tokens", FORWARD.replace("D0", "M D0"), BACKWARD),
    "M after E0": ("tokens", "P D0 D1 O E0 M C0 E1 C1 U", BACKWARD),
    "O after U": ("tokens", "P M D0 D1 E0 C0 E1 C1 U O", BACKWARD),
    "Mt before Ed1": ("tokens", FORWARD, "Ut Ct0 Ct1 Od Ed0 Dt0 Mt Ed1 Dt1 Ew0 Pt"),
    "Pt before Mt": ("tokens", FORWARD, "Ut Ct0 Ct1 Od Ed0 Dt0 Ed1 Dt1 Ew0 Pt Mt"),
    "Ew0 before Od": ("tokens", FORWARD, "Ut Ct0 Ct1 Ed0 Dt0 Ed1 Mt Dt1 Ew0 Od Pt"),
    "groups in another order": ("experts", "P M D0 D1 O E1 C1 E0 C0 U", BACKWARD),
    "groups of backward in another order": ("experts", FORWARD, "Ut Ct0 Ct1 Od Ed1 Dt1 Ed0 Mt Dt0 Ew0 Pt"),
}


@pytest.mark.parametrize("name", BAD_SCHEDULES)
def test_a_schedule_that_cannot_run(name):
    by, forward, backward = BAD_SCHEDULES[name]
    pair = replace(deduplicate(chunked(2, by)), forward=Schedule.parse(forward), backward=Schedule.parse(backward))

    def rank(me):
        with pytest.raises(ConfigError) as caught:
            layer_of(me, schedule=pair)
        assert caught.value.field.startswith("schedule")

    virtual_world(2).run(rank)


def test_a_deduplicated_schedule_where_nothing_is_deduplicated():
    pair = deduplicate(chunked(2))

    def rank(me):
        with pytest.raises(ConfigError, match="without M and O"):
            layer_of(me, schedule=pair, dedup="off")
        layer = layer_of(me, dedup="off")
        ids, weights = torch.arange(K).expand(3, K), torch.ones(3, K, dtype=torch.float64)
        with pytest.raises(ConfigError, match="without M and O"):
            moe_forward(tokens(3), ids, weights, *layer.expert_weights, schedule=pair, transport=layer.transport)
        moe_forward(tokens(3), ids, weights, *layer.expert_weights, schedule=chunked(2), transport=layer.transport)

    virtual_world(2).run(rank)
    with pytest.raises(ConfigError, match="without M and O"):
        make(schedule=pair, dedup="on")


def test_a_block_deduplicates_as_its_layer_does():
    def rank(me):
        for dedup in ("off", "on"):
            block = ShortcutBlock([torch.nn.Identity()], layer_of(me, dedup=dedup, schedule="serial"), tap=0, slot=0)
            assert block.schedule.deduplicated == (dedup == "on")

    virtual_world(2).run(rank)


# ---------------------------------------------------------------- metadata that cannot be


def swapped(ids):
    """The last row becomes the first one."""
    order = [len(ids) - 1, *range(len(ids) - 1)]
    return ids[order]


def changed(place, value):
    def change(ids):
        ids[place] = value
        return ids

    return change


def repeated(ids):
    """A row with two experts has the first one twice."""
    rows = ((ids >= 0).sum(dim=1) > 1).nonzero()
    used = ids[rows[0, 0]] >= 0
    ids[rows[0, 0], used] = ids[rows[0, 0], used][0]
    return ids


HOSTILE = {
    "out of range": changed((0, 0), E // 2),
    "far out of range": changed((3, 1), 2**31 - 1),
    "below -1": changed((2, 2), -2),
    "far below": changed((2, 2), -(2**31)),
    "a row of nobody": changed(1, -1),
    "another expert everywhere": lambda ids: torch.where(ids >= 0, E // 2 - 1 - ids, ids),
    "rows of other blocks": swapped,
    "an expert twice": repeated,
}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("schedule", ["serial", "chunked(2,experts)"])
@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_that_was_not_announced_is_a_mismatch_that_names_the_rank(name, schedule, world):
    def rank(me):
        layer = layer_of(me, schedule=schedule)
        x = tokens(37, seed=me.rank)
        before = layer(x).detach()
        start = layer.transport.start

        def lying(rows, plan, *args, action, **kwargs):
            if action == "M":
                ids = rows[:, -K:].clone()
                if world > 2:
                    ids = ids.clamp(max=E // world - 1)
                rows = torch.cat([rows[:, :-K], HOSTILE[name](ids)], dim=1)
            return start(rows, plan, *args, action=action, **kwargs)

        if me.rank == 1:
            layer.transport.start = lying
        with pytest.raises((PlanMismatch, RemoteAbort)) as caught:
            layer(x)
        if me.rank == 1:
            assert isinstance(caught.value, RemoteAbort) and "rank 1 sent ids" in str(caught.value)
            del layer.transport.start
        elif world == 2:
            assert isinstance(caught.value, PlanMismatch)
            assert (caught.value.peer, caught.value.action, caught.value.rank) == (1, "M", 0)
        layer.transport.reopen()
        same_bits(layer(x).detach(), before)

    virtual_world(world).run(rank)
