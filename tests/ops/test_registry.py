import threading

import pytest
import torch

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import registry

CPU = torch.device("cpu")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """An operator with three implementations, of which the best cannot run in float64 and the second nowhere."""
    monkeypatch.setattr(registry, "_implementations", dict(registry._implementations))
    registry.add("toy", "reference", lambda x: ("reference", x), merit="runs everywhere")
    registry.add(
        "toy", "broken", lambda x: None, obstacle=lambda device, dtype: "no compiler", merit="-", preferred=True
    )
    registry.add(
        "toy",
        "fast",
        lambda x: ("fast", x),
        obstacle=lambda device, dtype: "no float64" if dtype == torch.float64 else None,
        merit="faster",
        preferred=True,
    )
    yield "toy"
    registry._chosen.clear()


def test_takes_the_best_that_can_run_and_says_why(toy) -> None:
    assert registry.choose(toy, device="cpu", dtype=torch.float32) == registry.Choice("fast", "faster")
    choice = registry.choose(toy, device=CPU, dtype=torch.float64)
    assert choice.impl == "reference"
    assert "fast cannot run: no float64" in choice.reason and "broken cannot run: no compiler" in choice.reason
    run = registry.kernel(toy)
    assert run(torch.zeros(1))[0] == "fast" and run(torch.zeros(1).double())[0] == "reference"


def test_force_holds_inside_the_block_in_every_thread(toy) -> None:
    run, seen = registry.kernel(toy), []
    with registry.force(toy, "reference"):
        assert registry.choose(toy, device="cpu", dtype=torch.float32) == registry.Choice("reference", "forced")
        with registry.force(toy, "fast"):
            assert run(torch.zeros(1))[0] == "fast"
        thread = threading.Thread(target=lambda: seen.append(run(torch.zeros(1))[0]))
        thread.start()
        thread.join(10)
    assert seen == ["reference"] and run(torch.zeros(1))[0] == "fast"


def test_forcing_what_cannot_run_raises_with_the_reason(toy) -> None:
    with registry.force(toy, "broken"), pytest.raises(ConfigError, match="no compiler"):
        registry.kernel(toy)(torch.zeros(1))
    with registry.force(toy, "fast"), pytest.raises(ConfigError, match="no float64"):
        registry.choose(toy, device="cpu", dtype=torch.float64)
    with pytest.raises(ConfigError, match="triton"), registry.force(toy, "triton"):
        pass
    with pytest.raises(ConfigError, match="nosuchop"):
        registry.choose("nosuchop", device="cpu", dtype=torch.float32)
    assert registry.choose(toy, device="cpu", dtype=torch.float32).impl == "fast"


def test_explain_names_every_operator_and_what_was_passed_over(toy) -> None:
    lines = registry.explain()
    assert "toy: fast (faster)" in lines and "toy: not broken (no compiler)" in lines
    for op in (
        "gate_topk",
        "row_map",
        "permute",
        "combine",
        "activation",
        "grouped_mm",
        "expert_mlp",
        "pack",
        "unpack",
    ):
        assert any(line.startswith(f"{op}: ") for line in lines), op


def test_row_map_without_the_compiled_part_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_overlap.native import native

    ids = torch.tensor([[2, 0], [0, -1]], dtype=torch.int32)
    want = ops.row_map(ids, num_experts=3)
    monkeypatch.setattr(native, "load_ops", lambda: False)
    monkeypatch.setattr(native, "reason", lambda name: f"{name} left out for this test")
    registry._chosen.clear()
    try:
        choice = registry.choose("row_map", device="cpu", dtype=torch.int32)
        assert choice.impl == "reference" and "ops left out for this test" in choice.reason
        for have, should in zip(ops.row_map(ids, num_experts=3), want, strict=True):
            assert torch.equal(have, should)
    finally:
        registry._chosen.clear()


def test_errors_come_through_the_dispatcher_as_they_are() -> None:
    with pytest.raises(ConfigError) as caught:
        torch.ops.moe_overlap.row_map(torch.tensor([[9]], dtype=torch.int32), 4, 0, 4, 1, None)
    assert (caught.value.field, caught.value.value) == ("ids", 9)
