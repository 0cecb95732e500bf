"""What needs neither a GPU nor Triton of benchmarks/gpu_expert_mlp.py: numbers, routing, what is right, verdicts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_expert_mlp as bench
from benchmarks import gpu_expert_mlp_cases as cases
from benchmarks import gpu_expert_mlp_ways as ways
from benchmarks import gpu_timing
from tests.ops.test_expert_mlp import dense
from tests.tolerances import close

BF16, F64 = torch.bfloat16, torch.float64
QWEN3, QWEN3_LONG, MIXTRAL, DEEPSEEK = cases.SHAPES
TINY = replace(QWEN3, tokens=23, top_k=3, experts=5, hidden=8, ffn=6)


def test_flop_of_the_shapes() -> None:
    """Against sums made by hand: 65536 rows of Qwen3 are 0.618 TFLOP forward, and so on."""
    tera = {shape.name: shape.flop("forward") / 1e12 for shape in cases.SHAPES}
    assert [round(value, 3) for value in tera.values()] == [0.618, 2.474, 5.772, 2.886]
    assert all(shape.flop("backward") == 2 * shape.flop("forward") for shape in cases.SHAPES)
    assert [shape.rows for shape in cases.SHAPES] == [65536, 262144, 16384, 32768]


def test_targets_and_verdicts() -> None:
    assert {shape.name: tuple(shape.targets.values()) for shape in cases.SHAPES} == {
        "Qwen3-30B-A3B T=8192": (430.0, 400.0),
        "Qwen3-30B-A3B T=32768": (520.0, 480.0),
        "Mixtral 8x7B T=8192": (620.0, 560.0),
        "DeepSeek-V3 EP8 R=32768": (600.0,),
    }
    assert bench.verdict(MIXTRAL, "backward", 560.0) == {"target": 560.0, "public": "452 (H200)", "met": True}
    assert bench.verdict(MIXTRAL, "forward", 619.9)["met"] is False
    assert bench.verdict(DEEPSEEK, "backward", 1.0) == {}


def test_what_auto_would_take() -> None:
    assert ways.chosen(BF16) == "triton"


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("shape", [replace(QWEN3, tokens=2000), MIXTRAL, replace(DEEPSEEK, tokens=3000)])
def test_routing(shape: cases.Shape, routing: str) -> None:
    """Distinct experts of a token; the same draw again; as uneven as it says."""
    ids_TK, again = (cases.route(shape, routing, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(ids_TK, again) and ids_TK.dtype == torch.int32
    assert ids_TK.shape == (shape.tokens, shape.top_k or 1)
    counts_E = torch.bincount(ids_TK.reshape(-1), minlength=shape.experts)
    assert counts_E.shape == (shape.experts,) and int(counts_E.sum()) == shape.rows
    assert int((ids_TK.sort(dim=1).values.diff(dim=1) == 0).sum()) == 0
    ratio = float(counts_E.max() / counts_E.double().mean())
    spread = 4 * (shape.rows / shape.experts) ** -0.5  # of a draw with equal chances
    assert ratio < 1 + spread if routing == "uniform" else ratio > 1 + spread
    if shape.top_k is None:
        assert int(ids_TK.diff(dim=0).min()) >= 0


def wanted(inputs: cases.Inputs) -> dict[str, torch.Tensor]:
    """By autograd, in float64, from the dense oracle of the operator's tests."""
    leaves = {name: value.double().requires_grad_() for name, value in inputs.leaves.items()}
    row_scale = leaves.get("row_scale")
    ends = inputs.offs.tolist()
    y_RD = dense(leaves["x"], leaves["w_in"], leaves["w_out"], ends, "swiglu", inputs.row_to_token, row_scale)
    out_TD = y_RD[inputs.slot_to_row.long()].sum(dim=1)
    gradients = torch.autograd.grad(out_TD, tuple(leaves.values()), inputs.dout.double())
    return {"out": out_TD.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("shape", [TINY, replace(TINY, top_k=None)])
def test_what_is_right(shape: cases.Shape) -> None:
    inputs = cases.make(shape, "uneven", device="cpu", dtype=torch.float32)
    found, want = cases.right(inputs).values, wanted(inputs)
    assert found.keys() == want.keys() == {"out", *inputs.leaves}
    for name, value in found.items():
        assert value.dtype == F64
        close(value, want[name])


def test_a_sample_is_right_where_it_is_looked_at_and_nothing_else_is() -> None:
    inputs = cases.make(TINY, "uniform", device="cpu", dtype=torch.float32)
    want, sample = wanted(inputs), cases.right(inputs, every=2)
    assert sample.values["w_in"].shape[0] == 3
    for name, value in want.items():
        assert cases.error(sample, name, value.float(), inputs) < 0.1
        spoiled = value.clone()
        spoiled[-2 if name in ("out", "x") else 1] += 1.0  # token 21, expert 1
        if name != "row_scale":
            assert cases.error(sample, name, spoiled, inputs) < 0.1
        assert cases.error(cases.right(inputs), name, spoiled, inputs) > 1
        spoiled[:] = math.nan
        assert not cases.error(sample, name, spoiled, inputs) <= 1
        if value.dim() > 1:
            assert cases.error(sample, name, value[:, :-1], inputs) == math.inf


def test_how_much_is_compared() -> None:
    both = 3 * QWEN3.flop("forward")
    assert cases.check_every(QWEN3, both) == 1 and cases.check_every(QWEN3, both / 20) == 10


def test_options() -> None:
    found = gpu_timing.options("words", ["--only=Q", "--tune"], sustained_s=5.0, only="", tune=False)
    assert (found.sustained_s, found.only, found.tune, found.out) == (5.0, "Q", True, None)
    assert gpu_timing.options("words", [], tune=False).tune is False


def test_phases_are_timed_apart_and_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of seconds that calls push forward."""
    now, order = [0.0], []

    class Mark:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Mark) -> float:
            return 1e3 * (end.at - self.at)

    def phases(name: str, forward_s: float, backward_s: float) -> gpu_timing.Phases:
        def forward() -> tuple[str, str]:
            order.append(name)
            now[0] += forward_s
            return "result", name

        def backward(saved: str) -> None:
            assert saved == name
            now[0] += backward_s

        return forward, backward

    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: now.__setitem__(0, now[0] + 100.0))
    found = gpu_timing.two_phases({"a": phases("a", 1.0, 2.0), "b": phases("b", 4.0, 8.0)}, repeats=3)
    assert {key: [round(t.median_s, 6) for t in both] for key, both in found.items()} == {"a": [1, 2], "b": [4, 8]}
    assert order == ["a", "b"] * 5
