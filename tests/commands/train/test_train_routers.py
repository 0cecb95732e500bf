"""`train --router`: every router learns, in equal bits with overlap and without; and text by domain."""

import os
from pathlib import Path

import pytest
import torch

from moe_overlap.commands.train.domains import split_by_domain
from moe_overlap.commands.train.files import read_tensors
from moe_overlap.commands.train.model import LanguageModel, initialise
from moe_overlap.commands.train.options import ROUTERS, TrainOptions
from moe_overlap.commands.train.text import Corpus, find_folders
from moe_overlap.errors import ConfigError
from tests.commands.train.jobs import SMALL, corpus_of, events, losses, run_on_two


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Text in two folders: some sources of the standard library, and words that never stand there."""
    root = tmp_path_factory.mktemp("folders")
    for folder in ("a", "b", "b/c"):
        (root / folder).mkdir()
    source = (Path(os.__file__).parent / "argparse.py").read_text()
    (root / "a" / "argparse.py").write_text(source[:50_000])
    (root / "a" / "more.py").write_text(source[50_000:])
    (root / "b" / "one.txt").write_text("QQQ ZZZ\n" * 6000)
    (root / "b" / "c" / "two.txt").write_text("ZZZ QQQ XX\n" * 6000)
    return root


@pytest.mark.parametrize("kind", ["top2", "shared1"])
@pytest.mark.parametrize("router", ROUTERS[1:])
def test_it_learns_in_equal_bits_with_overlap_and_without(router, kind, text, tmp_path):
    extra = ("--mu", 0.1, "--locality-bias") if router.startswith("locmoe") else ()
    if router == "smile" and kind == "shared1":
        extra = ("--balance", "global")
    options = ("--steps", 20, "--warmup", 2, "--kind", kind, "--router", router, "--compare-overlap", *extra)
    assert run_on_two(text, tmp_path, *options) == [0, 0]
    assert losses(tmp_path, "off") == losses(tmp_path, "on")
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3
    assert events(tmp_path, "start")[0]["router"] == router


@pytest.mark.parametrize("router", ROUTERS)
def test_its_routing_can_be_saved(router, text, tmp_path):
    file = tmp_path / "routing.safetensors"
    options = ("--kind", "shared1", "--steps", 1, "--router", router, "--save-routing", file)
    assert run_on_two(text, tmp_path, *options) == [0, 0]
    ids = read_tensors(file)[0]["ids"]
    assert ids.shape == (512, 2)
    load = torch.bincount(ids[:, 0].long(), minlength=4)
    (end,) = events(tmp_path, "end")
    computed = torch.tensor(end["expert_load"][-1])
    assert (computed <= load).all() and (router in ("switch", "locmoe+") or torch.equal(computed, load))


def test_a_hash_router_is_told_the_tokens_of_every_forward():
    model = LanguageModel(TrainOptions(**(vars(SMALL) | {"router": "hash"})), None)
    tokens = torch.randint(0, SMALL.vocab, (2, 8))
    model(tokens)
    (router,) = (module for module in model.modules() if type(module).__name__ == "HashRouter")
    assert torch.equal(router._token_ids, tokens.flatten())


def test_a_locality_bias_starts_at_zero():
    options = vars(SMALL) | {"router": "locmoe", "locality_bias": True}
    model = LanguageModel(TrainOptions(**options), None)
    initialise(model, seed=0, rank=0)
    named = dict(model.named_parameters())
    (name,) = (name for name in named if "locality_bias" in name)
    assert (named[name] == 0).all() and named[name.replace("locality_bias.", "")].abs().max() > 0


def test_each_node_draws_from_its_own_folders(folders, tmp_path):
    corpus = corpus_of(folders, tmp_path)
    split = split_by_domain(corpus, find_folders(str(folders)), 2, batch=4, seq=32)
    assert len(split.train) + len(split.held_out) == len(corpus.train) + len(corpus.held_out)
    alphabets = [set(node.train.tolist()) for node in split.nodes]
    for rank in range(4):
        drawn = split.batch(3, seed=0, batch=8, seq=32, rank=rank, ranks=4)
        held = torch.cat(split.held_out_batches(tokens=512, batch=8, seq=32, rank=rank, ranks=4))
        assert drawn.shape == (2, 33) and held.shape[1] == 33
        assert set(drawn.flatten().tolist()) <= alphabets[rank // 2]
    assert len(alphabets[0] & alphabets[1]) < 0.5 * min(map(len, alphabets))
    assert not torch.equal(*(split.batch(3, seed=0, batch=8, seq=32, rank=rank, ranks=4) for rank in (0, 1)))


def test_the_held_out_text_of_all_ranks_is_that_of_one():
    stream = torch.arange(2000, dtype=torch.int32) % 7 + 1
    stream[99::100] = 0
    corpus = Corpus(train=stream[:1900], held_out=stream[1900:], vocab=8, key="", source="")
    split = split_by_domain(corpus, [f"{i // 10}" for i in range(20)], 2, batch=4, seq=8)
    one = torch.cat(split.held_out_batches(tokens=64, batch=4, seq=8, rank=0, ranks=1))
    four = torch.cat([
        torch.cat(split.held_out_batches(tokens=64, batch=4, seq=8, rank=rank, ranks=4)) for rank in range(4)
    ])  # fmt: skip
    assert sorted(map(tuple, one.tolist())) == sorted(map(tuple, four.tolist()))


def test_training_on_text_by_domain(folders, tmp_path):
    options = ("--steps", 3, "--router", "locmoe", "--mu", 0.1, "--text-by", "domain", "--balance", "global")
    assert run_on_two(folders, tmp_path, *options) == [0, 0]
    assert len(losses(tmp_path)) == 3


def test_too_little_text_for_a_node_is_refused(text, tmp_path):
    """All in one folder: the second node has what lies behind the middle, one document or none."""
    with pytest.raises(ConfigError) as caught:
        split_by_domain(corpus_of(text, tmp_path), find_folders(str(text)), 4, batch=64, seq=128)
    assert caught.value.field == "--text-by"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"router": "nearest"}, "--router"),
        ({"mu": 0.1}, "--mu"),
        ({"mu": -0.1, "router": "locmoe"}, "--mu"),
        ({"mu": float("nan"), "router": "locmoe"}, "--mu"),
        ({"locality_bias": True, "router": "switch"}, "--locality-bias"),
        ({"ranks_per_node": 3, "ranks": 4}, "--ranks-per-node"),
        ({"ranks_per_node": 0}, "--ranks-per-node"),
        ({"text_by": "author"}, "--text-by"),
        ({"text_by": "domain", "ranks_per_node": 2}, "--text-by"),
        ({"router": "hash", "balance_coef": 0.1}, "--balance-coef"),
        ({"router": "smile", "kind": "top2", "experts": 2}, "--experts"),
        ({"router": "hash", "balance": "global"}, "--balance"),
        ({"router": "smile", "balance": "sequence"}, "--balance"),
    ],
)
def test_bad_options_name_the_option(options, field):
    with pytest.raises(ConfigError) as caught:
        TrainOptions(**options)
    assert caught.value.field == field and caught.value.expected
