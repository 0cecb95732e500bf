"""The training loop of one rank: data-parallel over batches, expert-parallel in the MoE layers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from moe_overlap import LossFreeBalancer, aux_loss, prepare
from moe_overlap.commands.train.checkpoint import CHECKPOINTS, Checkpoint, identity, load_checkpoint, save_checkpoint
from moe_overlap.commands.train.model import LanguageModel, decay_groups, initialise, moe_layers, split_parameters
from moe_overlap.commands.train.options import TrainOptions
from moe_overlap.commands.train.placing import Placing, take_placements
from moe_overlap.commands.train.text import Corpus
from moe_overlap.launch.launch import World
from moe_overlap.launch.stopping import Stop, stopping
from moe_overlap.transport import EmulatedLinkTransport, ProcessGroupTransport

BETAS = (0.9, 0.95)
FINAL_LR_SHARE = 0.1
ALIGNMENT_ELEMENTS = 16  # 64 bytes of float32

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run: the model, the mean loss over ranks of each step, and the median speed of a step. stopped_in: the
    checkpoint of a run that was interrupted."""

    model: LanguageModel
    losses: tuple[float, ...]
    tokens_per_s: float
    stopped_in: Path | None = None


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What the held-out text says, in nats per token; tokens of it that each expert of each MoE layer received."""

    loss: float
    unigram_entropy: float
    expert_load: tuple[tuple[int, ...], ...]


def train(
    options: TrainOptions,
    corpus: Corpus,
    world: World,
    report: Report,
    *,
    checkpoint: Checkpoint | None = None,
    adjust: Callable[[LanguageModel], None] = lambda model: None,
) -> Trained:
    """Train for options.steps steps, from `checkpoint` if given. `report` receives one dict per step (every rank).
    adjust: what is done to the model before the first step, on every rank.

    Ctrl-C on any rank: all of them end the step they are in, save a checkpoint and return; with --compare-overlap,
    which cannot go on from one, KeyboardInterrupt instead.
    """
    torch.manual_seed(options.seed)
    model = LanguageModel(options, world.group)
    initialise(model, seed=options.seed, rank=world.rank)
    adjust(model)
    prepare(model)  # Expert gradients are then means over ranks, as the dense ones below.
    optimizer = torch.optim.AdamW(decay_groups(model, options.weight_decay), lr=options.lr, betas=BETAS)
    dense_gradients = DenseGradients(model)
    balancer = LossFreeBalancer(model, options.coefficient) if options.balance == "loss-free" else None
    first = 0
    if checkpoint is not None:
        load_checkpoint(checkpoint, model, optimizer, world)
        first = checkpoint.step
    placing = None
    if options.placement != "static":
        take_placements(checkpoint.placements if checkpoint else (), model, optimizer, options)
        placing = Placing(model, optimizer, options)
    losses: list[float] = []
    seconds: list[float] = []
    stopped_in: Path | None = None
    with stopping() as stop:
        for step in range(first, options.steps):
            began_s = time.perf_counter()
            row, stopped = _step(model, optimizer, dense_gradients, options, corpus, world, step, stop)
            if balancer is not None:
                balancer.step()
            if placing is not None:
                optimizer.zero_grad(set_to_none=True)
                row["placement"] = placing.step()
            seconds.append(time.perf_counter() - began_s)
            losses.append(row["loss"])
            speed = options.tokens_per_step / seconds[-1]
            report({"event": "step", "overlap": options.overlap, "step": step, **row, "tokens_per_s": speed})
            if stopped and options.compare_overlap:
                raise KeyboardInterrupt
            if stopped or (options.checkpoint_every and (step + 1) % options.checkpoint_every == 0):
                folder, run = Path(options.out) / CHECKPOINTS, identity(options, corpus)
                saved = save_checkpoint(folder, model, optimizer, run=run, world=world, step=step + 1)
                stopped_in = saved if stopped else None
            if stopped:
                break
    return Trained(
        model=model,
        losses=tuple(losses),
        stopped_in=stopped_in,
        # The first step allocates and warms up.
        tokens_per_s=options.tokens_per_step / median(seconds[1:] or seconds or [math.inf]),
    )


def _step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    dense_gradients: DenseGradients,
    options: TrainOptions,
    corpus: Corpus,
    world: World,
    step: int,
    stop: Stop,
) -> tuple[dict[str, Any], bool]:
    """One optimizer step: what it measured, averaged or summed over ranks, and whether any rank was interrupted."""
    model.train()
    windows = corpus.batch(
        step, seed=options.seed, batch=options.batch, seq=options.seq, rank=world.rank, ranks=world.size
    )
    loss = model.cross_entropy(windows)
    balance = aux_loss(model)
    optimizer.zero_grad(set_to_none=True)
    (loss + balance).backward()
    dense_gradients.average_()
    lr = learning_rate(step, options)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    asked = torch.tensor(float(stop.asked))
    sums = world.sum_(torch.stack([loss.detach(), balance.detach(), asked]).double()) / world.size
    row = {
        "loss": float(sums[0]),
        "aux_loss": float(sums[1]),
        "lr": lr,
        "load_max_over_mean": [round(float(row.max() / row.double().mean()), 3) for row in _expert_load(model)],
    }
    return row, bool(sums[2] > 0)


def learning_rate(step: int, options: TrainOptions) -> float:
    """Linear warm-up, then half a cosine from the peak to a tenth of it at the last step."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, options.steps - 1 - options.warmup)
    return options.lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class DenseGradients:
    """Means over ranks of the gradients of the parameters that every rank has, in one flat buffer of fixed order.

    One all_reduce over one layout: the order of the additions never depends on which gradient arrived first. It goes
    through a MoE layer's transport, so that its wait is bounded and its errors name the rank.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.transport = moe_layers(model)[0].transport
        self.parameters = list(split_parameters(model)[0].values())
        self.views: list[torch.Tensor] = []
        if self.transport.world_size == 1:
            return
        starts, end = [], 0
        for parameter in self.parameters:
            starts.append(end)
            end += -(-parameter.numel() // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
        self.flat = torch.zeros(end)
        for start, parameter in zip(starts, self.parameters, strict=True):
            self.views.append(self.flat[start : start + parameter.numel()].view_as(parameter))

    def average_(self) -> None:
        """Replace every parameter's gradient by its mean over ranks; a missing one counts as zero."""
        if not self.views:
            return
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
        assert isinstance(self.transport, ProcessGroupTransport | EmulatedLinkTransport)
        self.transport.all_reduce(self.flat, action="R").wait()
        self.flat.div_(self.transport.world_size)
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view


@torch.no_grad()
def evaluate(model: LanguageModel, options: TrainOptions, corpus: Corpus, world: World) -> HeldOut:
    """Loss and expert load on the held-out text, over all ranks; collective."""
    model.eval()
    batches = held_out_batches(options, corpus, world)
    total = torch.zeros(1, dtype=torch.float64)
    load_LE = torch.zeros(len(moe_layers(model)), options.experts, dtype=torch.int64)
    for windows in batches:
        total += model.cross_entropy(windows).double()
        aux_loss(model)
        load_LE += _expert_load(model)
    return HeldOut(
        loss=float(world.sum_(total) / (len(batches) * world.size)),
        unigram_entropy=corpus.unigram_entropy(tokens=options.eval_tokens, batch=options.batch, seq=options.seq),
        expert_load=tuple(tuple(int(n) for n in row) for row in load_LE),
    )


def _expert_load(model: LanguageModel) -> torch.Tensor:
    """int64 [MoE layers, E]: tokens per expert of the last forward call, over all ranks."""
    return torch.stack([layer.stats().tokens_per_expert for layer in moe_layers(model)])


def held_out_batches(options: TrainOptions, corpus: Corpus, world: World) -> list[torch.Tensor]:
    """This rank's share of the first --eval-tokens held-out tokens."""
    return corpus.held_out_batches(
        tokens=options.eval_tokens, batch=options.batch, seq=options.seq, rank=world.rank, ranks=world.size
    )
