"""The command line of `bench layer`: defaults, refusals in one line, and the routing files it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_overlap import MoELayer
from moe_overlap.commands.bench.options import LayerOptions, parse
from moe_overlap.commands.bench.routing import ForcedRouter, load, read_file
from moe_overlap.commands.cli import main
from moe_overlap.errors import ConfigError
from tests.ranks import virtual_world


def test_defaults_are_those_of_the_readme():
    options = parse([])
    assert options == LayerOptions()
    assert (options.ranks, options.ranks_per_node, options.threads, options.tokens) == (2, 1, 1, 1024)
    assert (options.hidden, options.ffn, options.experts, options.top_k, options.dtype) == (512, 2048, 8, 2, "bf16")
    assert (options.link, options.comm_share, options.phases) == ("none", None, ("infer", "train"))
    assert (options.routing, options.compute, options.repeats, options.out) == ("balanced", "real", 20, "out/bench")


def test_schedules_and_cases_that_nobody_asked_for_need_no_row():
    assert parse(["--schedules", "chunked"]).cases == LayerOptions.cases
    assert parse(["--schedules", "shortcut,shared_expert"]).cases == LayerOptions.cases
    assert parse(["--cases", "top2"]).schedules == LayerOptions.schedules
    assert parse(["--cases", "scmoe_pos3", "--schedules", "auto"]).schedules == ("auto",)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--ranks 0", "--ranks"),
        ("--ranks-per-node 3", "--ranks-per-node"),
        ("--threads 0", "--threads"),
        ("--tokens -1", "--tokens"),
        ("--hidden 100", "--hidden"),
        ("--ffn 0", "--ffn"),
        ("--experts 7", "--experts"),
        ("--top-k 1", "--top-k"),
        ("--top-k 9", "--top-k"),
        ("--dtype fp8", "--dtype"),
        ("--link 12furlong", "--link"),
        ("--link 400mbit:50lightyears", "--link"),
        ("--comm-share 1.5", "--comm-share"),
        ("--comm-share nan", "--comm-share"),
        ("--comm-share 0.5 --link 1gbit", "--comm-share"),
        ("--comm-share 0.5 --ranks-per-node 2", "--comm-share"),
        ("--schedules serial,wishful", "--schedules"),
        ("--ranks 1 --link 1gbit", "--link"),
        ("--link 1gbit --ranks-per-node 2", "--link"),
        ("--cases top2,scmoe_pos2 --schedules chunked", "--cases"),
        ("--cases top2 --schedules serial,shortcut", "--schedules"),
        ("--cases scmoe_pos1 --schedules serial,shared_expert", "--schedules"),
        ("--dedup on --schedules serial,fastermoe", "--schedules"),
        ("--experts 2 --schedules serial,expert_groups", "--schedules"),
        ("--phases decode", "--phases"),
        ("--cases top3", "--cases"),
        ("--routing no/such/file", "--routing"),
        ("--compute dreamt", "--compute"),
        ("--dedup sometimes", "--dedup"),
        ("--ranks 1 --dedup on", "--dedup"),
        ("--ranks 4 --dedup hierarchical", "--dedup"),
        ("--ranks 4 --ranks-per-node 4 --dedup hierarchical", "--dedup"),
        ("--repeats 0", "--repeats"),
        ("--repeats many", "--repeats"),
        ("--speed 11", "--speed"),
    ],
)
def test_bad_input_is_one_line_naming_the_option_and_exit_2(words, option, capsys, tmp_path):
    try:
        status = main(["bench", "layer", "--out", str(tmp_path), *words.split()])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr().err
    assert status == 2
    assert len(said.strip().splitlines()) == 1 and option in said and words.split()[-1] in said, said


@pytest.mark.parametrize("words", ["ops --ops softmax", "overlap --ranks 1", "layer --repeats 0", "balance --ranks 0"])
def test_bad_input_names_the_benchmark(words, capsys):
    assert main(["bench", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"moe-overlap bench {words.split()[0]}: error: {words.split()[1]}")


def test_a_missing_benchmark_is_exit_2(capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench"])
    assert error.value.code == 2 and "layer" in capsys.readouterr().err


def routing_file(path, ids, weights, **metadata):
    tensors = {"ids": ids, "weights": weights}
    save_file(tensors, str(path), metadata={key: str(value) for key, value in metadata.items()})
    return str(path)


def test_a_routing_file_is_repeated_over_the_ranks_and_narrowed(tmp_path):
    ids = torch.tensor([[0, 1, 2], [3, 2, 1], [1, 0, 3]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1]])
    path = routing_file(tmp_path / "routing.safetensors", ids, weights, E=4)
    common = {"out": str(tmp_path), "tokens": 2, "experts": 4, "top_k": 2}
    for rank, rows in ((0, [0, 1]), (1, [2, 0]), (2, [1, 2])):
        for routing in ("real", path):
            got_ids, got_weights = load(routing, rank=rank, ranks=3, **common)
            assert torch.equal(got_ids, ids[rows, :2]) and torch.equal(got_weights, weights[rows, :2])


def test_a_file_that_says_whose_tokens_are_whose_gives_each_rank_its_own(tmp_path):
    ids = torch.arange(5, dtype=torch.int32)[:, None].repeat(1, 2) % 4
    weights = torch.ones(5, 2)
    path = routing_file(tmp_path / "r", ids, weights, E=4, rank_tokens="[2, 3]", router="locmoe", mu=0.1)
    common = {"out": "", "tokens": 4, "experts": 4, "top_k": 1}
    for ranks, rank, rows in ((2, 0, [0, 1, 0, 1]), (2, 1, [2, 3, 4, 2]), (4, 1, [4, 0, 1, 2])):
        got_ids, _ = load(path, rank=rank, ranks=ranks, **common)
        assert torch.equal(got_ids, ids[rows, :1])
    read = read_file(Path(path), experts=4, top_k=1)
    assert (read.router, read.mu) == ("locmoe", 0.1)
    for said in ("[2, 2]", "[6, -1]", "3", "[", '["a"]', "[]", "[Infinity]", "[4, true]", "[2.5, 3]", '"23"'):
        path = routing_file(tmp_path / "r", ids, weights, E=4, rank_tokens=said)
        read = read_file(Path(path), experts=4, top_k=1)
        assert (read.rank_tokens, read.router, read.mu) == (None, None, None)
    path = routing_file(tmp_path / "r", ids, weights, E=4, mu="nan")
    with pytest.raises(ConfigError, match="finite number for mu"):
        read_file(Path(path), experts=4, top_k=1)


@pytest.mark.parametrize(
    ("ids", "weights", "metadata", "expected"),
    [
        ([[0, 1]], [[0.5, 0.5]], {"E": 8}, "E = '8'"),
        ([[0, 1]], [[0.5, 0.5]], {}, "E = None"),
        ([[0]], [[0.5]], {"E": 4}, "top-k"),
        ([[0, 4]], [[0.5, 0.5]], {"E": 4}, "ids from -1 to 3"),
        ([[0, 1]], [[0.5, float("inf")]], {"E": 4}, "finite"),
    ],
)
def test_routing_files_that_do_not_fit_are_refused(tmp_path, ids, weights, metadata, expected):
    path = routing_file(tmp_path / "r", torch.tensor(ids, dtype=torch.int32), torch.tensor(weights), **metadata)
    with pytest.raises(ConfigError) as error:
        load(path, out=".", tokens=4, experts=4, top_k=2, rank=0, ranks=4)
    assert error.value.field == "--routing" and expected in str(error.value)


def test_a_truncated_routing_file_is_refused(tmp_path):
    path = tmp_path / "r"
    path.write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ConfigError) as error:
        load(str(path), out=".", tokens=4, experts=4, top_k=2, rank=0, ranks=4)
    assert error.value.field == "--routing"


@pytest.mark.parametrize("routing", ["balanced", "uniform", "zipf"])
def test_drawn_routing_is_distinct_and_the_same_every_time(routing):
    ids, weights = load(routing, out=".", tokens=512, experts=8, top_k=2, rank=1, ranks=4)
    again, _ = load(routing, out=".", tokens=512, experts=8, top_k=2, rank=1, ranks=4)
    assert torch.equal(ids, again) and bool((ids[:, 0] != ids[:, 1]).all())
    counts = torch.bincount(ids.flatten().long(), minlength=8)
    assert torch.allclose(weights.sum(dim=1), torch.ones(512))
    if routing == "balanced":
        assert int(counts.max()) == int(counts.min())
    elif routing == "uniform":
        assert torch.allclose(counts.double(), torch.full((8,), 128.0, dtype=torch.float64), rtol=0.25)
    else:
        assert int(counts[0]) > 2 * int(counts[7])


def test_the_forced_router_says_what_it_was_told():
    ids, weights = load("balanced", out=".", tokens=8, experts=4, top_k=2, rank=0, ranks=4)
    decision = ForcedRouter(ids, weights, 4)(torch.randn(8, 16))
    assert torch.equal(decision.topk_ids_TK, ids) and torch.equal(decision.topk_weights_TK, weights)
    assert decision.topk_weights_TK.requires_grad and decision.tokens_per_expert_E.tolist() == [4, 4, 4, 4]


def test_ranks_may_be_told_other_weights():
    """Those of a saved routing: they are of a rank's tokens, and no weights that all ranks have alike."""

    def rank(me):
        ids_TK, weights_TK = torch.zeros(3, 1, dtype=torch.int32), torch.full((3, 1), 0.25 + me.rank)
        layer = MoELayer(8, 8, 4, 1, transport=me.transport(), router=ForcedRouter(ids_TK, weights_TK, 4))
        return [layer(torch.ones(3, 8)).sum().item() for _ in range(2)]

    first, second = virtual_world(2).run(rank)
    assert second == pytest.approx([5 * one for one in first]) and first[0] != 0.0


def test_auto_needs_something_to_exchange():
    with pytest.raises(ConfigError, match="nothing is exchanged"):
        parse(["--ranks", "1", "--schedules", "serial,auto"])
