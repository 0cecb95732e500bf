"""torch.distributed.checkpoint saves model and optimizer on n ranks and loads them on m, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.saved import OPTIMIZERS, WRAPS, Job
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits

STEPS = 2


def saved(folder: str, wrap: str, grid: tuple[int, int] | None = None) -> list[Any]:
    """Two steps, saved; the whole states, by optimizer."""
    states = []
    for kind in OPTIMIZERS:
        job = Job(wrap, kind, grid=grid)
        for number in range(STEPS):
            job.step(number)
        job.save(f"{folder}/{kind}")
        states.append(job.whole())
    return states


def loaded(folder: str, wrap: str, grid: tuple[int, int] | None = None) -> list[Any]:
    """The whole states after loading into other weights, and those after one step more."""
    states = []
    for kind in OPTIMIZERS:
        job = Job(wrap, kind, seed=99, grid=grid)
        job.load(f"{folder}/{kind}")
        states.append(job.whole())
        job.step(STEPS)
        states.append(job.whole())
    return states


def uninterrupted() -> list[Any]:
    """On one rank, in one go."""
    states = []
    for kind in OPTIMIZERS:
        job = Job("plain", kind)
        for number in range(STEPS + 1):
            job.step(number)
        states.append(job.whole())
    return states


def check(got: dict[str, Any], want: dict[str, Any], *, exact: bool) -> None:
    for part in ("model", "optimizer"):
        assert got[part].keys() == want[part].keys()
        for name, value in want[part].items():
            if isinstance(value, torch.Tensor):
                (same_bits if exact else close)(got[part][name], value)
            else:
                assert got[part][name] == value


def check_resharded(before: list[list[Any]], after: list[list[Any]]) -> None:
    """Every rank has the same whole state: as it was saved, and after a step as if nothing had been saved."""
    straight = uninterrupted()
    for states in after:
        for at in range(len(OPTIMIZERS)):
            check(states[2 * at], before[0][at], exact=True)
            check(states[2 * at + 1], straight[at], exact=False)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_what_n_ranks_save_m_ranks_load(n, m, tmp_path):
    before = gloo_pool(n).run(saved, str(tmp_path), "plain")
    check_resharded(before, gloo_pool(m).run(loaded, str(tmp_path), "plain"))


@pytest.mark.parametrize(("n", "m"), [(2, 3), (3, 1), (1, 2)])
@pytest.mark.parametrize("wrap", WRAPS[1:])
def test_wrapped_models(wrap, n, m, tmp_path):
    before = gloo_pool(n).run(saved, str(tmp_path), wrap)
    check_resharded(before, gloo_pool(m).run(loaded, str(tmp_path), wrap))


@pytest.mark.parametrize(("first", "then"), [("ddp", "fsdp"), ("fsdp", "plain"), ("plain", "ddp")])
def test_from_one_wrapper_to_another(first, then, tmp_path):
    before = gloo_pool(2).run(saved, str(tmp_path), first)
    check_resharded(before, gloo_pool(2).run(loaded, str(tmp_path), then))


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp_replicas"])
def test_from_two_replicas_of_two_ranks(wrap, m, tmp_path):
    before = gloo_pool(4).run(saved, str(tmp_path), wrap, (2, 2))
    check_resharded(before, gloo_pool(m).run(loaded, str(tmp_path), "plain"))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp_replicas"])
def test_to_two_replicas_of_two_ranks(wrap, tmp_path):
    before = gloo_pool(3).run(saved, str(tmp_path), "plain")
    check_resharded(before, gloo_pool(4).run(loaded, str(tmp_path), wrap, (2, 2)))
