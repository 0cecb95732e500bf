"""The checks of more than one step: optimizer, checkpoint, recompute, training, determinism."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from moe_overlap.verify.adapter import State
from moe_overlap.verify.compare import near
from moe_overlap.verify.kit import CALLED, KINDS, LOOK_GRADS, TRAINED, Kit
from moe_overlap.verify.sides import Result, Side, Tokens

STEPS = 6
ROUNDING = 10.0  # times as far as one rank's own values come apart
LOOK_STEP = {
    "router": "the optimizer's parameters on every rank, and whether all ranks step with the same gradient",
    "experts": "whether the optimizer has the experts of every rank, with one learning rate and decay",
    "shared": "the optimizer's parameters on every rank, and whether all ranks step with the same gradient",
    "other": "the optimizer's parameters on every rank, and whether all ranks step with the same gradient",
    "buffer": "updates of buffers (a router's bias): from the counts of all ranks' tokens, once in a step",
}


def adamw_step(kit: Kit) -> None:
    """Two steps, as the first one of AdamW depends on little more than signs."""
    many, one, batches = kit.many(), kit.one(), []
    for number in range(2):
        tokens = kit.tokens(batch=number)
        batches.append(tokens)
        many.step(kit.share_of(tokens, many))
        one.step(kit.share_of(tokens, one))
        want = one.adapter.full_state()
        got = but_for_rounding(kit, many.adapter.full_state(), want, batches)
        if not kit.compare_kinds(f"after step {number + 1}, the value", got, want, LOOK_STEP):
            return


def but_for_rounding(kit: Kit, got: State, want: State, batches: Sequence[Sequence[Tokens]]) -> State:
    """`got` after a step on each of the batches; what is no farther from `want` than rounding can bring it is replaced
    by that.

    AdamW makes steps of one size of gradients of any size, so that an entry whose gradient is zero but for rounding (of
    an expert that no token wants) moves by chance. How far is seen on one rank, whose tokens are rounded otherwise.
    """
    if all(
        name in got and near(got[name].double(), value.double(), kit.setup.precision) for name, value in want.items()
    ):
        return got
    sides = [kit.one(), kit.one()]
    for tokens in batches:
        mine = kit.share_of(tokens, sides[0])
        sides[0].step(mine)
        sides[1].step([Tokens(one.x * _roundings(kit, one.x), one.c) for one in mine])
    first, second = (side.adapter.full_state() for side in sides)
    found = dict(got)
    for name, value in got.items():
        if value.is_floating_point() and name in want and value.shape == want[name].shape:
            limit = ROUNDING * (first[name] - second[name]).abs().max()
            found[name] = torch.where((value - want[name]).abs() <= limit, want[name], value)
    return found


def _roundings(kit: Kit, like: torch.Tensor) -> torch.Tensor:
    """Factors of about one, as an operation in the precision of the run rounds."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (1 + torch.finfo(kit.setup.precision).eps * drawn).to(like.dtype)


def recompute(kit: Kit) -> None:
    """The same step with and without, on n ranks."""
    with_it, plain, tokens = kit.many(), kit.many(), kit.tokens()
    mine = kit.share_of(tokens, plain)
    results = []
    for side, on in ((with_it, True), (plain, False)):
        side.adapter.zero_grad()
        results.append(side.backward(mine, checkpointed=on, aux=side.adapter.has("aux_loss")))
        side.adapter.sync_grads()
    look = "what a recompute does again that it must not: random numbers, another routing, counts, hooks"
    for what in ("outputs", "input_grads"):
        got, want = (getattr(result, what)[0] for result in results)
        kit.compare(
            f"under recompute, the {'output' if what == 'outputs' else 'gradient of the input'}",
            got,
            want,
            look,
            ranks=1,
        )
    got, want = with_it.adapter.full_grads(), plain.adapter.full_grads()
    kit.compare_kinds("under recompute, the gradient", got, want, dict.fromkeys(KINDS, look), kinds=TRAINED, ranks=1)
    look = "counts and other buffers, which a recompute must not change again"
    got, want = with_it.adapter.full_state(), plain.adapter.full_state()
    right = kit.compare_kinds("under recompute, the value", got, want, dict.fromkeys(KINDS, look), ranks=1)
    if right and with_it.adapter.has("optimizer_step"):
        for side in (with_it, plain):
            side.adapter.optimizer_step()
        got, want = with_it.adapter.full_state(), plain.adapter.full_state()
        kit.compare_kinds("after a step with recompute, the value", got, want, dict.fromkeys(KINDS, look), ranks=1)


def reshard(kit: Kit) -> None:
    """Save on n ranks and load on fewer, and the other way round; then a further step shows the optimizer's state."""
    experts = kit.setup.factory().experts
    fewer = [size for size in range(1, kit.ranks) if experts % size == 0]
    ways = [(kit.ranks, kit.ranks), *((kit.ranks, size) for size in fewer), *((size, kit.ranks) for size in fewer)]
    groups: dict[int, dist.ProcessGroup | None] = {1: None, kit.ranks: kit.group}
    for size in fewer:
        if size > 1:
            groups[size] = kit.subgroup(size)
    for saved, loaded in ways:
        if not _reshard(kit, saved, loaded, groups):
            return


def _reshard(kit: Kit, saved: int, loaded: int, groups: dict[int, dist.ProcessGroup | None]) -> bool:
    writes, reads = kit.rank < saved, kit.rank < loaded
    first, second = kit.tokens(), kit.tokens(batch=1)
    with _Folder(kit) as folder:
        old, state = None, kit.setup.state
        if writes:
            old = kit.side(groups[saved])
            old.step(kit.share_of(first, old))
            old.adapter.save(folder)
            state = old.adapter.full_state()
        dist.barrier(kit.group)
        new = None
        if reads:
            new = kit.side(groups[loaded], load=False)
            new.adapter.load(folder)
        dist.barrier(kit.group)
    state = _from_rank_0(kit, state)
    what = f"saved on {saved} and loaded on {loaded}, "
    right = True
    if new is not None:
        look = "whether the file has the experts of every rank, and which of them a rank takes"
        right = kit.compare_kinds(f"{what}the value", new.adapter.full_state(), state, dict.fromkeys(KINDS, look))
    if not kit.agreed(right):
        return False
    for side in (old, new):
        if side is not None:
            side.step(kit.share_of(second, side))
    state = _from_rank_0(kit, state if old is None else old.adapter.full_state())
    if new is not None:
        what += "after a further step the value"
        look = "the optimizer's state: its averages of every rank's experts, its number of steps, under which names"
        got = but_for_rounding(kit, new.adapter.full_state(), state, [first, second])
        right = kit.compare_kinds(what, got, state, dict.fromkeys(KINDS, look))
    return kit.agreed(right)


class _Folder:
    """A temporary folder that all ranks know; rank 0 makes it and removes it."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    def __enter__(self) -> Path:
        made = tempfile.mkdtemp(prefix="moe_overlap-verify-") if self.kit.rank == 0 else ""
        data = torch.zeros(4096, dtype=torch.uint8)
        data[: len(made.encode())] = torch.tensor(list(made.encode()), dtype=torch.uint8)
        dist.broadcast(data, group_src=0, group=self.kit.group)
        self.path = Path(bytes(data[data != 0].tolist()).decode())
        return self.path

    def __exit__(self, *_: object) -> None:
        if self.kit.rank == 0:
            shutil.rmtree(self.path, ignore_errors=True)


def _from_rank_0(kit: Kit, state: State) -> State:
    """The state that rank 0 has; all ranks' have the same names and shapes."""
    found = {}
    for name in sorted(state):
        found[name] = state[name].clone()
        dist.broadcast(found[name], group_src=0, group=kit.group)
    return found


def training(kit: Kit) -> None:
    """After some steps everything that is trained has changed, the loss fell, and both sides are at the same point."""
    many, one = kit.many(), kit.one()
    losses, losses_1 = _train(kit, many), _train(kit, one)
    got, want = many.adapter.full_state(), one.adapter.full_state()
    for kind in TRAINED:
        names = [name for name in got if kit.setup.kinds[name] == kind]
        for where, state in (("on one rank already, ", want), ("", got)):
            still = [name for name in names if torch.equal(state[name], kit.setup.state[name])]
            if still:
                look = "which parameters the optimizer was given, and requires_grad"
                what = f"{where}{CALLED[kind]} ({', '.join(still)})"
                kit.note(f"still {kind}", what, f"did not change in {STEPS} steps", look, topic=f"still {kind}")
                break
    for where, curve in (("", losses), ("on one rank, ", losses_1)):
        if not curve[-1] < curve[0]:
            how = f"did not fall in {STEPS} steps: from {curve[0]:.6g} to {curve[-1]:.6g}"
            kit.note(f"loss {where}", f"{where}the loss over all tokens", how, "the optimizer step")
    if not kit.notes:
        looks = {kind: f"what the checks of one step leave out; {text}" for kind, text in LOOK_GRADS.items()}
        got = but_for_rounding(kit, got, want, [kit.tokens()] * STEPS)
        kit.compare_kinds(f"after {STEPS} steps, the value", got, want, looks)


def _train(kit: Kit, side: Side) -> list[float]:
    """The losses of the steps, summed over all ranks' tokens."""
    losses = []
    tokens = kit.tokens()
    for _ in range(STEPS):
        loss = torch.tensor([sum(side.step(kit.share_of(tokens, side)).losses)], dtype=torch.float64)
        if side.adapter.group is not None:
            dist.all_reduce(loss, group=kit.group)
        losses.append(float(loss))
    return losses


def determinism(kit: Kit) -> None:
    """The same step on three modules of the same values: the same bits."""
    seen = []
    for _ in range(3):
        side, tokens = kit.many(), kit.tokens()
        (result,), grads = side.grads(kit.share_of(tokens, side))
        seen.append(_tensors(result) | {f"the gradient of {name}": grad for name, grad in grads.items()})
    for name, first in seen[0].items():
        if not all(torch.equal(first, other[name]) for other in seen[1:]):
            worst = max(float((first - other[name]).abs().max()) for other in seen[1:])
            look = "sums whose order depends on time: atomics, arrival order, an all_reduce over several lanes"
            kit.note("bits", f"{name}", f"differs between runs of the same step, by up to {worst:.2g}", look)
            return


def _tensors(result: Result) -> State:
    return {"the output": result.outputs[0], "the gradient of the input": result.input_grads[0]}
