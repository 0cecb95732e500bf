"""The checks of one step: values, routing, output, gradients, norm; each a function of a Kit that notes findings."""

from __future__ import annotations

import functools
import math

import torch

from moe_overlap.verify.adapter import State
from moe_overlap.verify.compare import describe, named_factor, near
from moe_overlap.verify.kit import LOOK_GRADS, LOOK_OUTPUT, TRAINED, Kit
from moe_overlap.verify.sides import TOKENS, Tokens, dense_weights, random_state, routed, seed_for
from moe_overlap.verify.tolerances import TOLERANCES

UNEVEN = (TOKENS, 5, 2 * TOKENS, 11)


def values(kit: Kit) -> None:
    """What is loaded is what is read back, on one rank and on n; and the names mean something. Prepares the run."""
    one = kit.side(None, load=False).adapter
    setup = kit.setup
    setup.state = random_state(one)
    setup.kinds = {name: one.kind_of(name) for name in setup.state}
    for kind in ("router", "experts"):
        if kind not in setup.kinds.values():
            kit.note(f"no {kind}", f"no name of full_state is of the kind {kind}:", "nothing would be known of it",
                     "the adapter's kind_of and full_state")  # fmt: skip
    for name, kind in setup.kinds.items():
        if kind == "experts" and setup.state[name].shape[:1] != (one.experts,):
            how = f"has {tuple(setup.state[name].shape)[:1]} experts in dim 0, not the {one.experts} of the layer"
            kit.note("stacked", f"the full tensor {name}", how, "the adapter's full_state")
    look = dict.fromkeys(
        (*TRAINED, "buffer"), "load_full and full_state, and which experts a rank takes of a full tensor"
    )
    one.load_full(setup.state)
    kit.compare_kinds("one rank's value", one.full_state(), setup.state, look)
    many = kit.side(kit.group, load=False).adapter
    many.load_full(setup.state)
    kit.compare_kinds("the value", many.full_state(), setup.state, look)
    setup.seed = seed_for(one, [TOKENS] * kit.ranks, setup.dtype)


def routing(kit: Kit) -> None:
    """Same tokens, same experts, same weights."""
    many, one, tokens = kit.many(), kit.one(), kit.tokens()
    (mine,) = kit.share_of(tokens, many)
    ids, weights = routed(many.adapter, mine.x)
    if one.adapter.together and not kit.setup.same_tokens:
        ids_1, weights_1 = (
            kit.own(all_.split([len(one.x) for one in tokens]), tokens)
            for all_ in routed(one.adapter, torch.cat([one.x for one in tokens]))
        )
    else:
        ids_1, weights_1 = routed(one.adapter, mine.x)
    look = "the router's values and its input on this rank, and whether ids are those of the whole layer"
    experts = one.adapter.experts
    for where, found in (("", ids), ("one rank's ", ids_1)):
        outside = int(((found < -1) | (found >= experts)).sum())
        if outside:
            how = f"name {outside} experts outside of 0..{experts - 1} in {found.numel()} choices"
            kit.note(f"ids{where}", f"{where}routing differs: its ids", how, look)
            return
    got, want = dense_weights(ids, weights, experts), dense_weights(ids_1, weights_1, experts)
    other = int(((got != 0) != (want != 0)).any(dim=1).sum())
    if other:
        kit.note("ids", "routing differs:", f"{other} of {len(want)} tokens go to other experts", look)
        return
    kit.compare("routing differs: the weight of an expert for a token", got, want, look)


def output(kit: Kit) -> None:
    """y of this rank's tokens."""
    many, one, tokens = kit.many(), kit.one(), kit.tokens()
    y = many.backward(kit.share_of(tokens, many)).outputs[0]
    want = kit.own(one.backward(kit.share_of(tokens, one)).outputs, tokens)
    if not want.any():
        kit.note("dead", "one rank's output", "is zero: nothing is compared", "the adapter's load_full")
    ids, _ = routed(one.adapter, kit.share_of(tokens, many)[0].x) if not one.adapter.together else (None, None)
    kit.compare("the output", y, want, f"{_where(kit, y, want, ids)}{LOOK_OUTPUT}", topic="output")


def _where(kit: Kit, y: torch.Tensor, want: torch.Tensor, ids: torch.Tensor | None) -> str:
    """Whether the tokens that are wrong are those that visit one rank's experts."""
    if ids is None or y.shape != want.shape:
        return ""
    right = torch.tensor([near(a, b, kit.setup.precision) for a, b in zip(y, want, strict=True)])
    holder = ids // (kit.setup.factory().experts // kit.ranks)
    found = [rank for rank in range(kit.ranks) if torch.equal(~right, (holder == rank).any(dim=1))]
    return f"the experts of rank {found[0]}, as just its visitors are wrong; " if len(found) == 1 else ""


def gradients(kit: Kit) -> None:
    """Of input, router, experts, shared parts, after one backward."""
    many, one, tokens = kit.many(), kit.one(), kit.tokens()
    results, got = many.grads(kit.share_of(tokens, many))
    results_1, want = one.grads(kit.share_of(tokens, one))
    _alive(kit, want)
    kit.compare("the gradient of the input", results[0].input_grads[0], kit.own(results_1[0].input_grads, tokens),
                LOOK_GRADS["input"], topic="input")  # fmt: skip
    kit.compare_kinds("the gradient", got, want, LOOK_GRADS, parts=functools.cache(lambda: _parts(kit, tokens)))


def _alive(kit: Kit, want: State) -> None:
    """A kind whose gradient is zero everywhere proves nothing, and trains nothing."""
    for kind in sorted(set(kit.setup.kinds.values()) - {"buffer"}):
        if not any(want[name].any() for name in want if kit.setup.kinds.get(name) == kind):
            kit.note(f"dead {kind}", f"one rank's gradient of the {kind}", "is zero or missing: nothing is compared",
                     "the module on one rank, or the adapter's full_grads")  # fmt: skip


def _parts(kit: Kit, tokens: list[Tokens]) -> list[State]:
    """What each rank's tokens contribute to the gradients of one rank."""
    one = kit.one()
    if one.adapter.together or kit.setup.same_tokens:
        return []
    return [one.grads([its])[1] for its in tokens if len(its.x)]


def clip(kit: Kit) -> None:
    """The norm over all parameters of the whole module, what clipping leaves, and that it leaves a small one alone."""
    many, tokens = kit.many(), kit.tokens()
    _, before = many.grads(kit.share_of(tokens, many))
    true = _norm(before)  # of the gradients that there are: whether these are right is a check of its own
    norm = float(many.adapter.clip(0.5 * true))
    how = describe(_as(norm), _as(true), dtype=kit.setup.precision, ranks=kit.ranks)
    if how:
        how = f"is {norm:.6g} instead of {true:.6g}: {_norm_of(kit, norm, before) or how}"
        look = "which parameters it counts: all ranks' experts once, replicated parameters once, over the whole group"
        kit.note("norm", "the total norm of the gradients", how, look)
        return
    looks = dict.fromkeys(TRAINED, "the factor of clipping: the same on all ranks and for all parameters")
    left = many.adapter.full_grads()
    factor = _norm(left) / true  # torch divides by the norm + 1e-6
    factor = factor if math.isclose(factor, 0.5, rel_tol=max(1e-5, TOLERANCES[kit.setup.precision].rtol)) else 0.5
    right = {name: factor * grad for name, grad in before.items()}
    kit.compare_kinds("after clipping to half the norm, the gradient", left, right, looks, kinds=TRAINED)
    _, before = many.grads(kit.share_of(tokens, many))
    many.adapter.clip(2.0 * true)
    kit.compare_kinds("after clipping to twice the norm, the gradient", many.adapter.full_grads(), before, looks,
                      kinds=TRAINED)  # fmt: skip


def _norm(grads: State) -> float:
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))


def _norm_of(kit: Kit, norm: float, grads: State) -> str | None:
    """Of what else `norm` would be the norm."""
    dense = sum(float(g.double().square().sum()) for n, g in grads.items() if kit.setup.kinds[n] != "experts")
    own = [0.0] * kit.ranks
    for name, grad in grads.items():
        if kit.setup.kinds[name] == "experts":
            for rank, part in enumerate(grad.chunk(kit.ranks)):
                own[rank] += float(part.double().square().sum())
    each = [math.sqrt(dense + squared) for squared in own]
    known = {
        "that of this rank's experts and the rest": each[kit.rank],
        "that of rank 0's experts and the rest": each[0],
        "the mean of the ranks' own norms": sum(each) / kit.ranks,
        "the largest of the ranks' own norms": max(each),
        "that of the ranks' own norms, squared and added, so that replicated parameters count once for each rank":
            math.sqrt(sum(one * one for one in each)),
        "the root of the mean square of the ranks' own norms": math.sqrt(sum(one * one for one in each) / kit.ranks),
        "that without the experts": math.sqrt(dense),
        "that of all experts without the rest": math.sqrt(sum(own)),
        "that of this rank's experts": math.sqrt(own[kit.rank]),
        "the sum of the ranks' own norms": sum(each),
    }  # fmt: skip
    for text, value in known.items():
        if near(_as(norm), _as(value), kit.setup.precision, 10.0):
            return text
    whole = _norm(grads)
    return f"{named_factor(norm / whole, kit.ranks)} the norm" if whole else None


def _as(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def micro_batches(kit: Kit) -> None:
    """Two backwards, then one reduction: the mean of both."""
    many, one = kit.many(), kit.one()
    batches = [kit.tokens(), kit.tokens(batch=1)]
    results, got = many.grads(*(kit.share_of(tokens, many) for tokens in batches))
    results_1, want = one.grads(*(kit.share_of(tokens, one) for tokens in batches))
    for result, result_1, tokens in zip(results, results_1, batches, strict=True):
        kit.compare_results(result, result_1, tokens, what="with two micro-batches, ")
    look = {
        kind: f"what is added up over micro-batches and what is reduced once; {text}"
        for kind, text in LOOK_GRADS.items()
    }
    kit.compare_kinds("with two micro-batches, the gradient", got, want, look)


def auxiliary_loss(kit: Kit) -> None:
    """Its value, and its gradient alone; where ranks have other numbers of tokens, too, the last one none."""
    _auxiliary_loss(kit, [TOKENS] * kit.ranks, "")
    if kit.agreed(not kit.notes) and not kit.setup.same_tokens:
        counts = [UNEVEN[rank % len(UNEVEN)] for rank in range(kit.ranks)]
        if kit.setup.factory().may_be_empty:
            counts[-1] = 0
        _auxiliary_loss(kit, counts, f"with {', '.join(map(str, counts))} tokens on the ranks, ")


def _auxiliary_loss(kit: Kit, counts: list[int], what: str) -> None:
    many, one = kit.many(), kit.one()
    tokens = [Tokens(its.x, torch.zeros_like(its.c)) for its in kit.tokens(counts)]
    results, got = many.grads(kit.share_of(tokens, many), aux=True)
    results_1, want = one.grads(kit.share_of(tokens, one), aux=True)
    look = "over which tokens it counts: this rank's, or all ranks' (together = True), and what is averaged"
    mine, losses = results[0].aux[0], results_1[0].aux
    if one.adapter.together and not kit.setup.same_tokens:  # each rank has its part of it, or all have the whole
        kit.compare(f"{what}the mean of the ranks' auxiliary losses", kit.mean(mine), losses[0], look)
    elif len(tokens[kit.rank].x):
        kit.compare(f"{what}the auxiliary loss", mine, kit.own(losses, tokens), look)
    if not any(grad.any() for grad in want.values()):
        kit.note("dead", "one rank's auxiliary loss", "has no gradient: nothing is compared", "the adapter's aux_loss")
    kit.compare(f"{what}the auxiliary loss's gradient of the input", results[0].input_grads[0],
                kit.own(results_1[0].input_grads, tokens), look, topic="input")  # fmt: skip
    kit.compare_kinds(f"{what}the auxiliary loss's gradient", got, want, dict.fromkeys(LOOK_GRADS, look))


def no_tokens(kit: Kit) -> None:
    """The last rank has no tokens."""
    _uneven(kit, [TOKENS] * (kit.ranks - 1) + [0], f"with no tokens on rank {kit.ranks - 1}, ")


def uneven_tokens(kit: Kit) -> None:
    """Every rank has another number of tokens."""
    counts = [UNEVEN[rank % len(UNEVEN)] for rank in range(kit.ranks)]
    _uneven(kit, counts, f"with {', '.join(map(str, counts))} tokens on the ranks, ")


def _uneven(kit: Kit, counts: list[int], what: str) -> None:
    many, one, tokens = kit.many(), kit.one(), kit.tokens(counts)
    results, got = many.grads(kit.share_of(tokens, many))
    results_1, want = one.grads(kit.share_of(tokens, one))
    kit.compare_results(results[0], results_1[0], tokens, what=what)
    kit.compare_kinds(f"{what}the gradient", got, want, LOOK_GRADS, parts=functools.cache(lambda: _parts(kit, tokens)))
