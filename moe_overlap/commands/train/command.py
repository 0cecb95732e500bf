"""`moe-overlap train`: from the command line to a finished run on one or several ranks."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moe_overlap import config
from moe_overlap.commands.parser import check_folder, check_output
from moe_overlap.commands.train.checkpoint import CHECKPOINTS, find_checkpoint, find_folder, identity
from moe_overlap.commands.train.domains import split_by_domain
from moe_overlap.commands.train.loop import Trained, evaluate, train
from moe_overlap.commands.train.model import moe_layers, split_parameters
from moe_overlap.commands.train.options import IDENTITY, TrainOptions, parse
from moe_overlap.commands.train.placing import left_behind
from moe_overlap.commands.train.report import RunLog
from moe_overlap.commands.train.routing_file import save_routing
from moe_overlap.commands.train.sample import sample
from moe_overlap.commands.train.text import Corpus, find_folders, load_corpus
from moe_overlap.errors import ConfigError, MoeTransportError
from moe_overlap.launch.launch import World, run, torchrun_world_size
from moe_overlap.launch.saying import EXIT_INTERRUPTED, one_line
from moe_overlap.measure.machine import commit, hardware

LOG_NAME = "train.jsonl"
EXIT_DIFFERENT, EXIT_BAD_INPUT = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-overlap train` with these arguments and return its exit status.

    0: done. 1: --compare-overlap found a difference, or a rank failed. 130: interrupted, and a checkpoint was saved.
    ConfigError for bad input (exit 2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    torchrun = torchrun_world_size()
    options = parse(words, ranks=torchrun)
    if not config.torchrun("RANK"):  # rank 0 alone writes
        _check_outputs(options)
    if options.resume is not None:
        find_folder(options.resume)  # before a tokenizer is trained
    if torchrun is None:  # before any rank is started
        corpus = _corpus(options)
        if options.resume is not None:
            find_checkpoint(options.resume, identity(options, corpus))
    return run(run_rank, words, options.ranks, timeout_s=options.timeout_s, program="moe-overlap train", saves=True)


def _check_outputs(options: TrainOptions) -> None:
    """Refuse, before the work, what could not be written at its end."""
    folder = check_folder("--out", options.out, (LOG_NAME,))
    if options.checkpoint_every:
        check_folder("--out", str(folder / CHECKPOINTS), (LOG_NAME,))
    if options.save_routing is not None:
        check_output("--save-routing", options.save_routing)


def run_rank(world: World, argv: Sequence[str]) -> int:
    """What every rank does. Errors a user can act on become one line on stderr and an exit status."""
    options = parse(argv, ranks=world.size)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads_per_rank)
    try:
        # The first rank of a machine trains the tokenizer and fills the cache; the others read it.
        corpus = _corpus(options) if world.local_rank == 0 else None
        world.barrier()
        return _run(options, corpus or _corpus(options), world)
    except ConfigError as error:
        if world.size == 1:
            raise
        print(f"moe-overlap train: error: rank {world.rank}: {one_line(str(error))}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    except MoeTransportError as error:
        print(f"moe-overlap train: error: rank {world.rank}: {one_line(str(error))}", file=sys.stderr, flush=True)
        return EXIT_DIFFERENT
    finally:
        torch.set_num_threads(threads_before)


def _corpus(options: TrainOptions) -> Corpus:
    sizes = {"batch": options.batch, "seq": options.seq}
    corpus = load_corpus(options.text, options.out, vocab=options.vocab, **sizes)
    if options.text_by == "domain":
        return split_by_domain(corpus, find_folders(options.text), options.nodes, **sizes)
    return corpus


def _run(options: TrainOptions, corpus: Corpus, world: World) -> int:
    checkpoint = None
    if options.resume is not None:
        checkpoint = find_checkpoint(options.resume, identity(options, corpus))
    first = checkpoint.step if checkpoint else 0
    path = Path(options.out) / LOG_NAME
    with RunLog(path, active=world.rank == 0, append=checkpoint is not None, steps=options.steps) as log:
        log.write(_start_event(options, corpus, first))
        if options.compare_overlap:
            return _compare(options, corpus, world, log)
        if checkpoint is not None:
            log.say(f"resuming {checkpoint.folder}: step {first} of {options.steps}, on {world.size} rank(s); it was "
                    f"saved on {len(checkpoint.files)}{left_behind(checkpoint.placements, options)}")  # fmt: skip
        log.begin_bar(f"{options.kind}, overlap {options.overlap}", first)
        trained = train(options, corpus, world, log.step, checkpoint=checkpoint)
        log.end_bar()
        if trained.stopped_in is not None:
            log.write({"event": "interrupted", "step": first + len(trained.losses)})
            done = first + len(trained.losses)
            log.say(f"moe-overlap train: interrupted after step {done} of {options.steps}; go on "
                    f"with the same options and --resume {options.out}")  # fmt: skip
            return EXIT_INTERRUPTED
        _finish(trained, options, corpus, world, log)
    return 0


def _compare(options: TrainOptions, corpus: Corpus, world: World, log: RunLog) -> int:
    """The same run with overlap off and on: exit status 0 when losses and parameters are equal bit for bit."""
    runs: dict[str, Trained] = {}
    for overlap in ("off", "on"):
        log.begin_bar(f"{options.kind}, overlap {overlap}", 0)
        chosen = replace(options, overlap=overlap)
        runs[overlap] = train(chosen, corpus, world, log.step)
        log.end_bar()
    steps, names = differences(runs["off"], runs["on"])
    counts = world.gather(torch.tensor([len(steps), len(names)]))
    equal = not any(int(count.sum()) for count in counts)
    speeds = {overlap: round(run.tokens_per_s, 1) for overlap, run in runs.items()}
    log.write({"event": "compare", "bit_equal": equal, "steps": options.steps, "tokens_per_s": speeds})
    _finish(runs["on"], options, corpus, world, log)
    if equal:
        log.say(f"overlap off = on bit for bit: {options.steps} losses and all parameters on {world.size} rank(s)")
        return 0
    if steps or names:
        print(
            f"moe-overlap train: rank {world.rank}: overlap off and on differ: losses first at step "
            f"{steps[0] if steps else 'none'}; parameters: {', '.join(names) or 'none'}",
            file=sys.stderr,
            flush=True,
        )
    return EXIT_DIFFERENT


def differences(a: Trained, b: Trained) -> tuple[list[int], list[str]]:
    """(steps whose losses differ, names of parameters that differ), bit for bit, on this rank."""
    steps = [
        step
        for step, (x, y) in enumerate(zip(a.losses, b.losses, strict=True))
        if struct.pack("d", x) != struct.pack("d", y)
    ]
    other = dict(b.model.named_parameters())
    names = [
        name
        for name, value in a.model.named_parameters()
        if not torch.equal(value.detach().view(torch.uint8), other[name].detach().view(torch.uint8))
    ]
    return steps, names


def _start_event(options: TrainOptions, corpus: Corpus, first: int) -> dict[str, Any]:
    return {
        "event": "resume" if first else "start",
        "step": first,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "commit": commit(),
        "hardware": hardware(),
        "threads": options.threads_per_rank,
        "overlap": options.overlap,
        "link": "none" if options.link == "none" else f"emulated {options.link}",
        **{name: getattr(options, name) for name in (*IDENTITY, "placement")},
        "text": corpus.source if options.text is None else Path(options.text).name,
        "text_key": corpus.key,
        "text_tokens": len(corpus.train) + len(corpus.held_out),
    }


def _finish(trained: Trained, options: TrainOptions, corpus: Corpus, world: World, log: RunLog) -> None:
    """The schedules of the last step, the held-out result, in the log and on stderr, and the routing file if asked."""
    ran = [layer.stats().schedule for layer in moe_layers(trained.model)] if trained.losses else []
    log.write({"event": "schedules", "forward": ran})
    if options.schedule == "auto":
        log.say(f"auto chose, forward: {'; '.join(dict.fromkeys(ran)) or 'nothing, as no step was left'}")
    if options.sample:
        text = sample(trained.model, options, corpus)
        if world.rank == 0:
            print(text, flush=True)
    if options.save_routing is not None:
        save_routing(Path(options.save_routing), trained.model, options, corpus, world)
    dense, expert = split_parameters(trained.model)
    held_out = evaluate(trained.model, options, corpus, world)
    gain = held_out.unigram_entropy - held_out.loss
    versus = f"{abs(gain):.3f} {'below' if gain >= 0 else 'above'}"
    log.write(
        {
            "event": "end",
            "held_out_loss": held_out.loss,
            "unigram_entropy": held_out.unigram_entropy,
            "nats_below_unigram": gain,
            "tokens_per_s": round(trained.tokens_per_s, 1),
            "expert_load": held_out.expert_load,
            "dense_parameters": sum(p.numel() for p in dense.values()),
            "expert_parameters_per_rank": sum(p.numel() for p in expert.values()),
        }
    )
    log.say(
        f"held-out loss {held_out.loss:.3f} nats/token, {versus} the unigram entropy "
        f"{held_out.unigram_entropy:.3f}; {trained.tokens_per_s:,.0f} tokens/s"
    )
