"""The checks of other ways to use a layer: one rank's experts idle, in evaluation, called twice before one backward."""

from __future__ import annotations

import torch

from moe_overlap.verify.checks_of_training import LOOK_STEP, but_for_rounding
from moe_overlap.verify.kit import KINDS, LOOK_GRADS, LOOK_OUTPUT, Kit
from moe_overlap.verify.sides import Side, Tokens, routed

CANDIDATES = 32


def idle_experts(kit: Kit) -> None:
    """All ranks have one token over and over, so that a few experts get all rows and most get none."""
    many, one = kit.many(), kit.one()
    tokens = _one_token(kit, one)
    mine, mine_1 = kit.share_of(tokens, many), kit.share_of(tokens, one)
    results, got = many.grads(mine)
    results_1, want = one.grads(mine_1)
    what = "with all rows for a few experts, "
    right = kit.compare_results(results[0], results_1[0], tokens, what=what)
    right &= kit.compare_kinds(f"{what}the gradient", got, want, LOOK_GRADS)
    if kit.agreed(right) and one.adapter.has("optimizer_step"):
        many.adapter.optimizer_step()
        one.adapter.optimizer_step()
        want = one.adapter.full_state()
        got = but_for_rounding(kit, many.adapter.full_state(), want, [tokens])
        look = LOOK_STEP | {"experts": "gradients of experts without rows: zero, not missing, or no decay acts on them"}
        kit.compare_kinds(f"{what}after a step the value", got, want, look)


def _one_token(kit: Kit, one: Side) -> list[Tokens]:
    """Tokens that are all alike. Of some candidates the one whose experts lie on the fewest ranks."""
    each = one.adapter.experts // kit.ranks
    found, fewest = kit.tokens(), kit.ranks + 1
    for row in range(CANDIDATES):
        tokens = kit.tokens(batch=2 + row)
        alike = tokens[0].x[:1]
        tokens = [Tokens(alike.expand_as(its.x).clone(), its.c) for its in tokens]
        ids, _ = routed(one.adapter, tokens[0].x)
        ranks = len({int(i) // each for i in ids.flatten() if i >= 0})
        if 0 < ranks < fewest:
            found, fewest = tokens, ranks
    return found


def evaluation(kit: Kit) -> None:
    """Output in evaluation, without gradients; and that nothing is changed by it."""
    many, one, tokens = kit.many(), kit.one(), kit.tokens()
    before = many.adapter.full_state()
    with torch.no_grad():
        for side in (many, one):
            side.adapter.module.eval()
        y = many.adapter.forward(kit.share_of(tokens, many)[0].x)
        xs = [its.x for its in kit.share_of(tokens, one)]
        together = one.adapter.together
        ys = [one.adapter.forward(x) for x in ([torch.cat(xs)] if together else xs)]
    want = kit.own(torch.cat(ys).split([len(x) for x in xs]), tokens)
    kit.compare("in evaluation, the output", y, want, LOOK_OUTPUT, topic="output")
    look = dict.fromkeys(KINDS, "counts and other buffers, which are for training alone")
    kit.compare_kinds("after evaluation, the value", many.adapter.full_state(), before, look, ranks=1)


def two_forwards(kit: Kit) -> None:
    """Two micro-batches, whose forwards both come before the one backward."""
    many, one = kit.many(), kit.one()
    batches = [kit.tokens(), kit.tokens(batch=1)]
    many.adapter.zero_grad()
    mine = [kit.share_of(tokens, many)[0] for tokens in batches]
    xs = [its.x.clone().requires_grad_() for its in mine]
    loss = torch.stack([(many.adapter.forward(x) * its.c).sum() for x, its in zip(xs, mine, strict=True)]).mean()
    loss.backward()
    many.adapter.sync_grads()
    results, want = one.grads(*(kit.share_of(tokens, one) for tokens in batches))
    what = "with two forwards before one backward, "
    look = "what a forward keeps for its backward: the next one must not overwrite it"
    for x, result, tokens in zip(xs, results, batches, strict=True):
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        right = kit.own(result.input_grads, tokens)
        kit.compare(f"{what}the gradient of the input", grad, right, look, topic="input")
    kit.compare_kinds(f"{what}the gradient", many.adapter.full_grads(), want, dict.fromkeys(KINDS, look))
