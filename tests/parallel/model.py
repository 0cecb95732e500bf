"""A small model with both kinds of layers, the ways to checkpoint it, and what one backward of it must do.

    entry -> Shell(Dense op, then h + moe(h)) -> Shell(ShortcutBlock) -> exit

`train` runs it on one rank and `Seen.check` compares what happened with what the schedules say: forward calls of the
dense ops, exchanges by phase, and the order of the actions in backward, exchanges at their starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moe_overlap import MoELayer, ShortcutBlock, prepare, sac_policy
from moe_overlap.measure.timeline import TimelineEvent, record
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import SchedulePair, chunked, deduplicate, window

D, F, E = 16, 24, 8
EXPERTS = ("gate_up_proj", "down_proj")

# The checkpoint modes that are allowed: how often a dense op is called in forward and backward together.
CALLS = {"none": 1, "block": 2, "op": 2, "selective": 2, "nested": 3}
MODES = ("none", "block", "op", "selective")  # "nested" is "op" inside "block"

# Backward schedules of the two layers: the mirror of forward, other chunks than forward, and programs written by hand
# with chunks out of order, ops of the user between them, and weight gradients by groups, before and beside exchanges.
BY_HAND = (
    "Ut Ct0 Ct2 Ct1 Ed0 Dt0 St Ed2 Dt2 Ed1 Ew1 Dt1 Ew0 Pt",
    "Ut Ct0 Ct1 Bt2 Ed0 Dt0 Bt1 Ed1 Dt1 Ew0 Bt0 Ew1 Pt",
)
DEDUPLICATED = "Ut Ct0 Ct2 Ct1 Ed0 Od Dt0 St Ed2 Dt2 Ed1 Mt Ew1 Dt1 Ew0 Pt"
PLANS = ("mirrored", "own_chunks", "by_hand", "deduplicated")
AUTO = "auto"  # instead of a plan: what the planner chooses, in the first step


def schedules(plan: str) -> tuple[SchedulePair, SchedulePair]:
    """The schedules of the layer with a shared expert and of the shortcut block, three ops after its tap."""
    first, second = chunked(2, shared=True), window(3, 1, chunks=2, backward_slot=2)
    if plan == "own_chunks":
        first = first.with_backward(chunked(4, "experts", shared=True))
        second = second.with_backward(window(3, 1, chunks=1))
    if plan == "by_hand":
        first = replace(first, backward=Schedule.parse(BY_HAND[0]), backward_chunks=3)
        second = replace(window(3, 1), backward=Schedule.parse(BY_HAND[1]), backward_chunks=2)
    if plan == "deduplicated":
        first = replace(deduplicate(first), backward=Schedule.parse(DEDUPLICATED), backward_chunks=3)
        second = deduplicate(window(3, 1, chunks=2, by="experts", backward_chunks=3))
    return first, second


class Op(nn.Module):
    """h + tanh(linear(h)), a probe: it counts its calls."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D, dtype=torch.float64)
        self.checkpointed = mode in ("op", "nested")
        self.calls = 0

    def body(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h + torch.tanh(self.linear(h))

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self.body, h, use_reentrant=False) if self.checkpointed else self.body(h)


class Shell(nn.Module):
    """A block and the way in which it is checkpointed as a whole."""

    def __init__(self, block: nn.Module, mode: str) -> None:
        super().__init__()
        self.block = block
        self.mode = mode

    def forward(self, h: Tensor) -> Tensor:
        if self.mode in ("none", "op"):
            return self.block(h)
        context: dict[str, Any] = {}
        if self.mode == "selective":
            context["context_fn"] = partial(create_selective_checkpoint_contexts, sac_policy())
        return checkpoint(self.block, h, use_reentrant=self.mode == "reentrant", **context)


class DenseAndMoE(nn.Module):
    """h + moe(h) after a dense op; the layer has a shared expert."""

    def __init__(self, mode: str, moe: MoELayer) -> None:
        super().__init__()
        self.op = Op(mode)
        self.moe = moe

    def forward(self, h: Tensor) -> Tensor:
        h = self.op(h)
        return h + self.moe(h)


class Model(nn.Module):
    """The model above.

    `times`: how often both blocks run in one forward, with the same weights, one after the other; `branches`: each runs
    twice side by side instead, and the sum goes on.
    """

    def __init__(
        self,
        group: Any,
        mode: str = "none",
        *,
        times: int = 1,
        branches: bool = False,
        plan: str = "by_hand",
        overlap: bool = True,
        aux_loss_coef: float = 0.0,
    ) -> None:
        super().__init__()
        torch.manual_seed(11)
        dedup = "on" if plan == "deduplicated" else "off"
        factory: dict[str, Any] = {"dtype": torch.float64, "group": group, "overlap": overlap, "dedup": dedup}
        self.auto = plan == AUTO
        first, second = (AUTO, None) if self.auto else schedules(plan)
        moe = MoELayer(D, F, E, 2, schedule=first, shared_expert_size=F, aux_loss_coef=aux_loss_coef, **factory)
        shortcut = ShortcutBlock(
            [Op(mode) for _ in range(3)],
            MoELayer(D, F, E, 1, **factory),
            tap=1,
            shared_expert=nn.Linear(D, D, bias=False, dtype=torch.float64),
            combine="gated",
            overlap=overlap,
            **({"schedule": AUTO} if self.auto else {"slot": 1}),
        )
        if second is not None:
            shortcut.schedule = second if overlap else second.join()
        self.times, self.branches = times, branches
        self.entry = nn.Linear(D, D, dtype=torch.float64)
        self.shells = nn.ModuleList([Shell(DenseAndMoE(mode, moe), mode), Shell(shortcut, mode)])
        self.exit = nn.Linear(D, D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.entry(x)
        for _ in range(self.times):
            for shell in self.shells:
                h = shell(h) + shell(0.5 * h) if self.branches else shell(h)
        return self.exit(h)

    @property
    def calls(self) -> list[SchedulePair]:
        """The schedules of the layer calls of one forward, in order, where they are fixed."""
        both = [self.moe.schedule, self.shortcut.schedule]
        return [pair for pair in both for _ in range(2)] if self.branches else both * self.times

    @property
    def moe(self) -> MoELayer:
        return self.shells[0].block.moe

    @property
    def shortcut(self) -> ShortcutBlock:
        return self.shells[1].block

    @property
    def ops(self) -> list[Op]:
        return [module for module in self.modules() if isinstance(module, Op)]

    @property
    def layers(self) -> list[MoELayer]:
        return [self.moe, self.shortcut.moe]

    def expert_parameters(self) -> set[nn.Parameter]:
        return {weight for layer in self.layers for weight in layer.expert_weights}


def tokens(rank: int, batch: int = 0) -> Tensor:
    """The tokens of one rank's micro-batch; every rank has another number of them."""
    generator = torch.Generator().manual_seed(10 * batch + rank)
    return torch.randn(7 + 2 * rank + batch, D, dtype=torch.float64, generator=generator)


@lru_cache(maxsize=1)
def meshes() -> DeviceMesh:
    """Two meshes of a gloo rank, made once: "own" of this rank alone, "data" of all ranks."""
    return init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("own", "data"))


def loss_of(model: Callable[[Tensor], Tensor], rank: int, batch: int = 0) -> Tensor:
    return model(tokens(rank, batch)).square().mean()


@dataclass(frozen=True)
class Seen:
    """What was seen of a model on one rank since `watch` began; `before`: its counts at that time.

    Of schedule="auto", `chosen`: the schedules of the layer calls, in order; `calibrations`: how many layers agreed
    once more than they stepped, which they do before they plan.
    """

    model: Model
    events: list[TimelineEvent]
    before: dict[str, int]
    chosen: list[SchedulePair]
    calibrations: int

    def check(self, batches: int = 1) -> None:
        """Assert that `batches` forward and backward passes did what the schedules say, and nothing twice."""
        model, mode = self.model, self.model.shells[0].mode
        calls = self.chosen if model.auto else model.calls * batches
        want: Counter[tuple[str, str]] = Counter()
        for pair in calls:
            sent = ["N", *(action.text for action in pair.forward if action.lane == "wire")]
            returned = [action.text for action in pair.backward if action.lane == "wire"]
            for phase, actions in (("forward", sent), ("recompute", sent), ("backward", returned)):
                if phase != "recompute" or mode in ("block", "selective", "nested"):
                    want.update((phase, action) for action in actions)
        got = Counter((event.phase, event.action) for event in self.events if event.lane == "wire")
        assert got == want, (got - want, want - got)
        counts = {name: count - self.before[name] for name, count in counts_of(model).items()}
        agreements = sum(count for (_, action), count in want.items() if action == "N")
        assert counts == {
            "op_calls": CALLS[mode] * len(calls) // 2 * len(model.ops),
            "agreements": agreements + self.calibrations,
            "exchanges": want.total() - agreements,
        }
        order = [event.action for event in self.events if event.phase == "backward" and event.lane in ("comp", "start")]
        each = len(calls) // batches
        planned = [pair.backward.text for last in range(each, len(calls) + 1, each)
                   for pair in reversed(calls[last - each : last])]  # fmt: skip
        assert " ".join(order) == " ".join(planned)


def counts_of(model: Model) -> dict[str, int]:
    """What a model has done so far: calls of its dense ops, agreements and exchanges of its transports."""
    stats = [layer.transport.stats for layer in model.layers]
    return {
        "op_calls": sum(op.calls for op in model.ops),
        "agreements": sum(one.agreements for one in stats),
        "exchanges": sum(one.exchanges for one in stats),
    }


@contextmanager
def watch(model: Model) -> Iterator[Seen]:
    """The recorder's events, and one of lane "start" where an exchange of backward was handed to the transport."""
    starts = [layer.transport.start for layer in model.layers]
    chosen: list[SchedulePair] = []
    calibrations = sum(not one.schedule.found for one in (model.moe, model.shortcut)) if model.auto else 0

    def note(layer: MoELayer, *_: object) -> None:
        if torch._C._current_graph_task_id() < 0:  # not in a recompute
            chosen.append(layer._last_step.pair)

    hooks = [layer.register_forward_hook(note) for layer in model.layers if model.auto]
    with record() as events:
        for layer, start in zip(model.layers, starts, strict=True):

            def noted(*args: Any, action: str, start: Any = start, **keywords: Any) -> Any:
                if action.startswith(("Ct", "Dt", "Mt")):
                    events.append(TimelineEvent(-1, -1, "backward", action, "start", 0.0, 0.0))
                return start(*args, action=action, **keywords)

            layer.transport.start = noted
        try:
            yield Seen(model, events, counts_of(model), chosen, calibrations)
        finally:
            for hook in hooks:
                hook.remove()
            for layer in model.layers:
                del layer.transport.start


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what a DTensor is a shard of."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """name -> gradient, whole where it is sharded over data-parallel ranks; experts: this rank's."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if name.startswith("unused"):
            assert grad is None or not grad.any()
            continue
        assert grad is not None, f"{name} has no gradient"
        found[name] = whole(grad)
    return found


def train(
    model: Model,
    rank: int,
    *,
    call: Callable[[Tensor], Tensor] | None = None,
    batches: int = 1,
    unsynchronised: Callable[[], Any] = nullcontext,
) -> dict[str, Tensor]:
    """Gradients of the sum of the micro-batches' losses; `call` is the wrapped model.

    `unsynchronised` is the context of every micro-batch but the last.
    """
    with watch(model) as seen:
        for batch in range(batches):
            with unsynchronised() if batch < batches - 1 else nullcontext():
                loss_of(call or model, rank, batch).backward()
    seen.check(batches)
    return gradients(model)


def bare(mode: str, times: int, batches: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """`train` on a gloo rank with no wrapper around the model: dense gradients are this rank's own."""
    model = Model(dist.group.WORLD, mode, times=times, **options)
    prepare(model)
    return train(model, dist.get_rank(), batches=batches)


def joined(times: int, batches: int, plan: str) -> dict[str, Tensor]:
    """`bare` with every exchange joined and no checkpoint."""
    return bare("none", times, batches, {"plan": plan, "overlap": False})
