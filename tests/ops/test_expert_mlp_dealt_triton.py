"""Tiles of the expert MLP dealt out by a counter (MOE_OVERLAP_TILES=dealt), under the interpreter: the bits of those in
turn, and every counter zero when its kernel begins.

The interpreter runs one program after another, so the first one takes every tile: the others are as late as can be.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from tests import tolerances
from tests.ops.cases import randn, weights
from tests.ops.interpreted import needs_triton, on_triton
from tests.ops.mapped import BOUNDS, MARK, mapped, run
from tests.ops.test_expert_mlp_pieces_triton import everything, inputs
from tests.ops.test_expert_mlp_triton import gradients, problem, target_of

needs_triton(interpreter=True)

from moe_overlap.ops import expert_mlp_triton as mlp  # noqa: E402
from moe_overlap.ops.expert_mlp_tiles_triton import COUNTERS  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
F32, F16 = torch.float32, torch.float16
PIECES = ("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad")
WHOLE = ("expert_mlp", "expert_mlp_backward")
UNEVEN = ("balanced", "empty experts", "a tail of several tiles", "nobody")


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for have, should in zip(got, want, strict=True):
        tolerances.same_bits(have, should)


@pytest.fixture
def deal(monkeypatch: pytest.MonkeyPatch):
    """deal(): from here on tiles are dealt out."""
    monkeypatch.delenv("MOE_OVERLAP_TILES", raising=False)
    return lambda: monkeypatch.setenv("MOE_OVERLAP_TILES", "dealt")


@pytest.mark.parametrize("name, kind, dtype, mapped_rows", [
    *((name, "swiglu", F32, True) for name in UNEVEN),
    ("empty experts", "gelu", F16, False),
    ("a tail of several tiles", "relu", F32, False),
])  # fmt: skip
def test_the_whole_operator(name, kind, dtype, mapped_rows, deal) -> None:
    values = problem(name, dtype, kind, mapped=mapped_rows)
    with on_triton(*WHOLE):
        want = gradients(values, kind)
        deal()
        same(gradients(values, kind), want)


@pytest.mark.parametrize("kind, dtype", [("swiglu", F32), ("gelu", F16)])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_pieces_through_a_map(bounds, kind, dtype, deal) -> None:
    case = mapped(kind, dtype, bounds, ffn=37, hidden=22)
    with on_triton(*PIECES):
        want = run(case, mark=MARK)
        deal()
        got = run(case, mark=MARK)
    same(list(got.values()), list(want.values()))


def test_the_pieces_in_ranges_as_of_chunks_and_a_group_of_experts(deal) -> None:
    with on_triton(*PIECES):
        want = everything(*inputs(), experts=(1, 3))
        deal()
        same(everything(*inputs(), experts=(1, 3)), want)


def test_one_program_many_and_descriptors(deal, monkeypatch: pytest.MonkeyPatch) -> None:
    values = problem("empty experts", F32, "swiglu", mapped=False, hidden=24, ffn=20)
    with on_triton(*WHOLE):
        want = gradients(values, "swiglu")
        deal()
        for name, value in (("INTERPRET_DESCRIPTORS", True), ("target", target_of(1)), ("target", target_of(50))):
            with monkeypatch.context() as patch:
                patch.setattr(mlp, name, value)
                same(gradients(values, "swiglu"), want)


@pytest.mark.parametrize("rows", [0, 5])
def test_no_tokens(rows, deal) -> None:
    deal()
    w_in, w_out = weights(3, 22, 5, "gelu", F32, grad=True)
    offs = torch.full((3,), rows, dtype=torch.int32)
    x, row_to_token = torch.zeros(0, 22, requires_grad=True), torch.full((rows,), -1, dtype=torch.int32)
    with on_triton(*WHOLE):
        y = ops.expert_mlp(x, w_in, w_out, offs, kind="gelu", row_to_token=row_to_token)
        found = torch.autograd.grad(y.sum(), (x, w_in, w_out))
    assert y.shape == (rows, 22) and not y.any() and not any(gradient.any() for gradient in found)


class Seen:
    """Launches by their counters: (kernel, address of its counter, its value when the kernel begins and when it ends,
    programs)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[str, int, int, int, int]] = []
        self.lists = 0
        self._launch = mlp.launch
        patch.setattr(mlp, "launch", self)

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **keywords: Any) -> None:
        self.lists += kernel.__name__ == "list_tiles_kernel"
        counter = args[kernel.arg_names.index("counter")] if "counter" in kernel.arg_names else None
        before = -1 if counter is None else int(counter)
        self._launch(kernel, grid, *args, **keywords)
        if counter is not None:
            self.rows.append((kernel.__name__, counter.data_ptr(), before, int(counter), grid[0]))


def test_every_launch_has_a_word_of_its_own_that_is_zero_when_it_begins(deal, monkeypatch) -> None:
    """Several launches over one list, and twice: each takes all tiles, and one word more for each of its programs."""
    deal()
    values = problem("balanced", F32, "swiglu", mapped=True)
    with on_triton(*WHOLE):
        seen = Seen(monkeypatch)
        gradients(values, "swiglu")
    tiles = 3 + 1  # of 13, 13, 13 rows and a tail of one
    columns = {"up_kernel": 2, "rows_kernel": 2, "hidden_gradient_kernel": 2}
    names = ["up_kernel", "rows_kernel", "hidden_gradient_kernel", "weights_kernel", "weights_kernel", "rows_kernel"]
    assert [row[0] for row in seen.rows] == names and seen.lists == 2 <= COUNTERS
    for name, _, before, after, programs in seen.rows:
        count = tiles * columns[name] if name in columns else None
        assert before == 0 and (count is None or after == count + programs), name
    assert [row[3] - row[4] for row in seen.rows if row[0] == "weights_kernel"] == [3 * 2 * 2, 3 * 3 * 2]
    for some in (seen.rows[:2], seen.rows[2:]):
        assert len({address for _, address, *_ in some}) == len(some)


def test_weights_alone_have_a_word_too(deal, monkeypatch) -> None:
    """Without a list there is none behind it; many launches over one list use its words up."""
    deal()
    x, dy, w_in, w_out = inputs()
    seen = Seen(monkeypatch)
    with on_triton(*PIECES):
        dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
        h, a = randn(40, w_in.shape[1], dtype=F32), randn(40, w_out.shape[2], dtype=F32)
        ops.expert_mlp_wgrad(x, dy, h, a, [13, 26, 39], dw_in=dw_in, dw_out=dw_out)
    assert seen.lists == 0 and [row[2] for row in seen.rows] == [0, 0]


@pytest.mark.parametrize("text", ["in_turn", ""])
def test_in_turn_is_the_default_and_has_no_counters(text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_OVERLAP_TILES", text)
    seen = Seen(monkeypatch)
    with on_triton(*WHOLE):
        gradients(problem("balanced", F32, "relu", mapped=False), "relu")
    assert seen.lists == 2 and not seen.rows


def test_any_other_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_OVERLAP_TILES", "stolen")
    with on_triton(*WHOLE), pytest.raises(ConfigError, match="MOE_OVERLAP_TILES = 'stolen': expected in_turn or dealt"):
        gradients(problem("balanced", F32, "relu", mapped=False), "relu")
