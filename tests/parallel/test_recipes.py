"""docs/parallel.md: every program of the page runs on gloo ranks, and those that train do what one process would."""

from __future__ import annotations

import re
import runpy
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.parallel.model import whole
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "parallel.md").read_text()
PREAMBLE, *PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TRAINING = [program for program in PROGRAMS if "loss_of(" in program]


def ranks_of(program: str) -> int:
    return 4 if "(2, 2)" in program else 2


def run_program(program):
    """The names that a program leaves behind."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(program)
        file.flush()
        return runpy.run_path(file.name)


def run(program):
    """What a program leaves in `model`, whole where sharded. In float64, so that nothing else than rounding differs."""
    torch.set_default_dtype(torch.float64)
    try:
        names = run_program(PREAMBLE + program)
    finally:
        torch.set_default_dtype(torch.float32)
    if program not in TRAINING:
        return None
    return {name: whole(parameter.detach()) for name, parameter in names["model"].named_parameters()}


@lru_cache(maxsize=2)
def one_process(ranks):
    """The same training with all experts here and the tokens of all ranks."""
    torch.set_default_dtype(torch.float64)
    here = dist.get_rank
    try:
        names = run_program(PREAMBLE)
        model = names["make"](None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            for rank in range(ranks):
                dist.get_rank = lambda rank=rank: rank
                (names["loss_of"](model, step) / ranks).backward()
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
            optimizer.step()
    finally:
        dist.get_rank = here
        torch.set_default_dtype(torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_all_programs_are_found():
    assert len(PROGRAMS) == PAGE.count("```") // 2 - 1 and len(TRAINING) == 6
    assert sum(ranks_of(program) == 4 for program in TRAINING) == 2


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_every_program_does_what_one_process_would(number):
    program = PROGRAMS[number]
    ranks = ranks_of(program)
    results = gloo_pool(ranks).run(run, program)
    if program not in TRAINING:
        return
    for name, want in one_process(ranks).items():
        if "experts." not in name or "shared_expert" in name:
            for got in results:
                close(got[name], want)
                same_bits(got[name], results[0][name])
        else:
            close(torch.cat([results[rank][name] for rank in range(2)]), want)
            for rank in range(ranks):
                same_bits(results[rank][name], results[rank % 2][name])


def seeded_apart(program):
    """The routers' weights before and after the program, on a rank that was seeded with its number."""
    apart = PREAMBLE.replace("torch.manual_seed(0)", "torch.manual_seed(dist.get_rank())")
    assert apart != PREAMBLE
    made, names = run_program(apart), run_program(apart + program)
    before, after = made["make"](dist.group.WORLD), names["model"]
    return [[block.moe.router.weight.detach() for block in (one[1], one[2])] for one in (before, after)], [
        block.moe.experts.down_proj.detach() for block in (after[1], after[2])
    ]


def test_routers_of_ranks_that_were_seeded_apart_are_equal_after_the_copy():
    (program,) = (one for one in PROGRAMS if "dist.broadcast(" in one)
    (first, first_experts), (second, second_experts) = gloo_pool(2).run(seeded_apart, program)
    for block in range(2):
        assert not torch.equal(first[0][block], second[0][block])
        same_bits(first[1][block], second[1][block])
        same_bits(first[1][block], first[0][block])
        assert not torch.equal(first_experts[block], second_experts[block])
