"""A patch acts in the modules made while it lasts, and nowhere else; one that does not fit is an error."""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.ranks import gloo_pool
from tests.verify.patching import Patch, patched

FACTOR = Patch("verify.sides", "SEEDS = 16", "SEEDS = 17")


def test_a_patch_acts_while_it_lasts():
    assert gloo_pool(1).run(_seeds) == [(16, 17, 16, True)]


def _seeds():
    """What a rank reads before, within and after; and whether its modules are those that it had."""
    name = "moe_overlap.verify.sides"
    before = importlib.import_module(name)
    with patched([FACTOR]):
        within = importlib.import_module(name)
    return before.SEEDS, within.SEEDS, importlib.import_module(name).SEEDS, sys.modules[name] is before


def test_what_a_patch_leaves_is_taken_away():
    """The hooks that a module registers with torch for all optimizers."""
    assert gloo_pool(1).run(_hooks) == [(True, True)]


def _hooks():
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    before = dict(hooks)
    with patched([FACTOR]):
        importlib.import_module("moe_overlap.parallel.optimizers").guard_optimizers()
        more = len(hooks) > len(before)
    return more, dict(hooks) == before


@pytest.mark.parametrize("old", ["no such text", "import"])
def test_a_patch_that_does_not_fit_once_is_an_error(old):
    patch = Patch("verify.sides", old, "")
    with pytest.raises(AssertionError, match="times, not once"):
        patch.apply(patch.path.read_text(encoding="utf-8"))
    with pytest.raises(AssertionError, match="times, not once"), patched([patch]):
        importlib.import_module("moe_overlap.verify.sides")
