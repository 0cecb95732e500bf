"""The real job, at sizes where a step takes milliseconds.

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

from moe_overlap import cli, ignore_experts_for_ddp
from moe_overlap.errors import ConfigError
from moe_overlap.launch import World
from moe_overlap.train import command as train_command
from moe_overlap.train.checkpoint import MANIFEST, find_checkpoint
from moe_overlap.train.command import differences, main, run_rank
from moe_overlap.train.files import read_tensors, write_atomically, write_tensors
from moe_overlap.train.loop import DenseGradients, learning_rate
from moe_overlap.train.model import LanguageModel, initialise, moe_layers, split_parameters
from moe_overlap.train.options import KINDS, TrainOptions, parse
from moe_overlap.train.text import find_documents, load_corpus
from tests.ranks import gloo_pool

ROOT = Path(__file__).resolve().parent.parent
SIZES = (
    "--batch 4 --seq 32 --layers 2 --hidden 32 --ffn 48 --experts 4 --vocab 300 --eval-tokens 512 --threads 1".split()
)
SMALL = TrainOptions(
    batch=4, seq=32, layers=2, hidden=32, ffn=48, experts=4, vocab=300, eval_tokens=512, threads=1, ranks=1
)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """About 100 kB of real text: some of the standard library's own sources."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("argparse.py", "json/decoder.py", "heapq.py"):
        source = Path(os.__file__).parent / name
        (folder / source.name).write_bytes(source.read_bytes())
    return folder


def arguments(text, out, *options):
    return [*SIZES, "--text", str(text), "--out", str(out), *map(str, options)]


def run(text, out, *options):
    """Exit status of the command at the small sizes; it starts its ranks itself."""
    return main(arguments(text, out, *options))


def one_of_two_ranks(argv):
    return run_rank(World(rank=dist.get_rank(), size=2, local_rank=dist.get_rank(), group=dist.group.WORLD), argv)


def run_on_two(text, out, *options):
    """Exit statuses of the command's two ranks."""
    return gloo_pool(2).run(one_of_two_ranks, arguments(text, out, *options))


def events(out, kind):
    lines = (Path(out) / "train.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(out, overlap="on"):
    return [event["loss"] for event in events(out, "step") if event["overlap"] == overlap]


def corpus_of(text, out, options=SMALL):
    return load_corpus(str(text), str(out), vocab=options.vocab, batch=options.batch, seq=options.seq)


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


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="session")
def whole_run(text, tmp_path_factory):
    """20 steps more than its first checkpoint, two ranks."""
    out = tmp_path_factory.mktemp("whole")
    assert run_on_two(text, out, "--steps", 40, "--checkpoint-every", 20) == [0, 0]
    return out


def copy_of_checkpoint(whole_run, tmp_path):
    target = tmp_path / "checkpoint"
    target.mkdir()
    for file in (whole_run / "checkpoints" / "step-000020").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_resume_at_step_20_continues_bit_for_bit(text, whole_run, tmp_path):
    checkpoint = whole_run / "checkpoints" / "step-000020"
    options = ("--steps", 40, "--checkpoint-every", 20, "--resume", checkpoint)
    assert run_on_two(text, tmp_path, *options) == [0, 0]
    assert losses(tmp_path) == losses(whole_run)[20:]
    for rank in range(2):
        shard = f"checkpoints/step-000040/rank-{rank}.safetensors"
        assert (tmp_path / shard).read_bytes() == (whole_run / shard).read_bytes()
    for key in ("held_out_loss", "expert_load"):
        assert events(tmp_path, "end")[0][key] == events(whole_run, "end")[0][key]


def test_the_newest_complete_checkpoint_is_taken(text, whole_run, tmp_path):
    run_identity = json.loads((whole_run / "checkpoints/step-000040" / MANIFEST).read_text())["run"]
    folder = whole_run / "checkpoints"
    assert find_checkpoint(str(folder), run_identity).step == 40
    (folder / "step-000099").mkdir()  # a run that was ended while it wrote its shards
    assert find_checkpoint(str(folder), run_identity).step == 40
    (folder / "step-000099").rmdir()


def test_shards_hold_what_each_rank_owns(whole_run):
    shards = [read_tensors(whole_run / f"checkpoints/step-000020/rank-{rank}.safetensors")[0] for rank in range(2)]
    assert any(name.startswith("dense.") for name in shards[0])
    assert not any(name.startswith("dense.") for name in shards[1])
    experts = [name for name in shards[1] if name.endswith("gate_up_proj")]
    assert experts and all(shards[0][name].shape[0] == shards[1][name].shape[0] == 2 for name in experts)
    assert all({name, f"{name}/exp_avg", f"{name}/exp_avg_sq", f"{name}/step"} <= set(shards[1]) for name in experts)


def truncate(folder):
    file = folder / "rank-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def flip_a_bit(folder):
    data = bytearray((folder / "rank-0.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "rank-0.safetensors").write_bytes(bytes(data))


def remove_a_shard(folder):
    (folder / "rank-1.safetensors").unlink()


def truncate_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])


def remove_manifest(folder):
    (folder / MANIFEST).unlink()


def other_format(folder):
    (folder / MANIFEST).write_text('{"format": 99}')


def not_an_object(folder):
    (folder / MANIFEST).write_text("[]")


DAMAGES = [truncate, flip_a_bit, remove_a_shard, truncate_manifest, remove_manifest, other_format, not_an_object]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused(damage, text, whole_run, tmp_path):
    checkpoint = copy_of_checkpoint(whole_run, tmp_path)
    damage(checkpoint)
    with pytest.raises(ConfigError) as caught:
        run(text, tmp_path, "--ranks", 2, "--steps", 40, "--resume", checkpoint)
    assert caught.value.field == "--resume" and str(checkpoint) in caught.value.value


@pytest.mark.parametrize(
    ("option", "value"), [("--lr", 0.001), ("--steps", 50), ("--ranks", 1), ("--seed", 1), ("--kind", "top2")]
)
def test_a_checkpoint_of_another_run_is_refused(option, value, text, whole_run, tmp_path):
    options = {"--ranks": 2, "--steps": 40, "--resume": whole_run / "checkpoints", option: value}
    with pytest.raises(ConfigError) as caught:
        run(text, tmp_path, *(word for pair in options.items() for word in pair))
    assert (caught.value.field, caught.value.value) == (option, value)


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [child.name for child in path.parent.iterdir()] == ["file"]


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
    ignore_experts_for_ddp(model)
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "nothing/here"], ["--text", "nothing/here", "text file"]),
        (["--steps", "0"], ["--steps", "0", "at least 1"]),
        (["--steps", "many"], ["--steps", "many", "int"]),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(options, words, tmp_path, capsys):
    try:
        status = cli.main(["train", "--out", str(tmp_path / "out"), *options])
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kind": "top3"}, "--kind"),
        ({"layers": 3}, "--layers"),
        ({"batch": 3, "ranks": 2}, "--batch"),
        ({"experts": 3, "batch": 8, "ranks": 2}, "--experts"),
        ({"experts": 1, "ranks": 1}, "--experts"),
        ({"hidden": 96}, "--hidden"),
        ({"hidden": 31}, "--hidden"),
        ({"lr": float("nan")}, "--lr"),
        ({"vocab": 100}, "--vocab"),
        ({"overlap": "maybe"}, "--overlap"),
        ({"schedule": "serial"}, "--schedule"),
        ({"kind": "top2", "schedule": "chunked(17)"}, "--schedule"),
        ({"kind": "top2", "schedule": "shared_expert"}, "--schedule"),
        ({"kind": "top2", "schedule": "auto"}, "--schedule"),
        ({"kind": "top2", "slot": 1}, "--slot"),
        ({"kind": "top2", "chunks": 2}, "--chunks"),
        ({"slot": 4}, "--slot"),
        ({"chunks": 17}, "--chunks"),
        ({"link": "fast"}, "--link"),
        ({"link": "1gbit", "ranks": 1}, "--link"),
        ({"compare_overlap": True, "resume": "x"}, "--compare-overlap"),
    ],
)
def test_bad_options_name_the_option(options, field):
    with pytest.raises(ConfigError) as caught:
        TrainOptions(**options)
    assert caught.value.field == field and caught.value.expected


def test_options_round_trip_through_the_command_line():
    options = parse(["--kind", "top2", "--schedule", "chunked(4)", "--lr", "0.001", "--compare-overlap"])
    assert options == TrainOptions(kind="top2", schedule="chunked(4)", lr=0.001, compare_overlap=True)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("make", ["missing", "empty_folder", "binary", "too_short"])
def test_bad_text_is_refused(make, tmp_path):
    path = tmp_path / "text.txt"
    if make == "empty_folder":
        path.mkdir()
        (path / "picture.png").write_bytes(b"png")
    elif make == "binary":
        path.write_bytes(b"a\0b" * 1000)
    elif make == "too_short":
        path.write_text("too short")
    with pytest.raises(ConfigError) as caught:
        corpus_of(path, tmp_path / "out")
    assert (caught.value.field, caught.value.value) == ("--text", str(path))


def test_the_default_text_is_there():
    documents, source = find_documents(None)
    assert sum(map(len, documents)) > 5_000_000 and source


def test_tokens_depend_on_contents_only_and_are_cached(text, tmp_path):
    first = corpus_of(text, tmp_path / "a")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, file in enumerate(sorted(text.iterdir())):
        (renamed / f"{9 - number}.txt").write_bytes(file.read_bytes())
    second = corpus_of(renamed, tmp_path / "b")
    assert first.key == second.key and torch.equal(first.train, second.train)
    (tokenizer_a,) = (tmp_path / "a").glob("tokenizer-*.json")
    (tokenizer_b,) = (tmp_path / "b").glob("tokenizer-*.json")
    assert tokenizer_a.read_bytes() == tokenizer_b.read_bytes()
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}
    corpus_of(text, tmp_path / "a")
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}
    (cached,) = (tmp_path / "a").glob("tokens-*")
    cached.write_bytes(cached.read_bytes()[:100])
    assert torch.equal(corpus_of(text, tmp_path / "a").train, first.train), "a damaged cache is made again"


def test_tokens_decode_to_the_text(tmp_path):
    from tokenizers import Tokenizer

    document = "naïve <|endoftext|> ünïcode\n" * 800
    (tmp_path / "text.txt").write_text(document, encoding="utf-8")
    corpus = corpus_of(tmp_path / "text.txt", tmp_path / "out")
    (file,) = (tmp_path / "out").glob("tokenizer-*.json")
    tokenizer = Tokenizer.from_file(str(file))
    stream = torch.cat([corpus.train, corpus.held_out]).tolist()
    end = tokenizer.token_to_id("<|endoftext|>")
    assert stream.count(end) == 1 and stream[-1] == end, "the marker inside the text is plain text"
    assert tokenizer.decode(stream[:-1], skip_special_tokens=False) == document


def test_ranks_share_out_the_batch_and_the_held_out_text(text, tmp_path):
    corpus = corpus_of(text, tmp_path)
    whole = corpus.batch(7, seed=3, batch=4, seq=32, rank=0, ranks=1)
    parts = [corpus.batch(7, seed=3, batch=4, seq=32, rank=rank, ranks=2) for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole) and whole.shape == (4, 33)
    assert not torch.equal(whole, corpus.batch(8, seed=3, batch=4, seq=32, rank=0, ranks=1))
    assert not torch.equal(whole, corpus.batch(7, seed=4, batch=4, seq=32, rank=0, ranks=1))
    held_out = corpus.held_out_batches(tokens=512, batch=4, seq=32, rank=0, ranks=1)
    assert torch.equal(torch.cat(held_out)[:, :-1].flatten(), corpus.held_out[:512].long())


def test_unigram_entropy_is_that_of_the_targets(text, tmp_path):
    corpus = corpus_of(text, tmp_path)
    targets = corpus.held_out[1:513].tolist()
    shares = torch.tensor([targets.count(token) / 512 for token in set(targets)], dtype=torch.float64)
    expected = -(shares * shares.log()).sum().item()
    assert corpus.unigram_entropy(tokens=512, batch=4, seq=32) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- model, schedule, routing file


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_causal_and_positions_matter(kind):
    options = TrainOptions(**(vars(SMALL) | {"kind": kind}))
    model = LanguageModel(options, None)
    initialise(model, seed=0, rank=0)
    tokens = torch.randint(0, 300, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 300
    with torch.no_grad():
        a, b = model(tokens), model(changed)
        same = model(torch.zeros(1, 32, dtype=torch.int64))
    torch.testing.assert_close(a[0, :20], b[0, :20], rtol=1e-4, atol=1e-5)
    assert (a[0, 20:] - b[0, 20:]).abs().max() > 1e-3
    assert same.shape == (1, 32, 300)
    assert len(moe_layers(model)) == options.layers // 2


def test_initial_values_do_not_depend_on_the_number_of_ranks():
    def weights(rank):
        model = LanguageModel(SMALL, None)
        initialise(model, seed=5, rank=rank)
        return split_parameters(model)

    (dense_a, experts_a), (dense_b, experts_b) = weights(0), weights(1)
    assert all(torch.equal(dense_a[name], dense_b[name]) for name in dense_a)
    assert not any(torch.equal(experts_a[name], experts_b[name]) for name in experts_a)


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    options = TrainOptions(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize("ranks", [1, 2])
def test_saved_routing_holds_the_best_experts_in_order(ranks, text, tmp_path):
    file = tmp_path / "routing.safetensors"
    options = ("--steps", 2, "--save-routing", file)
    if ranks == 1:
        assert run(text, tmp_path, "--ranks", 1, *options) == 0
    else:
        assert run_on_two(text, tmp_path, *options) == [0, 0]
    tensors, metadata = read_tensors(file)
    ids, weights = tensors["ids"], tensors["weights"]
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert ids.shape == weights.shape == (512, 2) and metadata["E"] == "4"
    assert (weights[:, 0] >= weights[:, 1]).all() and (ids[:, 0] != ids[:, 1]).all()
    assert ((ids >= 0) & (ids < 4)).all()
    load = torch.bincount(ids[:, 0].long(), minlength=4).tolist()
    assert load == events(tmp_path, "end")[0]["expert_load"][-1], "the first choice is where the tokens went"


def test_run_rank_alone_leaves_the_number_of_threads(text, tmp_path):
    before = torch.get_num_threads()
    assert run_rank(World(), [*SIZES, "--text", str(text), "--out", str(tmp_path), "--steps", "1"]) == 0
    assert torch.get_num_threads() == before
