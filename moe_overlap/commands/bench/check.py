"""Correctness before timing: overlapped equals joined bit for bit, and the output is right against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_overlap.commands.bench.cases import BlockPair, Sizes
from moe_overlap.launch.launch import World
from moe_overlap.transport.local import LocalTransport

# The largest error of an output, relative to its largest entry, by dtype: the rtol of the project's tolerance table,
# which a test holds against these. A block pair is four layers on a residual stream, of which each is this accurate.
MAX_REL_ERR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

Result = list[torch.Tensor]


def run(model: BlockPair, phase: str, x_TD: torch.Tensor, dy_TD: torch.Tensor) -> Result:
    """[y] in infer; [y, dx, then every parameter's gradient] in train. All detached."""
    if phase == "infer":
        with torch.no_grad():
            return [model(x_TD)]
    x_TD = x_TD.detach().requires_grad_()
    model.zero_grad(set_to_none=True)
    y_TD = model(x_TD)
    y_TD.backward(dy_TD)
    grads = [x_TD.grad, *(parameter.grad for parameter in model.parameters())]
    model.zero_grad(set_to_none=True)
    return [y_TD.detach(), *(grad for grad in grads if grad is not None)]


def same_bits(a: Result, b: Result) -> bool:
    """Equal in number, shape, dtype and every bit."""
    return len(a) == len(b) and all(
        p.shape == q.shape
        and p.dtype == q.dtype
        and torch.equal(p.contiguous().view(-1).view(torch.uint8), q.contiguous().view(-1).view(torch.uint8))
        for p, q in zip(a, b, strict=True)
    )


def gather_bits(world: World, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor of every rank, whatever its dtype: gloo moves its bytes."""
    flat = tensor.detach().contiguous()
    parts = world.gather(flat.view(-1).view(torch.uint8))
    return [part.view(flat.dtype).view(flat.shape) for part in parts]


def reference(world: World, model: BlockPair, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> BlockPair:
    """The same block pair in float64 with every expert on this rank: no exchange, this rank's tokens. Collective."""
    sizes: Sizes = model.sizes
    double = BlockPair(model.case, sizes, ids_TK, weights_TK, LocalTransport(), dtype=torch.float64)
    experts = {id(weight) for weight in model.moe.expert_weights}
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(double.named_parameters(), model.named_parameters(), strict=True):
            whole = torch.cat(gather_bits(world, theirs)) if id(theirs) in experts else theirs
            ours.copy_(whole)
    return double


def max_rel_err(y_TD: torch.Tensor, y64_TD: torch.Tensor) -> float:
    """max |y - y64| / max |y64|; NaN where y has one."""
    scale = y64_TD.abs().max().item() if y64_TD.numel() else 0.0
    error = (y_TD.double() - y64_TD).abs().max().item() if y64_TD.numel() else 0.0
    return error / scale if scale > 0 else error


def worst(world: World, value: float) -> float:
    """The largest value over ranks; NaN if one has it."""
    values = [float(part) for part in world.gather(torch.tensor([value], dtype=torch.float64))]
    return math.nan if any(math.isnan(value) for value in values) else max(values)


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Appends the largest resident set of this process during the block, in MiB, where the system can tell."""
    peak: list[float] = []
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # "reset the peak resident set size", Linux >= 4.0
    except OSError:
        yield peak
        return
    yield peak
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        peak += [int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:")]
