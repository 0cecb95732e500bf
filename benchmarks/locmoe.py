"""Where tokens go when a router is asked to keep them on their node: LocMoE against Switch and Hash.

    python benchmarks/locmoe.py --out out/locmoe [--steps 250 --seeds 0,1,2 --mus 0,0.003,0.01,0.03,0.1,0.3]
                                [--arms "bias;domain"] [-- --text FOLDER --batch 16 ...]

Trains `moe-overlap train`'s model (options after `--` go to every run) on four ranks of two nodes: once with each
baseline, and once for each mu and each arm:

    bias           locality_bias, text alike on all nodes
    domain         text by domain, no bias
    bias,domain    both
    neither        the control: one router for all, text alike, where the loss has nothing to act on
    few            fewer experts than nodes: four nodes of one rank, and two of four experts masked, so that the last
                   two nodes have none; with locality_bias (inter_node_bytes_by_rank: what these send)

Writes OUT/rows.jsonl, one row for each run, at its end; runs that stand there already are not made again. With
--save-routing the routing of each run too, for `moe-overlap bench layer --routing`: rank by rank, so that ranks keep
their tokens where the benchmark's --tokens is the file's rows / 4. `locmoe_report.py` makes table and picture.

Keys beside the run's options: loss, held-out nats per token; and of 16 batches of the training text that were not
trained on: inter_node_bytes, what all ranks sent to other nodes in the MoE layers' forward (dispatch and combine), and
by rank; choices, how many were computed; max_over_mean, the busiest expert's load over the mean, before any capacity,
in the worst layer; local_share, of all choices that were computed those on the token's node, and by rank. Keys with
held_out: the same of the held-out text, which is a few whole files and therefore other text. train_max_over_mean: that
of the last quarter of the steps. The link is emulated and fast: it says what crosses nodes, and is no claim about time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_overlap import MoELayer, aux_loss
from moe_overlap.commands.train.domains import split_by_domain
from moe_overlap.commands.train.loop import evaluate, train
from moe_overlap.commands.train.model import LanguageModel, moe_layers
from moe_overlap.commands.train.options import TrainOptions, parse
from moe_overlap.commands.train.routing_file import save_routing
from moe_overlap.commands.train.text import Corpus, find_folders, load_corpus
from moe_overlap.launch.launch import World, run
from moe_overlap.layer.told import nodes_of_rank
from moe_overlap.measure.machine import commit, hardware

RANKS = 4
SETTING = ("--ranks", RANKS, "--ranks-per-node", 2, "--kind", "shared1", "--schedule", "serial", "--link", "25GB",
           "--lr", 0.01, "--experts", 8, "--hidden", 32, "--ffn", 64,
           "--layers", 2, "--vocab", 512, "--seq", 64, "--batch", 64, "--eval-tokens", 1000000,
           "--timeout-s", 600)  # fmt: skip
ARMS = {"bias": ["--locality-bias"], "domain": ["--text-by", "domain"],
        "bias,domain": ["--locality-bias", "--text-by", "domain"], "neither": [],
        "few": ["--locality-bias", "--ranks-per-node", 1, "--experts", 4]}  # fmt: skip
MASKED = {"few": (2, 3)}  # experts that are never chosen
BALANCED = ("--balance", "global", "--balance-coef", 0.5)
BASELINES = {"switch": ["--router", "switch", *BALANCED], "hash": ["--router", "hash"],
             "switch,domain": ["--router", "switch", *BALANCED, "--text-by", "domain"]}  # fmt: skip
FRESH_BATCHES = 16
PROGRAM = "locmoe.py"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    own, _, rest = " ".join(argv).partition(" -- ")
    parser = argparse.ArgumentParser(prog=PROGRAM)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--mus", default="0,0.003,0.01,0.03,0.1,0.3")
    parser.add_argument("--arms", default=";".join(ARMS), help="by ;")
    parser.add_argument("--save-routing", action="store_true")
    parsed = parser.parse_args(own.split())
    parsed.train = rest.split()
    return parsed


def runs(asked: argparse.Namespace) -> Iterator[tuple[str, TrainOptions]]:
    """(arm, options) of every run."""
    for seed in asked.seeds.split(","):
        common = [*SETTING, "--steps", asked.steps, "--seed", seed, "--out", asked.out, *asked.train]
        for arm, words in BASELINES.items():
            yield arm, _options(common, words)
        for mu in asked.mus.split(","):
            for arm in asked.arms.split(";"):
                yield arm, _options(common, ["--router", "locmoe", "--mu", mu, *BALANCED, *ARMS[arm]])


def _options(common: Sequence[object], words: Sequence[str]) -> TrainOptions:
    return parse([str(word) for word in (*common, *words)], ranks=RANKS)


def name_of(arm: str, options: TrainOptions) -> str:
    return f"{options.router}-{arm}-{options.mu:g}-{options.seed}"


def rank_main(world: World, argv: Sequence[str]) -> int:
    """Every rank: all runs that are not there yet."""
    asked = arguments(argv)
    torch.set_num_threads(1)
    path = Path(asked.out) / "rows.jsonl"
    done = {row["name"] for row in map(json.loads, path.read_text().splitlines())} if path.exists() else set()
    world.barrier()  # nobody writes before all have read
    for arm, options in runs(asked):
        name = name_of(arm, options)
        if name in done:
            continue
        row = one_run(world, arm, options, Path(asked.out) if asked.save_routing else None)
        if world.rank == 0:
            with path.open("a") as file:
                file.write(json.dumps({"name": name, **row}) + "\n")
            print(f"{name}: " + ", ".join(f"{key} {row[key]}" for key in RESULTS), flush=True)
    return 0


RESULTS = ("loss", "inter_node_bytes", "local_share", "max_over_mean", "held_out_max_over_mean", "train_max_over_mean")


def one_run(world: World, arm: str, options: TrainOptions, save_to: Path | None) -> dict[str, Any]:
    """Train, and measure on batches that were not trained on and on the held-out text; collective."""
    corpus = corpus_of(options, world)
    seen: list[Traffic] = []
    allowed = options.experts - len(MASKED.get(arm, ()))

    def adjust(model: LanguageModel) -> None:
        for layer in moe_layers(model):
            if arm in MASKED:
                layer.router.mask_experts(MASKED[arm])
        seen.append(Traffic(model, world, allowed))

    def late(event: dict[str, Any]) -> None:
        if event["step"] + 1 == options.steps * 3 // 4:
            seen[0].taken()

    trained = train(options, corpus, world, late, adjust=adjust)
    (traffic,) = seen
    last_quarter = traffic.taken()
    trained.model.eval()
    for step in range(options.steps, options.steps + FRESH_BATCHES):
        batch = corpus.batch(step, seed=options.seed, batch=options.batch, seq=options.seq, rank=world.rank,
                             ranks=world.size)  # fmt: skip
        with torch.no_grad():
            trained.model.cross_entropy(batch)
            aux_loss(trained.model)
    fresh = traffic.taken()
    held_out = evaluate(trained.model, options, corpus, world)
    then = traffic.taken()
    traffic.stop()
    if save_to is not None:
        save_routing(save_to / f"{name_of(arm, options)}.safetensors", trained.model, options, corpus, world)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(), "hardware": hardware(), "torch": torch.__version__, "threads": 1, "cores": os.cpu_count(),
        "arm": arm, "router": options.router, "mu": options.mu, "seed": options.seed, "steps": options.steps,
        "locality_bias": options.locality_bias, "text_by": options.text_by, "balance": options.balance,
        "balance_coef": options.coefficient, "lr": options.lr, "masked": MASKED.get(arm, ()),
        "ranks": options.ranks, "ranks_per_node": options.ranks_per_node, "kind": options.kind,
        "experts": options.experts, "top_k": options.top_k, "hidden": options.hidden, "layers": options.layers,
        "batch": options.batch, "seq": options.seq, "text": corpus.source, "text_key": corpus.key,
        "link": f"emulated {options.link}", "train_loss": trained.losses[-1], "loss": held_out.loss, **fresh,
        **{f"held_out_{key}": value for key, value in then.items()},
        "train_max_over_mean": last_quarter["max_over_mean"],
    }  # fmt: skip


def corpus_of(options: TrainOptions, world: World) -> Corpus:
    """As the command has it; the first rank fills the cache."""
    sizes = {"batch": options.batch, "seq": options.seq}
    if world.rank:
        world.barrier()
    corpus = load_corpus(options.text, options.out, vocab=options.vocab, **sizes)
    if not world.rank:
        world.barrier()
    if options.text_by == "domain":
        corpus = split_by_domain(corpus, find_folders(options.text), options.nodes, **sizes)
    return corpus


class Traffic:
    """Where the choices of all forward calls go, from now on until `stop`; recomputes there are none.

    allowed: how many experts may be chosen, over which the mean of a load is.
    """

    def __init__(self, model: LanguageModel, world: World, allowed: int) -> None:
        self.world, self.allowed, self.layers = world, allowed, moe_layers(model)
        self.counts_LE = torch.zeros(
            len(self.layers), self.layers[0].dispatcher.placement.num_experts, dtype=torch.int64
        )
        self.local = self.total = self.bytes_before = 0
        self._hooks = [self._watch(at, layer) for at, layer in enumerate(self.layers)]

    def _watch(self, at: int, layer: MoELayer) -> Any:
        near_E = nodes_of_rank(layer.dispatcher, layer.rows).near(torch.device("cpu"))[0]

        def count(router: nn.Module, args: Any, decision: Any) -> None:
            computed = decision.topk_ids_TK[decision.topk_ids_TK >= 0].long()
            self.local += int(near_E[computed].sum())
            self.total += computed.numel()
            self.counts_LE[at] += decision.tokens_per_expert_E

        return layer.router.register_forward_hook(count)

    def taken(self) -> dict[str, Any]:
        """What was counted since the last time, over all ranks; collective."""
        bytes_now = sum(layer.transport.stats.inter_node_bytes for layer in self.layers)
        own = torch.tensor([bytes_now - self.bytes_before, self.local, self.total])
        by_rank = torch.stack(self.world.gather(own))
        load_LE = self.world.sum_(self.counts_LE.clone()).double()
        self.bytes_before, self.local, self.total = bytes_now, 0, 0
        self.counts_LE.zero_()
        crossed, local, total = by_rank.sum(dim=0).tolist()
        return {
            "inter_node_bytes": crossed, "choices": total, "local_share": round(local / total, 4),
            "max_over_mean": round(float((load_LE.amax(dim=1) * self.allowed / load_LE.sum(dim=1)).max()), 4),
            "inter_node_bytes_by_rank": by_rank[:, 0].tolist(),
            "local_share_by_rank": [round(near / all_, 4) for _, near, all_ in by_rank.tolist()],
        }  # fmt: skip

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()


def main(argv: Sequence[str]) -> int:
    asked = arguments(argv)
    Path(asked.out).mkdir(parents=True, exist_ok=True)
    list(runs(asked))  # a bad option is said before anything starts
    return run(rank_main, list(argv), RANKS, timeout_s=600.0, program=PROGRAM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
