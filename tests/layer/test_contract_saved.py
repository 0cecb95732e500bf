"""What a call saves for backward, on every path: used twice, in part, kept elsewhere, or computed again."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_overlap import sac_policy
from tests.layer.contract import PATHS, gradients, on
from tests.layers import tokens
from tests.tolerances import close, same_bits


@pytest.mark.parametrize("path", PATHS)
def test_two_backwards_of_one_graph_with_other_gradients(path):
    """The first one leaves all that was saved as it is."""

    def check(call):
        x = tokens(6).requires_grad_()
        first, second = tokens(6, seed=1), tokens(6, seed=2)
        want = [torch.autograd.grad(call(x), [x, *call.layer.parameters()], dy) for dy in (first, second, first)]
        y = call(x)
        for last, dy, expected in zip((False, False, True), (first, second, first), want, strict=True):
            got = torch.autograd.grad(y, [x, *call.layer.parameters()], dy, retain_graph=not last)
            for g, w in zip(got, expected, strict=True):
                same_bits(g, w)

    on(path, check)


@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_of_one_leaf_alone(path):
    def check(call):
        x = tokens(6).requires_grad_()
        leaves = [x, *call.layer.parameters()]
        want = torch.autograd.grad(call(x).square().sum(), leaves)
        for leaf, expected in zip(leaves, want, strict=True):
            same_bits(torch.autograd.grad(call(x).square().sum(), leaf)[0], expected)

    on(path, check)


def to_bytes(tensor):
    return tensor.detach().numpy().tobytes(), tensor.dtype, tensor.shape


def from_bytes(kept):
    values, dtype, shape = kept
    return (
        (torch.frombuffer(bytearray(values), dtype=dtype) if values else torch.empty(0, dtype=dtype))
        .clone()
        .view(shape)
    )


HOOKS = {
    "on the cpu": torch.autograd.graph.save_on_cpu,
    "as bytes": lambda: torch.autograd.graph.saved_tensors_hooks(to_bytes, from_bytes),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("hooks", HOOKS)
def test_hooks_of_what_is_saved(path, hooks):
    def check(call):
        x = tokens(6).requires_grad_()
        want = gradients(call, call(x).square().sum(), x)
        with HOOKS[hooks]():
            loss = call(x).square().sum()
        for retain_graph in (True, False):
            got = torch.autograd.grad(loss, [x, *call.layer.parameters()], retain_graph=retain_graph)
            for g, w in zip(got, want, strict=True):
                close(g, w)  # bytes have lost their strides

    on(path, check)


def save_ours(_context, op, *_args, **_kwargs):
    return CheckpointPolicy.MUST_SAVE if op.namespace == "moe_overlap" else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "plain": {},
    "nothing saved": {"context_fn": partial(create_selective_checkpoint_contexts,
                                            lambda *_, **__: CheckpointPolicy.MUST_RECOMPUTE)},
    "our ops saved": {"context_fn": partial(create_selective_checkpoint_contexts, save_ours)},
    "matmuls saved": {"context_fn": partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])},
    "our policy": {"context_fn": partial(create_selective_checkpoint_contexts, sac_policy())},
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(path, kind):
    def check(call):
        x = tokens(6).requires_grad_()
        want = gradients(call, call(x).square().sum(), x)
        y = checkpoint(call, x, use_reentrant=False, **CHECKPOINTS[kind])
        for g, w in zip(gradients(call, y.square().sum(), x), want, strict=True):
            same_bits(g, w)

    on(path, check)
