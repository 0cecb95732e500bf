"""The three numbers by which ranks see that they hold the same weights of what each of them has whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_overlap.agreement.agree import agree_on
from moe_overlap.agreement.common import TOLERANCE, WORDS, differing, fingerprint, is_compared
from moe_overlap.agreement.record import COMMON_FIELDS, RECORD_FIELDS
from moe_overlap.errors import ConfigError, PlanMismatch
from tests.agreement.test_plan import table_of

CPU = torch.device("cpu")


def weights(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((8, 33), (5,), (2, 3, 7), ())]


def said(*ranks: list[torch.Tensor]) -> np.ndarray:
    return torch.stack([fingerprint(one, CPU) for one in ranks]).numpy()


def test_steps_are_powers_of_two() -> None:
    assert [step for step in range(70) if is_compared(step)] == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_weights_are_alike_and_those_of_two_seeds_are_not(dtype: torch.dtype) -> None:
    assert differing(said(weights(0, dtype), weights(0, dtype), weights(0, dtype))) is None
    found = [
        differing(said(weights(seed, dtype), weights(seed, dtype), weights(seed + 1, dtype))) for seed in range(200)
    ]
    shares = [one[2] for one in found if one is not None and one[:2] == (0, 2)]
    assert len(shares) == 200 and min(shares) > 10 * TOLERANCE


def test_the_first_two_that_differ_are_named() -> None:
    assert differing(said(weights(0), weights(1), weights(2)))[:2] == (0, 1)  # type: ignore[index]
    words = said(weights(0), weights(1), weights(2), weights(1))
    words[0] = 0  # says nothing
    assert differing(words)[:2] == (1, 2)  # type: ignore[index]
    words[2] = 0
    assert differing(words) is None


@pytest.mark.parametrize("size, alike", [(1e-7, True), (1e-4, True), (0.02, False)])
def test_last_bits_count_as_equal_and_a_step_apart_does_not(size: float, alike: bool) -> None:
    for seed in range(50):
        apart = [one + size * other for one, other in zip(weights(seed), weights(seed + 1000), strict=True)]
        assert (differing(said(weights(seed), apart)) is None) == alike, seed


@pytest.mark.parametrize("change", [
    lambda w: [w[0].flip(0), *w[1:]],  # the same numbers elsewhere: rows, columns, whole tensors
    lambda w: [w[0].flip(1), *w[1:]],
    lambda w: [w[2], w[1], w[0], w[3]],
    lambda w: [-one for one in w],
    lambda w: [one * 1.01 for one in w],
    lambda w: w[:3],
    lambda w: [torch.zeros_like(one) for one in w],
    lambda w: [w[0].masked_fill(torch.arange(33) == 4, float("nan")), *w[1:]],
    lambda w: [w[0], w[1], w[2], torch.tensor(float("inf"))],
])  # fmt: skip
def test_what_is_another_model_is_seen(change) -> None:
    found = differing(said(weights(0), change(weights(0))))
    assert found is not None and found[:2] == (0, 1) and found[2] > TOLERANCE
    alike = change(weights(0))
    assert differing(said(alike, alike)) is None  # also where all have NaN, which is for the router to refuse


def test_what_no_rank_has_whole_says_nothing() -> None:
    class Sharded(torch.Tensor):
        """As DTensors are, and quantised weights of other libraries."""

    others = [torch.randn(3, 4).as_subclass(Sharded), torch.ones(4).to(torch.float8_e4m3fn), torch.arange(4)]
    assert fingerprint([*others, torch.empty(0, 3)], CPU).tolist() == [0] * WORDS
    assert fingerprint([], CPU).tolist() == [0] * WORDS and differing(said([], [])) is None
    assert fingerprint([torch.zeros(2)], CPU).tolist() != [0] * WORDS  # zeros are weights


def test_where_a_part_is_not_here_nothing_is_said() -> None:
    assert fingerprint([torch.ones(3), torch.ones(2, 2, device="meta")], CPU).tolist() == [0] * WORDS


@pytest.mark.parametrize("behind", [1, 40, 1000])
def test_a_small_part_before_many_others_is_seen(behind: int) -> None:
    others = [torch.randn(4, 4, generator=torch.Generator().manual_seed(n)) for n in range(behind)]
    found = [differing(said([*weights(seed), *others], [*weights(seed + 1), *others])) for seed in range(50)]
    assert all(one is not None and one[2] > 10 * TOLERANCE for one in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_many_numbers_is_that_of_float64(dtype: torch.dtype) -> None:
    table = torch.full((4096, 1024), 0.0173).to(dtype)
    norm = float(fingerprint([table], CPU).view(torch.float64)[0]) - 1.0
    assert norm == pytest.approx(float(table[0, 0]) * 2048, rel=1e-6)


def test_modes_of_the_caller_see_nothing_of_it() -> None:
    class Seen(TorchDispatchMode):
        """As that of a selective checkpoint, which keeps results in order of the calls."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    given = weights(0)
    with Seen():
        fingerprint(given, CPU)


@pytest.mark.parametrize("status, error, words", [
    (0, PlanMismatch, "ranks 0 and 2 have different weights .*router.* seed all ranks alike.*step 3"),
    (1, ConfigError, "refused on rank 2"),
])  # fmt: skip
def test_all_ranks_raise_alike_and_a_refusal_comes_first(status: int, error: type[Exception], words: str) -> None:
    table = table_of(3, 3, status=status)
    places = [RECORD_FIELDS.index(name) for name in COMMON_FIELDS]
    table[:, places] = torch.from_numpy(said(weights(0), weights(0), weights(1)))
    for rank in range(3):
        with pytest.raises(error, match=words) as caught:
            agree_on(table, rank=rank, num_slots=3)
        assert error is ConfigError or caught.value.peer == (0 if rank == 2 else 2)
    table[:, places] = table[0, places]
    if status == 0:
        agree_on(table, rank=0, num_slots=3)
