"""Every operator, by every implementation that runs here, on tensors that lie in memory in unusual ways: the result is
that of contiguous ones, by a copy where a kernel cannot read them, or a ConfigError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import registry
from tests.ops.cases import randn, routed, weights
from tests.tolerances import close

E, D, F, T = 4, 8, 16, 6  # widths in multiples of 16 bytes, which torch's grouped matmul asks for
IDS = torch.tensor([[0, 3], [-1, 1], [3, 0], [2, -1], [-1, -1], [1, 3]], dtype=torch.int32)
CPU = torch.device("cpu")


def f32(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, dtype=torch.float32, seed=seed)


def fields() -> dict[str, torch.Tensor]:
    """One tensor for every name below."""
    maps = routed(IDS, E)
    rows = maps.num_rows
    w_in, w_out = weights(E, D, F, "swiglu", torch.float32)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return {
        "x": f32(T, D), "rows": f32(rows, D, seed=1), "dy": f32(rows, D, seed=2), "h": f32(rows, 2 * F, seed=3),
        "da": f32(rows, F, seed=4), "w_in": w_in, "w_out": w_out, "offs": maps.offs, "slot_to_row": maps.slot_to_row,
        "row_scale": f32(rows, seed=5), "weights": f32(T, 2, seed=6), "shared": f32(T, D, seed=7), "ids": IDS,
        "logits": f32(T, E, seed=8), "bias": f32(E, seed=9), "order": order, "dw_in": torch.zeros(E, 2 * F, D),
        "dw_out": torch.zeros(E, D, F), "row_to_token": torch.arange(rows, dtype=torch.int32) % T,
        "sorted": torch.arange(E, dtype=torch.int32) * 2 + 2,
    }  # fmt: skip


Given = dict[str, torch.Tensor]


def wgrad(g: Given) -> tuple[torch.Tensor, torch.Tensor]:
    ops.expert_mlp_wgrad(g["rows"], g["dy"], g["h"], g["da"], g["offs"], dw_in=g["dw_in"], dw_out=g["dw_out"])
    return g["dw_in"], g["dw_out"]


def mlp_grads(g: Given) -> tuple[torch.Tensor, ...]:
    """The backward through autograd: dy is what comes from above."""
    leaves = [g[name].detach().requires_grad_() for name in ("rows", "w_in", "w_out")]
    y = ops.expert_mlp(*leaves, g["offs"], kind="swiglu")
    return torch.autograd.grad(y, leaves, g["dy"])


def mm_grads(g: Given) -> tuple[torch.Tensor, ...]:
    leaves = [g[name].detach().requires_grad_() for name in ("rows", "w_in")]
    return torch.autograd.grad(ops.grouped_mm(*leaves, g["offs"]), leaves, g["h"])


def row_grads(g: Given) -> tuple[torch.Tensor, ...]:
    leaves = [g[name].detach().requires_grad_() for name in ("rows", "weights", "shared")]
    y = ops.combine(leaves[0], g["slot_to_row"], leaves[1], leaves[2])
    return torch.autograd.grad(y, leaves, g["x"])


def gate_grads(g: Given) -> tuple[torch.Tensor, ...]:
    leaf = g["logits"].detach().requires_grad_()
    return torch.autograd.grad(ops.gate_topk(leaf, g["bias"], k=2)[0], leaf, g["weights"])


# Operator of the registry -> what is called, with which tensors.
MOE = torch.ops.moe_overlap
CALLS: dict[str, tuple[Callable[[Given], Any], str]] = {
    "gate_topk": (lambda g: ops.gate_topk(g["logits"], g["bias"], k=2), "logits bias"),
    "gate_topk_backward": (gate_grads, "logits bias weights"),
    "row_map": (lambda g: ops.row_map(g["ids"], num_experts=E), "ids"),
    "permute": (
        lambda g: ops.permute(g["x"], g["slot_to_row"], g["offs"], num_rows=len(g["rows"])),
        "x slot_to_row offs",
    ),
    "combine": (
        lambda g: ops.combine(g["rows"], g["slot_to_row"], g["weights"], g["shared"]),
        "rows slot_to_row weights shared",
    ),
    "combine_backward": (row_grads, "rows slot_to_row weights shared x"),
    "activation": (
        lambda g: ops.activation(g["h"], kind="swiglu", row_scale=g["row_scale"], offs=g["offs"]),
        "h row_scale offs",
    ),
    "activation_backward": (
        lambda g: MOE.activation_backward.default(g["da"], g["h"], "swiglu", g["row_scale"], g["offs"]),
        "da h row_scale offs",
    ),
    "pack": (lambda g: ops.pack(g["rows"], g["order"]), "rows order"),
    "pack_backward": (lambda g: MOE.pack_backward.default(g["dy"], g["order"], len(g["dy"])), "dy order"),
    "unpack": (lambda g: ops.unpack(g["rows"], g["order"]), "rows order"),
    "unpack_into": (
        lambda g: ops.unpack(g["rows"], g["order"], out=g["rows"].new_zeros(g["rows"].shape)),
        "rows order",
    ),
    "grouped_mm": (lambda g: ops.grouped_mm(g["rows"], g["w_in"], g["offs"]), "rows w_in offs"),
    "grouped_mm_wgrad": (mm_grads, "rows w_in offs h"),
    "expert_mlp": (
        lambda g: ops.expert_mlp(g["rows"], g["w_in"], g["w_out"], g["offs"], kind="swiglu", row_scale=g["row_scale"]),
        "rows w_in w_out offs row_scale",
    ),
    "expert_mlp_backward": (mlp_grads, "rows w_in w_out offs dy"),
    "expert_mlp_forward": (
        lambda g: ops.expert_mlp_forward(g["rows"], g["w_in"], g["w_out"], g["offs"], kind="swiglu"),
        "rows w_in w_out offs",
    ),
    "expert_mlp_dgrad": (
        lambda g: ops.expert_mlp_dgrad(g["dy"], g["h"], g["w_in"], g["w_out"], g["offs"], kind="swiglu"),
        "dy h w_in w_out offs",
    ),
    "expert_mlp_wgrad": (wgrad, "rows dy h da offs dw_in dw_out"),
}


def every_second(t: torch.Tensor) -> torch.Tensor:
    wide = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1]))
    wide[..., ::2] = t
    return wide[..., ::2]


def columns(t: torch.Tensor) -> torch.Tensor:
    wide = t.new_zeros((*t.shape[:-1], t.shape[-1] + 3))
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def offset(t: torch.Tensor) -> torch.Tensor:
    flat = t.new_zeros(t.numel() + 1)
    flat[1:] = t.reshape(-1)
    return flat[1:].view(t.shape)


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t if t.dim() < 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2)


def expanded(t: torch.Tensor) -> torch.Tensor:
    """All rows the first one (all experts, all weights): of floats only, as a map may name a row once."""
    return t[:1].expand(t.shape) if t.is_floating_point() else t


def backwards_in_a_file(t: torch.Tensor, folder: Path) -> torch.Tensor:
    """As safetensors maps it, behind a tensor of three bytes: what load_state_dict(assign=True) makes a parameter."""
    save_file({"a": torch.zeros(3, dtype=torch.uint8), "t": t.contiguous()}, folder / "t.safetensors")
    return load_file(folder / "t.safetensors")["t"]


LAYOUTS = {"every second": every_second, "columns": columns, "offset by one": offset, "transposed": transposed,
           "expanded": expanded, "safetensors": backwards_in_a_file, "no rows": None}  # fmt: skip
PIECES = ("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad")
WRITTEN = ("dw_in", "dw_out")  # buffers: an expanded one cannot be written


def implementations() -> list[tuple[str, str]]:
    return [
        (op, entry.name)
        for op in CALLS
        for entry in registry._implementations[op]
        if entry.obstacle(CPU, torch.float32) is None
    ]


def tuple_of(result: Any) -> tuple[torch.Tensor | None, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "impl"), implementations())
def test_the_layout_of_an_argument_changes_nothing(op: str, impl: str, layout: str, tmp_path: Path) -> None:
    call, names = CALLS[op]
    for name in names.split():
        given = fields()
        if layout == "no rows":
            given = without_rows(given)
        elif layout == "safetensors":
            given[name] = backwards_in_a_file(given[name], tmp_path)
        elif not (layout == "expanded" and name in WRITTEN):
            given[name] = LAYOUTS[layout](given[name])  # type: ignore[misc]
        plain = {key: value.clone(memory_format=torch.contiguous_format) for key, value in given.items()}
        with registry.force(op, "reference"):
            should = tuple_of(call(plain))
        try:
            with registry.force(op, impl):
                have = tuple_of(call(given))
        except ConfigError as error:
            assert layout == "no rows" and impl != "reference", error
            continue
        for one, other in zip(have, should, strict=True):
            if one is None or other is None:  # the gradient of a scale that is not given
                assert one is other, name
            elif one.is_floating_point():
                close(one, other, torch.float32)
            else:
                assert torch.equal(one, other), name


def without_rows(given: Given) -> Given:
    """No tokens, and so no rows."""
    names = "x rows dy h da slot_to_row row_scale weights shared ids logits order row_to_token".split()
    empty = {name: given[name][:0] for name in names}
    return given | empty | {"offs": torch.zeros(E, dtype=torch.int32)}


def test_every_operator_of_the_registry_is_here() -> None:
    # These two work in buffers that are ours, and say so where they are given others.
    assert set(registry._implementations) - {"activation_rows", "activation_rows_backward"} == set(CALLS)


@pytest.mark.parametrize("layout", ["every second", "columns", "offset by one", "transposed", "expanded"])
def test_rows_read_through_a_map(layout: str) -> None:
    for impl in ("reference", "grouped_mm"):
        given = fields()
        given["x"] = LAYOUTS[layout](given["x"])  # type: ignore[misc]
        results = []
        for x in (given["x"], given["x"].contiguous()):
            with registry.force("expert_mlp", impl):
                results.append(ops.expert_mlp(x, given["w_in"], given["w_out"], given["sorted"], kind="swiglu",
                                              row_to_token=given["row_to_token"]))  # fmt: skip
        assert torch.equal(*results)


def test_two_slots_on_one_row_are_refused() -> None:
    """Which of two tokens the row would be is nobody's choice."""
    twice = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    with pytest.raises(ConfigError, match="slot_to_row"):
        ops.permute(f32(2, D), twice, num_rows=3)


BACKWARDS = ["expert_mlp_backward", "grouped_mm_wgrad", "combine_backward", "gate_topk_backward"]
META = [op for op in CALLS if op not in BACKWARDS and op not in PIECES and not op.endswith("backward")]


@pytest.mark.parametrize("op", META)
def test_shapes_and_dtypes_on_the_meta_device_are_those_of_real_tensors(op: str) -> None:
    call, _ = CALLS[op]
    real = tuple_of(call(fields()))
    meta = tuple_of(call({name: value.to("meta") for name, value in fields().items()}))
    assert [(t.shape, t.dtype) for t in meta] == [(t.shape, t.dtype) for t in real]
    assert all(t.device.type == "meta" for t in meta)


@pytest.mark.parametrize("op", BACKWARDS)
def test_a_backward_on_the_meta_device(op: str) -> None:
    call, _ = CALLS[op]
    meta = tuple_of(call({name: value.to("meta") for name, value in fields().items()}))
    assert [t.shape for t in meta] == [t.shape for t in tuple_of(call(fields()))]
