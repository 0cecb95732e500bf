"""What is said about tensors that differ."""

from __future__ import annotations

import pytest
import torch

from moe_overlap.verify.compare import describe
from moe_overlap.verify.tolerances import TOLERANCES

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(5)
WANT = torch.randn(4, 3, dtype=F64, generator=GENERATOR)
PART = torch.randn(4, 3, dtype=F64, generator=GENERATOR)


def said(got, want=WANT, **options):
    return describe(got, want, dtype=F64, **({"ranks": 2} | options))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_within_the_table_nothing_is_said(dtype):
    limit = TOLERANCES[dtype].limit(WANT.abs().max().item())
    assert describe(WANT + 0.9 * limit, WANT, dtype=dtype, ranks=2) is None
    assert describe(WANT + 1.1 * limit * torch.tensor([1, 0, -1.0]), WANT, dtype=dtype, ranks=2) is not None


@pytest.mark.parametrize(
    ("factor", "ranks", "words"),
    [
        (4.0, 4, "is 4 times (= EP) what"),
        (0.25, 4, "is 0.25 times (= 1/EP) what"),
        (16.0, 4, "is 16 times (= EP squared) what"),
        (3**0.5, 3, "is 1.73 times (= sqrt(EP)) what"),
        (-1.0, 2, "is -1 times what"),
        (1.5, 2, "is 1.5 times what"),
        (1.0001, 2, "is 1.0001 times what"),
    ],
)
def test_factors(factor, ranks, words):
    assert words in said(WANT * factor, ranks=ranks)


def test_top_k_is_named_where_it_is_not_the_ranks():
    assert "(= top_k)" in said(WANT * 3, top_k=3)
    assert "(= EP)" in said(WANT * 2, top_k=2)


def test_one_rank_explains_nothing():
    assert said(WANT * 2, ranks=1) == "is 2 times what it should be"


def test_zeros_and_what_is_not_finite():
    assert said(torch.zeros_like(WANT)) == "is zero"
    assert said(WANT / torch.tensor([1.0, 0.0, 1.0])) == "has 4 entries of 12 that are not finite"
    assert said(WANT, WANT * float("nan")) == "cannot be compared: one rank's has 12 entries of 12 that are not finite"
    assert said(WANT, torch.zeros_like(WANT)).endswith(", and should be zero, in 12 of 12 entries")


def test_shapes():
    assert said(WANT[:2]) == "has the shape (2, 3) instead of (4, 3)"


def test_parts_of_ranks():
    parts = [PART, WANT - PART]
    assert said(PART, parts=parts) == "has the part of the tokens of rank 0 alone"
    assert said(2 * (WANT - PART), parts=parts) == "has the part of the tokens of rank 1 alone, 2 times (= EP)"
    three = [PART, WANT - 2 * PART, PART.clone()]
    assert said(PART + three[1], parts=three, ranks=3) == "has the part of the tokens of ranks 0, 1 alone"


def test_experts_of_a_rank():
    got = WANT.clone()
    got[2:] *= 0.5
    assert said(got, experts=True) == "is 0.5 times (= 1/EP) what it should be for the experts 2..3 of rank 1"
    swapped = said(WANT.roll(2, 0), experts=True)
    assert swapped.startswith("is that of the experts of rank 1 for the experts 0..1 of rank 0; is that of the experts")


def test_the_rest_is_measured():
    got = WANT.clone()
    got[0, 0] += WANT.abs().max()
    assert said(got) == "differs by up to 1 of its largest entry, in 1 of 12 entries"


def test_no_entries():
    assert said(WANT[:0], WANT[:0]) is None
