"""What the host does for a step beside the experts' arithmetic, counted: nodes of autograd, operators of torch, calls
in Python. A chunk more may cost so many and no more, on any machine, however busy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moe_overlap
from moe_overlap import MoELayer, ShortcutBlock
from moe_overlap.ops import raw
from moe_overlap.schedule.nodes import Stage
from tests.layers import D, E, F, K, tokens

PACKAGE = os.path.dirname(moe_overlap.__file__)
T = 64


@dataclass
class Work:
    """Of one forward and backward: operators that torch's dispatcher ran, and calls of functions of this package."""

    operators: int = 0
    calls: int = 0


class Dispatched(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._work.operators += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_calls(work: Work) -> Iterator[None]:
    def look(frame: FrameType, event: str, _: Any) -> None:
        work.calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


def step(schedule: str, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(7)
    y: torch.Tensor = MoELayer(D, F, E, K, schedule=schedule, dtype=torch.float32)(x)
    return y


@pytest.fixture
def no_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that compute nothing, which a GPU does in a few launches."""
    for name in ("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad"):
        monkeypatch.setattr(raw, name, lambda call: None)


def work_of(schedule: str) -> Work:
    """After the first call, which makes what later ones find."""
    work, x = Work(), tokens(T, 0, torch.float32).requires_grad_()
    torch.manual_seed(7)
    layer = MoELayer(D, F, E, K, schedule=schedule, dtype=torch.float32)
    layer(x).sum().backward()
    with Dispatched(work):
        layer(x).sum().backward()
    with counted_calls(work):
        layer(x).sum().backward()
    return work


@pytest.mark.parametrize(("by", "operators", "calls"), [("tokens", 20, 230), ("experts", 16, 195)])
def test_a_chunk_more_costs_so_much(no_experts: None, by: str, operators: int, calls: int) -> None:
    few, many = work_of(f"chunked(4,{by})"), work_of(f"chunked(8,{by})")
    assert 0 < many.operators - few.operators <= 4 * operators
    assert 0 < many.calls - few.calls <= 4 * calls


def stages(y: torch.Tensor) -> int:
    """Nodes of schedules in the graph of y."""
    seen, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum(isinstance(node, Stage._backward_cls) for node in seen)


@pytest.mark.parametrize("chunks", [2, 4, 16])
def test_a_step_has_two_nodes_however_many_chunks(chunks: int) -> None:
    assert stages(step(f"chunked({chunks})", tokens(T, 0, torch.float32).requires_grad_())) == 2


@pytest.mark.parametrize(("slot", "nodes"), [(0, 3), (1, 3), (2, 2)])
def test_a_window_has_a_node_for_each_stretch_between_its_ops(slot: int, nodes: int) -> None:
    torch.manual_seed(7)
    layer = MoELayer(D, F, E, K, dtype=torch.float32)
    ops = [nn.Linear(D, D) for _ in range(3)]
    block = ShortcutBlock(ops, layer, tap=1, slot=slot, chunks=2)
    assert stages(block(tokens(T, 0, torch.float32).requires_grad_())) == nodes
