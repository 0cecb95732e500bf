"""Hooks on parameters and modules, of experts and of dense parts, in every checkpoint mode: once each, whole values."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch
import torch.distributed as dist

from moe_overlap import prepare
from tests.parallel.expected import WORLD, run_once, unwrapped
from tests.parallel.model import MODES, Model, gradients, loss_of, train
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits


def make(mode, times=1, *, group="world", plan="by_hand"):
    model = Model(dist.group.WORLD if group == "world" else None, mode, times=times, plan=plan)
    prepare(model)
    return model


# ---------------------------------------------------------------- parameters


def with_parameter_hooks(mode, times, plan):
    """Each parameter's gradient as both kinds of hooks see it; the tensor hook doubles it."""
    model = make(mode, times, plan=plan)
    calls, seen = Counter(), {}
    for name, parameter in model.named_parameters():

        def double(grad, name=name):
            calls[name, "tensor"] += 1
            seen[name, "tensor"] = grad.clone()
            return 2 * grad

        def keep(parameter, name=name):
            calls[name, "accumulated"] += 1
            seen[name, "accumulated"] = parameter.grad.clone()

        parameter.register_hook(double)
        parameter.register_post_accumulate_grad_hook(keep)
    accumulated = train(model, dist.get_rank())
    return calls, seen, accumulated


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("plan", ["by_hand", "deduplicated"])
@pytest.mark.parametrize("mode", MODES)
def test_parameter_hooks_run_once_with_the_whole_gradient_and_may_change_it(mode, plan, times):
    results = gloo_pool(WORLD).run(with_parameter_hooks, mode, times, plan)
    for (calls, seen, accumulated), want in zip(results, unwrapped(times, plan=plan), strict=True):
        assert set(calls) == {(name, kind) for name in want for kind in ("tensor", "accumulated")}
        assert set(calls.values()) == {1}
        for name in want:
            same_bits(seen[name, "tensor"], want[name])
            same_bits(seen[name, "accumulated"], 2 * want[name])
            same_bits(accumulated[name], 2 * want[name])


def descend(mode, steps, in_backward):
    """Weights after some steps of gradient descent, taken after backward or by hooks in the middle of it. Small steps,
    as nobody averages the gradients of what every rank has whole."""
    model = make(mode)

    def update(parameter):
        with torch.no_grad():
            parameter.sub_(1e-5 * parameter.grad)
        parameter.grad = None

    if in_backward:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
    for step in range(steps):
        loss_of(model, dist.get_rank(), step).backward()
        if not in_backward:
            for parameter in model.parameters():
                update(parameter)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_in_backward_takes_the_same_steps(mode):
    """The weights change, and their gradients are freed, as soon as these are there: nobody reads them afterwards."""
    for got, want in zip(
        gloo_pool(WORLD).run(descend, mode, 3, True), run_once(descend, "none", 3, False), strict=True
    ):
        for name in want:
            same_bits(got[name], want[name])


# ---------------------------------------------------------------- modules

HOOKED = ("shells.0", "shells.0.block", "shells.0.block.op", "shells.0.block.op.linear", "shells.0.block.moe",
          "shells.0.block.moe.shared_expert", "shells.1.block", "shells.1.block.backbone.0",
          "shells.1.block.backbone.2", "shells.1.block.backbone.3", "exit")  # fmt: skip


def hook_modules(model, names):
    """(calls, gradients seen) of full backward hooks and pre-hooks on the named modules."""
    calls, seen = Counter(), defaultdict(list)
    for name in names:

        def before(module, outputs, name=name):
            calls[name, "pre"] += 1
            seen[name, "pre"] += [grad.clone() for grad in outputs if grad is not None]

        def after(module, inputs, outputs, name=name):
            calls[name, "post"] += 1
            seen[name, "post"] += [grad.clone() for grad in (*inputs, *outputs) if grad is not None]

        module = model.get_submodule(name)
        module.register_full_backward_pre_hook(before)
        module.register_full_backward_hook(after)
    return calls, seen


def with_module_hooks(mode, times, names):
    model = make(mode, times)
    calls, seen = hook_modules(model, names)
    return calls, seen, train(model, dist.get_rank())


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_module_hooks_run_once_and_change_nothing(mode, times):
    """The executed order is the planned one with hooks too: `train` checks that."""
    plain = run_once(with_module_hooks, "none", times, HOOKED)
    for (calls, seen, got), (_, want_seen, _), want in zip(
        gloo_pool(WORLD).run(with_module_hooks, mode, times, HOOKED), plain, unwrapped(times), strict=True
    ):
        used = {name: times if name.startswith("shells") else 1 for name in HOOKED}
        assert calls == Counter({(name, kind): used[name] for name in HOOKED for kind in ("pre", "post")})
        for key, grads in want_seen.items():
            for one, other in zip(seen[key], grads, strict=True):
                same_bits(one, other)
        for name in want:
            same_bits(got[name], want[name])


def test_module_hooks_see_the_gradients_of_a_single_process():
    results = run_once(with_module_hooks, "none", 1, HOOKED)
    for rank, (_, seen, _) in enumerate(results):
        model = make("none", group="none")
        _, want = hook_modules(model, HOOKED)
        loss_of(model, rank).backward()
        gradients(model)
        for key, grads in want.items():
            assert grads, key
            for one, other in zip(seen[key], grads, strict=True):
                close(one, other)


def test_module_hooks_on_the_layer_of_a_shortcut_block():
    """A ShortcutBlock runs its layer: whoever hooked that layer must hear of it."""
    name = "shells.1.block.moe"
    for calls, _, _ in gloo_pool(WORLD).run(with_module_hooks, "none", 1, (name,)):
        assert calls == Counter({(name, "pre"): 1, (name, "post"): 1})
