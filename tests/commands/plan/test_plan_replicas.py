"""`moe-overlap plan --replica-slots`: what slots for copies of wanted experts give, by skew and by a saved routing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_overlap.commands.cli import main
from moe_overlap.commands.plan.machine import shapes, traffic_of
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.replicas import Replicas, _costs, copies_bytes, replica_line, replicas, skewed_counts
from moe_overlap.commands.plan.sweep import asked
from moe_overlap.commands.plan.traffic import seats_with_copies
from moe_overlap.commands.plan.whole_model import whole_model
from moe_overlap.planning.copy_costs import FREE, GRADIENT_BYTES, Computed, costs_of
from moe_overlap.planning.copy_load import Load, rank_rows
from moe_overlap.planning.replication import decide

SKEWED = PlanOptions(ranks=8, experts=64, top_k=4, hidden=1024, ffn=2048, tokens=4096, skew=2.0, dedup="off",
                     phase="infer")  # fmt: skip


@pytest.mark.parametrize("skew", [1.0, 1.3, 2.0, 3.5])
def test_counts_have_the_skew_that_was_asked_for(skew):
    counts = skewed_counts(tokens=4096, top_k=4, ranks=8, experts=64, local=8, share=skew / 8)
    assert counts.shape == (8, 64) and (counts == counts[0]).all() and (counts.sum(axis=1) == 4 * 4096).all()
    assert counts.max() <= 4096 and (np.diff(counts[0]) <= 1).all(), "no expert twice in a token; Zipf's order"
    by_rank = counts.sum(axis=0).reshape(8, 8).sum(axis=1)
    assert by_rank.argmax() == 0 and by_rank[0] / by_rank.mean() == pytest.approx(skew, rel=1e-3)


def test_more_choices_than_a_token_has_cannot_go_to_one_rank():
    """Two experts a rank and four choices of a token: at most half of them are for one rank."""
    found = skewed_counts(tokens=100, top_k=4, ranks=8, experts=16, local=2, share=0.499)
    assert found[0, :2].tolist() == [100, 100]
    assert skewed_counts(tokens=100, top_k=4, ranks=8, experts=16, local=2, share=0.51) is None
    beyond = replace(SKEWED, experts=16, skew=5.0)
    assert replicas(beyond, asked(beyond, "top2")).before == pytest.approx(4.0)


def test_copies_that_stay_cost_the_step_nothing():
    """In inference the step is that of the smaller skew, and all copies travel once."""
    one = asked(SKEWED, "top2")
    found = replicas(SKEWED, one)
    assert found.before == pytest.approx(2.0, rel=1e-3) and 1 <= found.after < 1.1 and 0 < found.copies <= 8
    evened = asked(replace(SKEWED, skew=2.0 * found.after / found.before), "top2")
    assert found.seconds == evened.time_s < one.time_s
    expert = 3 * 1024 * 2048 * 2
    assert found.moved_bytes == found.copies * expert and found.held_bytes == expert


def test_copies_of_a_step_are_fetched_and_their_gradients_sent_home():
    options = replace(SKEWED, phase="train", ranks_per_node=8, issue=0.0, compute_slowdown=1.0, wire_slowdown=1.0)
    one = asked(options, "top2")
    found = replicas(options, one)
    evened = asked(replace(options, skew=2.0 * found.after / found.before), "top2")
    expert = 3 * 1024 * 2048
    assert found.moved_bytes == found.copies * expert * (2 + GRADIENT_BYTES)
    # The wire has the weights before the rows, so that a step is longer by no more than both ways take.
    copy_s = sum(cost.copy[1](found.copies) for cost in costs_of(
        one.model, ("forward", "backward"), row_bytes=2048, expert_params=expert, param_bytes=2))  # fmt: skip
    assert evened.time_s < found.seconds <= evened.time_s + copy_s and found.seconds < one.time_s


def test_no_copy_is_made_that_does_not_pay():
    """A handful of rows: an expert's weights take longer than all that they could save."""
    few = replace(SKEWED, phase="train", tokens=16, skew=1.2)
    one = asked(few, "top2")
    found = replicas(few, one)
    assert found == Replicas(copies=0, before=found.before, after=found.before, seconds=one.time_s, moved_bytes=0,
                             held_bytes=0)  # fmt: skip
    assert "no copy pays" in replica_line(few, one, None)


def test_where_reading_weights_takes_longer_a_backward_still_waits_for_its_wire():
    few = replace(SKEWED, phase="train", tokens=16, skew=1.2)
    assert few.weights == "beside"
    _, backward = _costs(few, asked(few, "top2"))
    assert 0 < backward.row_s < 1e-15 and 0.4 < backward.wgrad_row_s / backward.row_s < 0.5
    rows, free = (10**6, 10**6), Computed(rows=[0, 10**6], copied=[0, 0], experts=[0, 1])
    wire_s = 2 * backward.exchange[1].beta_s * rows[1]
    assert backward.window_s(free, rows) >= wire_s + backward.expert_s / (2 * backward.chunks) > wire_s


def test_more_slots_are_at_least_as_even_and_as_fast():
    by_slots = [replicas(replace(SKEWED, skew=3.0, replica_slots=slots), asked(replace(SKEWED, skew=3.0), "top2"))
                for slots in (1, 2, 4)]  # fmt: skip
    assert by_slots[0].after >= by_slots[1].after >= by_slots[2].after
    assert by_slots[0].seconds >= by_slots[2].seconds


@pytest.fixture
def file(tmp_path):
    """Two of eight experts for each of 256 tokens, the first ones far more often."""
    scores = torch.rand(256, 8, generator=torch.Generator().manual_seed(5)) + torch.arange(8, 0, -1) / 6
    path = tmp_path / "routing.safetensors"
    ids = scores.topk(2).indices.to(torch.int32).contiguous()
    save_file({"ids": ids, "weights": torch.ones(ids.shape)}, path, {"E": "8", "K": "2"})
    return str(path)


@pytest.mark.parametrize("dedup", ["off", "on"])
def test_a_saved_routing_is_shared_out_as_decided(file, dedup):
    options = PlanOptions(ranks=4, ranks_per_node=2, experts=8, top_k=2, tokens=64, hidden=512, ffn=2048, phase="infer",
                          routing=file, dedup=dedup, weights="added", flops=1e12)  # fmt: skip
    one = asked(options, "top2")
    found = replicas(options, one)
    assert found.copies and found.after < found.before and found.seconds < one.time_s
    counts = traffic_of(options, "top2", one.at).rows_WE
    load = Load.at_home(counts, [0, 0, 1, 1, 2, 2, 3, 3], [1] * 4, ranks_per_node=2)
    assert rank_rows(load.seats, 4) == counts.sum(axis=0).reshape(4, 2).sum(axis=1).tolist()
    costs = [replace(cost, copy=(FREE, FREE)) for cost in costs_of(
        one.model, ("forward",), row_bytes=1024, expert_params=1, param_bytes=2)]  # fmt: skip
    decision = decide(load, costs)
    placed = traffic_of(options, "top2", one.at, seats=seats_with_copies(load, decision))
    by_rank = placed.rows_WE.reshape(4, 4, -1).sum(axis=(0, 2))
    assert by_rank == pytest.approx(rank_rows(decision.seats, 4), abs=8), "each block of tokens is shared out by itself"
    for shape in shapes(options, "top2", one.at, distinct=dedup == "on", routing=placed):
        own = 0 if shape.distinct is None else shape.distinct.own_rows
        assert sum(shape.rows) + own == by_rank.max() < max(rank_rows(load.seats, 4))


def test_the_line_says_balance_bytes_time_and_whether_it_fits():
    options = replace(SKEWED, layers=4, memory=80e9)
    one = asked(options, "top2")
    whole, found = whole_model(options, one), replicas(options, one)
    line = replica_line(options, one, whole)
    assert f"{1e3 * found.seconds:.3f} ms ({one.time_s / found.seconds:.2f}x as fast)" in line
    assert f"{found.copies} copies" in line and f"from 2.00x to {found.after:.2f}x the mean rows" in line
    assert "sent once" in line and "; it fits: " in line
    need = whole.bytes + 4 * found.held_bytes
    assert need == whole.bytes + copies_bytes(options, found)
    assert "does NOT fit" in replica_line(replace(options, memory=need - 1), one, whole)
    trained = replace(options, phase="train", stages=2)
    assert copies_bytes(trained, found) == 2 * found.held_bytes + found.held_bytes / 2 * GRADIENT_BYTES


def test_the_command_says_it_where_something_is_uneven(capsys, tmp_path):
    words = ["plan", "--ranks", "8", "--draws", "0", "--phase", "infer", "--out", str(tmp_path)]
    assert main([*words, "--skew", "1.5", "--replica-slots", "2"]) == 0
    assert "2 slots a rank for copies of wanted experts (--replica-slots): " in capsys.readouterr().out
    for more in ([], ["--skew", "1.5", "--replica-slots", "0"]):
        assert main([*words, *more]) == 0
        assert "for copies of wanted experts" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--replica-slots 2", "--replica-slots = 2: expected --skew or --routing"),
        ("--replica-slots 1", "--replica-slots = 1: expected --skew or --routing"),
        ("--skew 2 --replica-slots -1", "--replica-slots = -1"),
        ("--skew 2 --ranks 1 --replica-slots 2", "--replica-slots = 2: expected several --ranks"),
    ],
)
def test_slots_that_nobody_can_use_are_one_line(words, said, capsys):
    assert main(["plan", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


@pytest.mark.parametrize(
    "words, asked", [("--skew 2.0 --replica-slots 2", True), ("--skew 2.0 --replica-slots 0", False), ("", False)]
)
def test_the_record_says_what_the_line_says(words, asked, tmp_path, capsys):
    sizes = "--ranks 8 --experts 64 --top-k 4 --hidden 1024 --ffn 2048 --tokens 4096 --phase infer"
    assert main(["plan", *sizes.split(), *words.split(), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())["replicas"]
    said = capsys.readouterr().out
    assert (found is not None) == asked == ("--replica-slots)" in said)
    if asked:
        assert (
            found["slots"] == 2
            and f"{found['copies']} copies take the busiest rank from {found['before']:.2f}x" in said
        )
        assert f"{1e3 * found['seconds']:.3f} ms" in said
