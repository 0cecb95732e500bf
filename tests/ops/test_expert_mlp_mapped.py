"""The pieces of the expert MLP through a map of rows and with a factor for each row, on CPU implementations."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import expert_mlp_grouped, registry
from tests import tolerances
from tests.ops.cases import KINDS, randn, weights
from tests.ops.mapped import BOUNDS, FFN, HIDDEN, MARK, READ, ROWS, Mapped, mapped, run, wanted

pytestmark = pytest.mark.usefixtures("poison")
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
PIECES = ("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad")
BY_ROW = ("y", "h", "dx", "dh", "a", "dscale")


@pytest.fixture(params=["reference", "grouped_mm"])
def implementation(request) -> Iterator[str]:
    """Every implementation that runs compiled on a CPU."""
    if request.param == "grouped_mm" and (why_not := expert_mlp_grouped._obstacle(torch.device("cpu"), F32)):
        pytest.skip(why_not)
    with ExitStack() as stack:
        for op in PIECES:
            stack.enter_context(registry.force(op, request.param))
        yield request.param


def case_for(implementation: str, kind: str, dtype: torch.dtype, bounds: str) -> Mapped:
    case = mapped(kind, dtype, bounds)
    takes = case.starts is None and case.inside and dtype != F64
    if implementation == "grouped_mm" and not takes:
        pytest.skip("adjacent groups of 32 and 16 bit alone, and some rows")
    return case


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_values_and_gradients(implementation, dtype, kind, bounds) -> None:
    case = case_for(implementation, kind, dtype, bounds)
    got = run(case)
    assert got["dscale"].dtype == case.scale.dtype
    for name, want in wanted(case).items():
        have = got[name][case.inside] if name in BY_ROW else got[name]
        tolerances.close(have, want, dtype)
    for name in BY_ROW:
        assert not got[name][case.outside].any(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_buffers_are_written_in_the_groups_only_and_hold_the_same(implementation, kind, bounds) -> None:
    case = case_for(implementation, kind, F32, bounds)
    new, given = run(case), run(case, mark=MARK)
    for name in BY_ROW:
        assert (given[name][case.outside] == MARK).all(), name
        tolerances.same_bits(given[name][case.inside], new[name][case.inside])


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_dh_in_place_of_h_changes_no_bit(implementation, dtype, kind, bounds) -> None:
    case = case_for(implementation, kind, dtype, bounds)
    beside, in_place = run(case, mark=MARK), run(case, mark=MARK, in_place=True)
    for name in beside:
        tolerances.same_bits(in_place[name], beside[name])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_dh_in_place_of_h_without_map_and_scale(implementation, dtype, kind) -> None:
    """Rows enough that torch cuts the work in pieces of its own, and a width that no vector divides."""
    ffn, hidden, ends = 104, 8, [170, 170, 400]
    w_in, w_out = weights(3, hidden, ffn, kind, dtype)
    x, dy = randn(400, hidden, dtype=dtype), randn(400, hidden, dtype=dtype, seed=5)
    _, h = ops.expert_mlp_forward(x, w_in, w_out, ends, kind=kind)
    want = ops.expert_mlp_dgrad(dy, h, w_in, w_out, ends, kind=kind)
    got = ops.expert_mlp_dgrad(dy, h, w_in, w_out, ends, kind=kind, dh=h)
    assert got.dh is h and got.dscale is None and want.dscale is None
    for have, should in zip(got[:3], want[:3], strict=True):
        tolerances.same_bits(have, should)


@pytest.mark.parametrize("kind", KINDS)
def test_dscale_is_the_slope_of_the_loss_also_where_the_scale_is_zero(kind) -> None:
    case, step = mapped(kind, F64, "apart"), 1e-6
    scale = torch.where(case.scale.isnan(), 0.0, case.scale)
    index = case.rows.clamp(max=READ - 1).long()
    assert (scale[case.inside] == 0).any() and (scale[case.inside] < 0).any()

    def loss(scale: Tensor) -> float:
        y, _ = ops.expert_mlp_forward(
            case.x, case.w_in, case.w_out, case.ends, starts=case.starts, kind=kind, rows=case.rows, scale=scale
        )
        return float((y * case.dy[index]).sum())

    got = run(replace(case, scale=scale))["dscale"]
    slopes = []
    for row in range(ROWS):
        ahead, behind = scale.clone(), scale.clone()
        ahead[row] += step
        behind[row] -= step
        slopes.append((loss(ahead) - loss(behind)) / (2 * step))
    assert torch.allclose(got, torch.tensor(slopes, dtype=F64), atol=1e-7) and got[case.inside].all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_map_alone_reads_the_rows_that_a_copy_would_hold(implementation, dtype) -> None:
    case = case_for(implementation, "swiglu", dtype, "adjacent")
    w_in, w_out, ends, index = case.w_in, case.w_out, case.ends, case.rows.long()
    y, h = ops.expert_mlp_forward(case.x, w_in, w_out, ends, kind="swiglu", rows=case.rows)
    copied_y, copied_h = ops.expert_mlp_forward(case.x[index], w_in, w_out, ends, kind="swiglu")
    got = ops.expert_mlp_dgrad(case.dy, h, w_in, w_out, ends, kind="swiglu", rows=case.rows)
    want = ops.expert_mlp_dgrad(case.dy[index], h, w_in, w_out, ends, kind="swiglu")
    dw, copied_dw = ([torch.full_like(w_in, MARK), torch.full_like(w_out, MARK)] for _ in range(2))
    some = {"experts": (1, 3)}
    ops.expert_mlp_wgrad(case.x, case.dy, got.dh, got.a, ends, rows=case.rows, dw_in=dw[0], dw_out=dw[1], **some)
    ops.expert_mlp_wgrad(
        case.x[index], case.dy[index], got.dh, got.a, ends, dw_in=copied_dw[0], dw_out=copied_dw[1], **some
    )
    for have, should in zip([y, h, *got[:3], *dw], [copied_y, copied_h, *want[:3], *copied_dw], strict=True):
        tolerances.same_bits(have, should)
    assert (dw[0][0] == MARK).all() and got.dscale is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_scaled_activation_is_rounded_once(kind) -> None:
    """a in bfloat16 is act(h) * scale in float32, rounded; dh too."""
    case = mapped(kind, BF16, "adjacent")
    got = run(case)
    h = got["h"].float().requires_grad_()
    gate, up = h.chunk(2, dim=1) if kind == "swiglu" else (h, h)
    act = {
        "swiglu": lambda: torch.nn.functional.silu(gate) * up,
        "gelu": lambda: torch.nn.functional.gelu(h),
        "relu": lambda: torch.relu(h),
    }[kind]()
    want = (act * case.scale[:, None]).bfloat16()
    tolerances.same_bits(got["a"], want)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_hold_what_one_block_would(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mapped(kind, BF16, "apart")
    whole = run(case)
    module = importlib.import_module("moe_overlap.ops.activation")  # the package has the function under this name
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 3 * FFN // torch.get_num_threads())
    in_blocks = run(case)
    for name, want in whole.items():
        tolerances.close(in_blocks[name].double(), want.double(), BF16)


def test_an_expert_that_reads_one_row_many_times_sums_its_weight_gradient(implementation) -> None:
    case = replace(case_for(implementation, "gelu", F32, "adjacent"), rows=torch.full((ROWS,), 2).int())
    got, want = run(case), wanted(case)
    tolerances.close(got["dw_in"], want["dw_in"])
    tolerances.close(got["dw_out"], want["dw_out"])


@pytest.mark.parametrize("value", [-1, READ])
@pytest.mark.parametrize("empty", [False, True])
def test_a_row_that_does_not_exist_is_refused(implementation, value, empty) -> None:
    case = case_for(implementation, "swiglu", F32, "adjacent")
    case.rows[20] = value
    x, dy = (rows[:0] if empty else rows for rows in (case.x, case.dy))
    h, a = torch.zeros(ROWS, 2 * FFN), torch.zeros(ROWS, FFN)
    dw_in, dw_out = torch.empty_like(case.w_in), torch.empty_like(case.w_out)
    both, ends = (case.w_in, case.w_out), case.ends
    for call in (
        lambda: ops.expert_mlp_forward(x, *both, ends, kind="swiglu", rows=case.rows),
        lambda: ops.expert_mlp_dgrad(dy, h, *both, ends, kind="swiglu", rows=case.rows),
        lambda: ops.expert_mlp_wgrad(x, dy, h, a, ends, rows=case.rows, dw_in=dw_in, dw_out=dw_out),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.field == "rows"
        assert empty or caught.value.value == value


META = torch.device("meta")
WRONG: dict[str, dict[str, Any]] = {
    "rows: dtype": {"rows": torch.zeros(ROWS, dtype=torch.int64)},
    "rows: dimensions": {"rows": torch.zeros(ROWS, 1, dtype=torch.int32)},
    "rows: device": {"rows": torch.zeros(ROWS, dtype=torch.int32, device=META)},
    "scale: dtype": {"scale": torch.zeros(ROWS, dtype=F64)},
    "scale: rows' dtype": {"scale": torch.zeros(ROWS, dtype=BF16)},
    "scale: length": {"scale": torch.zeros(READ)},
    "scale: device": {"scale": torch.zeros(ROWS, device=META)},
    "dscale: dtype": {"dscale": torch.zeros(ROWS, dtype=F64)},
    "dscale: length": {"dscale": torch.zeros(ROWS + 1)},
    "dscale: no scale": {"scale": None, "dscale": torch.zeros(ROWS)},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name) -> None:
    case, field = mapped("swiglu", BF16, "adjacent"), name.split(":")[0]
    given = {"kind": "swiglu", "rows": case.rows, "scale": case.scale, **WRONG[name]}
    calls = [lambda: ops.expert_mlp_dgrad(case.dy, torch.zeros(ROWS, 2 * FFN, dtype=BF16), case.w_in, case.w_out,
                                          case.ends, **given)]  # fmt: skip
    if field != "dscale":
        calls.append(lambda: ops.expert_mlp_forward(case.x, case.w_in, case.w_out, case.ends, **given))
    if field == "rows":
        h, a = torch.zeros(ROWS, 2 * FFN, dtype=BF16), torch.zeros(ROWS, FFN, dtype=BF16)
        calls.append(lambda: ops.expert_mlp_wgrad(case.x, case.dy, h, a, case.ends, rows=given["rows"],
                                                  dw_in=case.w_in, dw_out=case.w_out))  # fmt: skip
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.field == field


@pytest.mark.parametrize("field", ["dy", "dh", "a"])
def test_wgrad_refuses_rows_of_the_wrong_count(field) -> None:
    """x and dy have the rows that are read, dh and a those of the experts."""
    case, width = mapped("swiglu", F32, "adjacent"), {"dy": HIDDEN, "dh": 2 * FFN, "a": FFN}
    given = {name: torch.zeros(READ if name == "dy" else ROWS, columns) for name, columns in width.items()}
    given[field] = torch.zeros(ROWS if field == "dy" else READ, width[field])
    with pytest.raises(ConfigError) as caught:
        ops.expert_mlp_wgrad(
            case.x, *given.values(), case.ends, rows=case.rows, dw_in=case.w_in.clone(), dw_out=case.w_out.clone()
        )
    assert caught.value.field == field
