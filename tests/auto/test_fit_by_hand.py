"""The fit where one part of a step differs from what the others say: every part counts, and where it belongs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_overlap.auto.fit import _compute_slowdown, fit
from moe_overlap.auto.probe_pairs import CHUNKS, OVERLAPPED
from moe_overlap.schedule.actions import VERBS
from moe_overlap.schedule.builders import window
from tests.auto.probes import TRUE, probe

WIRE_VERBS = ("D", "C", "Ct", "Dt")


def verb(text):
    return text.rstrip("0123456789")


def scaled(one, factor_of):
    """The probe with the seconds of each action times factor_of(its verb); its whole step takes what its parts do."""
    seconds = {text: s * factor_of(verb(text)) for text, s in one.seconds.items()}
    whole_s = dict(one.host_s)
    for text, s in seconds.items():
        whole_s[VERBS[verb(text)].phase] += s
    return replace(one, seconds=seconds, whole_s=whole_s)


def fitted(probes):
    return fit(probes, probes[CHUNKS.index(OVERLAPPED)], None, source="by hand")


@pytest.mark.parametrize("other", WIRE_VERBS)
def test_one_exchange_that_takes_longer_than_the_three_others_is_overruled(other):
    true = TRUE.exchange["inter"]
    found = fitted([scaled(probe(TRUE, n), lambda v: 5.0 if v == other else 1.0) for n in CHUNKS]).exchange["inter"]
    assert (found.alpha_s, found.beta_s) == pytest.approx((true.alpha_s, true.beta_s))


@pytest.mark.parametrize("known", WIRE_VERBS)
def test_each_of_the_four_exchanges_counts(known):
    """Where only one of them was measured, the wire is what that one says."""
    factor = {v: float(v == known) for v in WIRE_VERBS}
    true = TRUE.exchange["inter"]
    found = fitted([scaled(probe(TRUE, n), lambda v: factor.get(v, 1.0)) for n in CHUNKS]).exchange["inter"]
    assert (found.alpha_s, found.beta_s) == pytest.approx((true.alpha_s, true.beta_s))


def test_the_agreement_is_a_part_of_what_lies_outside():
    probes = [replace(probe(TRUE, n), agree_s=s) for n, s in zip(CHUNKS, (1e-6, 3e-6, 2e-6), strict=True)]
    assert fitted(probes).agree_s == min(2e-6, TRUE.outside_s)
    assert fitted([replace(one, agree_s=1e3) for one in probes]).agree_s == pytest.approx(TRUE.outside_s)


def test_the_overlapped_probe_is_compared_with_the_joined_one_of_as_many_chunks():
    """More chunks compute longer, which no slowdown makes them."""
    joined = [probe(TRUE, n, compute_s=s) for n, s in zip(CHUNKS, (1.0, 1.3, 2.0), strict=True)]
    alone, slower = (probe(TRUE, OVERLAPPED, hidden_s=1.0, compute_s=s) for s in (1.3, 1.55))
    assert _compute_slowdown(joined, alone) == 1.0
    assert _compute_slowdown(joined, slower) == pytest.approx(1 / 0.75)


COMPUTE = {
    "forward": ("experts", "permute", "unpermute"),
    "backward": ("experts_dgrad", "experts_wgrad", "unpermute_backward", "permute_backward"),
}


def test_compute_of_each_phase_is_scaled_by_what_that_phase_took_longer():
    """Forward as a whole took 1.1 times its parts, backward 1.3 times."""
    factor = {"forward": 1.1, "backward": 1.3}

    def longer(one):
        wire_s = {"forward": 0.0, "backward": 0.0}
        for text, s in one.seconds.items():
            wire_s[VERBS[verb(text)].phase] += s if VERBS[verb(text)].lane == "wire" else 0.0
        fixed_s = {phase: s + 4 * TRUE.issue_s * one.chunks for phase, s in wire_s.items()}
        return replace(one, whole_s={p: fixed_s[p] + f * (one.whole_s[p] - fixed_s[p]) for p, f in factor.items()})

    joined = [longer(probe(TRUE, n)) for n in CHUNKS]
    found = fit(joined, joined[1], longer(probe(TRUE, 4, by="experts")), source="by hand")
    for phase, names in COMPUTE.items():
        for name in names:
            assert getattr(found, name)(1000) == pytest.approx(factor[phase] * getattr(TRUE, name)(1000)), name
    assert found.expert_s == pytest.approx(1.1 * TRUE.expert_s)
    assert found.expert_dgrad_s == pytest.approx(1.3 * TRUE.expert_dgrad_s)
    assert found.outside_s == pytest.approx(1.1 * TRUE.outside_s)
    assert found.outside_backward_s == pytest.approx(1.3 * TRUE.outside_backward_s)
    assert found.backbone_s == pytest.approx([1.1 * s for s in TRUE.backbone_s])
    assert found.backbone_backward_s == pytest.approx([1.3 * s for s in TRUE.backbone_backward_s])
    assert found.issue_s == pytest.approx(TRUE.issue_s)
    assert found.exchange["inter"](100) == pytest.approx(TRUE.exchange["inter"](100))


def test_starting_an_exchange_costs_the_mean_of_both_phases():
    """Autograd's nodes make it dearer in backward; the model has one figure."""

    def host(one):
        return replace(one, host_s={"forward": 1e-3 + 4 * 1e-6 * one.chunks, "backward": 4 * 5e-6 * one.chunks})

    both = [host(probe(TRUE, n)) for n in CHUNKS]
    assert fitted(both).issue_s == pytest.approx(3e-6)
    forward = [replace(one, **{of: {"forward": getattr(one, of)["forward"]} for of in ("host_s", "whole_s")})
               for one in both]  # fmt: skip
    assert fitted(forward).issue_s == pytest.approx(1e-6), "the only one there is"


def test_a_probe_beside_which_something_else_ran_is_a_misfit():
    probes = [probe(TRUE, n, pair_of=lambda chunks: window(2, 1, chunks=chunks).join()) for n in CHUNKS]
    assert fitted(probes).misfit < 0.02
    slow = replace(probes[-1], whole_s={phase: 2 * seconds for phase, seconds in probes[-1].whole_s.items()})
    assert 0.4 < fitted([*probes[:-1], slow]).misfit < 0.6
