"""The equality matrix on the Triton kernels, under the interpreter: the whole layer, small sizes.

Every operator that has a Triton kernel runs on it, in the schedule's pieces too. bfloat16 and float64 are not for the
interpreter and the kernels; one tolerance table as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from moe_overlap.ops import triton_kernels
from moe_overlap.schedule import backward
from moe_overlap.transport.local import LocalTransport
from tests.equality import Case, check_right, run_both
from tests.ops.interpreted import needs_triton, on_triton
from tests.ranks import virtual_world
from tests.tolerances import same_bits

needs_triton(interpreter=True)

from moe_overlap.ops import expert_mlp_triton as mlp  # noqa: E402

LIMIT_S = 150.0  # the interpreter takes its time on a busy machine
PIECES = {"expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad"}
CASES = (
    Case(2, "chunked-tokens", 2, torch.float32, "uneven"),
    Case(2, "chunked-experts", 2, torch.float16, "empty_expert"),
    Case(2, "chunked-apart", 3, torch.float32, "no_tokens"),
    Case(2, "shared_expert-1", 2, torch.float32, "one_expert"),
    Case(2, "shortcut-pos2", 1, torch.float16, "no_tokens"),
)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Everything runs on Triton; the operators that did."""
    names: set[str] = set()
    function = triton_kernels._function

    def noting(op: str) -> Callable[..., Any]:
        names.add(op)
        return function(op)

    monkeypatch.setattr(triton_kernels, "_function", noting)
    with on_triton():
        yield names


@pytest.mark.parametrize("case", CASES, ids=str)
def test_overlap_on_equals_off_and_the_oracle(case: Case, called: set[str]) -> None:
    world = virtual_world(case.world, seed=1)
    results = world.run(lambda me: run_both(case, me.transport(), me.transport(), me.rank), timeout_s=LIMIT_S)
    check_right(case, results)
    assert {"row_map", "permute", "combine", "combine_backward"} | PIECES <= called


def test_one_rank_without_an_exchange(called: set[str]) -> None:
    """The operators in a row, differentiated by autograd, without the schedule's executor."""
    case = Case(1, "serial", 1, torch.float32, "uneven")
    check_right(case, [run_both(case, LocalTransport(), LocalTransport(), 0)])
    assert {"row_map", "permute", "expert_mlp", "expert_mlp_backward", "combine", "combine_backward"} <= called


def test_multiprocessors_kept_for_exchanges_change_no_bit(called: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for the experts, and as many as there are."""
    case, budgets, launch = CASES[0], set(), mlp._Launcher._launch

    def noting(self: Any, *args: Any, **keywords: Any) -> None:
        budgets.add(self.num_sms)
        launch(self, *args, **keywords)

    monkeypatch.setattr(mlp._Launcher, "_launch", noting)
    found = []
    for num_sms in (None, 1):
        monkeypatch.setattr(backward, "experts_sms", lambda *_, num_sms=num_sms: num_sms)
        world = virtual_world(case.world, seed=1)
        results = world.run(lambda me: run_both(case, me.transport(), me.transport(), me.rank), timeout_s=LIMIT_S)
        found.append(results)
        assert budgets == {num_sms}
        budgets.clear()
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys() and len(one) > 4
        for name in one:
            same_bits(one[name], other[name])
