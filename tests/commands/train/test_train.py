"""Overlap off and on over a whole run, and ranks: one, two from the session's pool, two from torchrun.

Two ranks come from the session's pool, except where the command's own way to start them is what is tested.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_overlap import prepare
from moe_overlap.commands.train import command as train_command
from moe_overlap.commands.train.command import differences, run_rank
from moe_overlap.commands.train.files import read_tensors, write_tensors
from moe_overlap.commands.train.loop import DenseGradients
from moe_overlap.commands.train.model import LanguageModel, initialise, split_parameters
from moe_overlap.commands.train.options import KINDS, parse
from moe_overlap.launch.launch import World
from tests.commands.train.jobs import SIZES, arguments, corpus_of, events, losses, run, run_on_two
from tests.ranks import gloo_pool

ROOT = Path(__file__).resolve().parents[3]

# ---------------------------------------------------------------- overlap, bit for bit


def test_forty_steps_with_overlap_off_and_on_are_equal_bit_for_bit(text, tmp_path):
    assert run(text, tmp_path, "--ranks", 2, "--steps", 40, "--kind", "scmoe_pos2", "--compare-overlap") == 0
    off, on = losses(tmp_path, "off"), losses(tmp_path, "on")
    assert len(on) == 40 and off == on
    assert on[-1] < on[0] - 1.0, "it learns"
    assert events(tmp_path, "compare")[0]["bit_equal"] is True
    (end,) = events(tmp_path, "end")
    assert end["nats_below_unigram"] == end["unigram_entropy"] - end["held_out_loss"]
    tokens = 512 * 1  # held-out tokens times routed experts
    assert [sum(load) for load in end["expert_load"]] == [tokens] * len(end["expert_load"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scmoe_pos2"])
def test_the_other_kinds_too(kind, text, tmp_path):
    assert run_on_two(text, tmp_path, "--steps", 4, "--kind", kind, "--compare-overlap") == [0, 0]
    assert losses(tmp_path, "off") == losses(tmp_path, "on")


@pytest.mark.parametrize("kind", ["top2", "scmoe_pos2"])
def test_auto_measures_and_changes_no_bit(kind, text, tmp_path):
    options = ("--steps", 3, "--kind", kind, "--schedule", "auto", "--link", "100mbit:50us", "--compare-overlap")
    assert run_on_two(text, tmp_path, *options) == [0, 0]
    assert losses(tmp_path, "off") == losses(tmp_path, "on")
    (ran,) = events(tmp_path, "schedules")
    assert len(ran["forward"]) == 1 and ran["forward"][0].startswith("P D0")


def test_an_emulated_link_changes_the_time_and_not_the_numbers(text, tmp_path):
    slow, free = tmp_path / "slow", tmp_path / "free"
    assert run_on_two(text, slow, "--steps", 2, "--link", "1gbit:20ms") == [0, 0]
    assert run_on_two(text, free, "--steps", 2) == [0, 0]
    assert losses(slow) == losses(free)
    # Forward and backward exchanges, the agreement and two hops of the dense gradients: six latencies at least.
    assert min(4 * 32 / event["tokens_per_s"] for event in events(slow, "step")) > 0.12
    assert events(slow, "start")[0]["link"] == "emulated 1gbit:20ms"


def test_a_difference_is_found_and_is_exit_status_1(text, tmp_path, monkeypatch, capsys):
    original = train_command.train

    def nudged(options, *arguments, **keywords):
        trained = original(options, *arguments, **keywords)
        if options.overlap == "on":
            with torch.no_grad():  # one bit of one parameter
                trained.model.norm.weight.view(torch.int32)[3] ^= 1
        return trained

    monkeypatch.setattr(train_command, "train", nudged)
    assert run(text, tmp_path, "--ranks", 1, "--steps", 2, "--compare-overlap") == 1
    assert events(tmp_path, "compare")[0]["bit_equal"] is False
    assert "norm.weight" in capsys.readouterr().err


def test_differences_compares_bits_of_losses():
    model = torch.nn.Linear(2, 2)

    def trained(values):
        return train_command.Trained(model=model, losses=values, tokens_per_s=1.0)

    nan = float("nan")
    assert differences(trained((0.0, nan)), trained((0.0, nan))) == ([], [])
    assert differences(trained((0.0, 1.0)), trained((-0.0, 1.0))) == ([0], [])


def test_the_committed_run_learned_and_was_bit_equal():
    files = sorted(ROOT.glob("benchmarks/results/*/????-??-??-train.jsonl"))
    assert files
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        (start,) = (row for row in rows if row["event"] == "start")
        (end,) = (row for row in rows if row["event"] == "end")
        curves = {
            overlap: [row["loss"] for row in rows if row["event"] == "step" and row["overlap"] == overlap]
            for overlap in ("off", "on")
        }
        assert start["steps"] >= 200 and len(curves["on"]) == start["steps"]
        assert curves["off"] == curves["on"]
        assert end["nats_below_unigram"] >= 0.5


# ---------------------------------------------------------------- ranks


def torchrun(*words):
    """Standard output of two ranks that torchrun started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_example_runs(text):
    said = torchrun(str(ROOT / "examples/train_lm.py"), str(text / "heapq.py"), "--steps", "3")
    first, last = (float(line.split()[3]) for line in said.splitlines() if line.startswith("step"))
    assert last < first and "tokens per expert" in said


def test_torchrun_gives_the_same_losses(text, tmp_path):
    pooled, launched = tmp_path / "pooled", tmp_path / "launched"
    assert run_on_two(text, pooled, "--steps", 3) == [0, 0]
    torchrun("-m", "moe_overlap", "train", *arguments(text, launched, "--steps", 3))
    assert losses(launched) == losses(pooled)


def save_gradients(argv, folder):
    """The gradients of one backward pass, written by every rank and read by the test below."""
    world = World()
    if dist.is_initialized():
        world = World(rank=dist.get_rank(), size=2, local_rank=dist.get_rank(), group=dist.group.WORLD)
    options = parse(argv, ranks=world.size)
    corpus = corpus_of(options.text, options.out, options)
    model = LanguageModel(options, world.group)
    initialise(model, seed=0, rank=world.rank)
    prepare(model)
    windows = corpus.batch(0, seed=0, batch=options.batch, seq=options.seq, rank=world.rank, ranks=world.size)
    model.cross_entropy(windows).backward()
    dense, expert = split_parameters(model)
    DenseGradients(model).average_()
    tensors = {name: parameter.grad for name, parameter in (dense | expert).items()}
    write_tensors(folder / f"gradients-{world.rank}-of-{world.size}", tensors, {})


@pytest.mark.parametrize("kind", ["top2", "scmoe_pos2"])
def test_two_ranks_have_the_gradients_of_one(kind, text, tmp_path):
    argv = arguments(text, tmp_path, "--kind", kind)
    save_gradients(argv, tmp_path)
    gloo_pool(2).run(save_gradients, argv, tmp_path)
    (one, _), (first, _), (second, _) = (
        read_tensors(tmp_path / f"gradients-{name}") for name in ("0-of-1", "0-of-2", "1-of-2")
    )
    assert set(one) == set(first)
    for name, expected in one.items():
        ours = first[name]
        if ours.shape != expected.shape:
            ours = torch.cat([ours, second[name]])  # experts lie on both ranks
        else:
            assert torch.equal(ours, second[name]), name
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_run_rank_alone_leaves_the_number_of_threads(text, tmp_path):
    before = torch.get_num_threads()
    assert run_rank(World(), [*SIZES, "--text", str(text), "--out", str(tmp_path), "--steps", "1"]) == 0
    assert torch.get_num_threads() == before
