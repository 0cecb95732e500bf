"""The kit finds published bugs, planted in two layers as changes of source, and is silent on right layers."""

from __future__ import annotations

import pytest

from moe_overlap.verify.run import CHECKS
from tests.verify.cases import MUTANTS, VARIANTS
from tests.verify.judging import judged


def _cases(by_layer):
    return [
        pytest.param(layer, one, id=f"{layer}: {one.name}", marks=[pytest.mark.soak] if one.soak else [])
        for layer in by_layer
        for one in by_layer[layer]
    ]


@pytest.mark.parametrize(("layer", "mutant"), _cases(MUTANTS))
def test_mutant_is_named(layer, mutant):
    report = judged(layer, patches=mutant.patches, attributes=mutant.attributes)
    found = {finding.check for finding in report.findings if not finding.follows}
    assert found & set(mutant.named_by), f"{mutant.source}: expected {mutant.named_by}\n" + "\n".join(report.lines())


@pytest.mark.parametrize(("layer", "variant"), _cases(VARIANTS))
def test_right_variant_is_right(layer, variant):
    report = judged(layer, patches=variant.patches, attributes=variant.attributes, ranks=variant.ranks,
                    dtype=variant.dtype)  # fmt: skip
    assert not report.findings, "\n".join(report.lines())
    assert report.passed


@pytest.mark.parametrize("layer", MUTANTS)
def test_patches_fit_the_sources(layer):
    for mutant in (*MUTANTS[layer], *VARIANTS[layer]):
        sources = {}
        for patch in mutant.patches:
            sources[patch.path] = patch.apply(sources.get(patch.path) or patch.path.read_text(encoding="utf-8"))
        for path, source in sources.items():
            compile(source, str(path), "exec")


def test_every_check_has_a_mutant_that_it_has_to_name():
    alone = {mutant.named_by[0] for mutants in MUTANTS.values() for mutant in mutants if len(mutant.named_by) == 1}
    assert alone == {check.title for check in CHECKS}


def test_names_are_there_once():
    for layer in MUTANTS:
        names = [one.name for one in (*MUTANTS[layer], *VARIANTS[layer])]
        assert len(names) == len(set(names))
