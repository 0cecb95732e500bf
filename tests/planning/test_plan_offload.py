"""Experts in host memory as actions and as seconds: where copies stand, and closed forms of when they hide."""

from __future__ import annotations

import pytest

from moe_overlap.errors import ConfigError
from moe_overlap.planning.offload import OffloadShape, plan_offload
from moe_overlap.schedule.builders import chunked, deduplicate, serial, shared_expert
from moe_overlap.schedule.check import check
from moe_overlap.schedule.offload import with_host_experts, without_host_experts
from moe_overlap.schedule.words import from_text, python_of


@pytest.mark.parametrize("chunks", [1, 2, 3, 16])
def test_pairs_with_copies_can_run_and_come_back(chunks: int) -> None:
    pair = chunked(chunks, "experts")
    found = with_host_experts(pair)
    check(found)
    assert without_host_experts(found) == pair
    assert python_of(found) == python_of(pair)[:-1] + ', expert_offload="host")'
    assert [found.backward.count(verb) for verb in ("Hb", "Ew", "Hg")] == [chunks] * 3


def test_where_copies_stand() -> None:
    found = with_host_experts(chunked(3, "experts"))
    assert found.forward.text == "Hf0 Hf1 P D0 D1 D2 E0 Hf2 C0 E1 C1 E2 C2 U"
    assert found.backward.text == ("Ut Hb0 Hb1 Ct0 Ct1 Ct2 Ed0 Hb2 Dt0 Ed1 Dt1 Ed2 Dt2 Ew0 Hg0 Ew1 Hg1 Ew2 Hg2 Pt")


@pytest.mark.parametrize(
    "pair",
    [
        chunked(2),
        deduplicate(serial()),
        shared_expert(chunks=2),
        from_text("P D0 D1 E1 C1 E0 C0 U", "Ut Ct0 Ct1 Ed0 Dt0 Ed1 Dt1 Ew0 Pt", by="experts"),
        from_text("P D0 D1 E0 C0 E1 C1 U", "Ut Ct0 Ct1 Ed0 Dt0 Eg0 Ed1 Dt1 Eg1 Pt", by="experts"),
    ],
    ids=["tokens", "dedup", "shared", "descending", "gradients by chunk"],
)
def test_pairs_that_cannot_have_them_are_refused(pair) -> None:
    with pytest.raises(ConfigError):
        with_host_experts(pair)


def shape(**more) -> OffloadShape:
    given = {"experts": 16, "bytes_per_expert": 1000, "bytes_per_s": 1e6, "rows_per_expert": 100.0, "row_s": 1e-5}
    return OffloadShape(**(given | more))


def test_the_crossover_is_where_a_copy_takes_as_long_as_its_rows() -> None:
    one = shape()
    assert one.crossover_rows == pytest.approx(100.0)
    for rows, hides in ((150.0, True), (50.0, False)):
        best = {plan.chunks: plan for plan in plan_offload(shape(rows_per_expert=rows))}[16]
        copy_s, group_s = 1e-3, rows * 1e-5
        # Forward: the first weights are bare, or all. Backward: those, and the last gradients, likewise.
        forward_s = copy_s + 16 * group_s if hides else 16 * copy_s + group_s
        assert best.resident_s == pytest.approx(3 * 16 * group_s)
        backward_s = copy_s + 16 * 2 * group_s + copy_s if hides else 2 * (16 * copy_s + group_s)
        assert best.step_s == pytest.approx(forward_s + backward_s)


def test_what_an_expert_takes_beside_its_rows_hides_copies_too() -> None:
    assert shape(expert_s=4e-4).crossover_rows == pytest.approx(60.0)
    assert shape(expert_s=2e-3).crossover_rows == 0.0
    assert plan_offload(shape(expert_s=4e-4))[0].resident_s == pytest.approx(3 * 16 * 1.4e-3)


def test_plans_are_sorted_and_within_the_bytes_of_a_device() -> None:
    plans = plan_offload(shape(), device_bytes=4000)
    assert [plan.step_s for plan in plans] == sorted(plan.step_s for plan in plans)
    assert {plan.chunks for plan in plans} == set(range(8, 17)) and max(plan.device_bytes for plan in plans) == 4000
    assert plan_offload(shape(), device_bytes=1999) == []
    assert plan_offload(shape(bytes_per_s=1e30))[0].text == "serial", "copies that take nothing: the fewest chunks"


def test_exchanges_hide_under_experts_as_without_copies() -> None:
    busy = shape(exchange_s=8e-3, rows_s=1e-3)
    best, worst = plan_offload(busy)[0], next(one for one in plan_offload(busy) if one.chunks == 1)
    assert best.chunks > 1 and best.step_s < worst.step_s
    assert worst.step_s == pytest.approx(4e-3 + 4 * 8e-3 + 3 * 16e-3 + 3 * 16e-3)
