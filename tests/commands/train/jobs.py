"""The real job at sizes where a step takes milliseconds, as the tests start it and read what it wrote."""

import json
from pathlib import Path

import torch.distributed as dist

from moe_overlap.commands.train.command import main, run_rank
from moe_overlap.commands.train.options import TrainOptions
from moe_overlap.commands.train.text import load_corpus
from moe_overlap.launch.launch import World
from tests.ranks import gloo_pool

SIZES = (
    "--batch 4 --seq 32 --layers 2 --hidden 32 --ffn 48 --experts 4 --vocab 300 --eval-tokens 512 --threads 1".split()
)
SMALL = TrainOptions(
    batch=4, seq=32, layers=2, hidden=32, ffn=48, experts=4, vocab=300, eval_tokens=512, threads=1, ranks=1
)


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
