"""A CUDA device played on a CPU, which counts what the host would wait for: a layer runs on it with real numbers.

A build of torch without CUDA has no tensor on a device that autograd takes, fake ones included. So a `Played` tensor is
an ordinary CPU tensor that says it is on `cuda:0`; the mode `Watch` sees every call of torch from Python, makes what is
asked for on the device `Played` too, refuses what a device refuses (a host tensor among operands there), and notes in
`Watch.waits` what would make the host wait for the stream, with the file that asked for it:

    reads     `.cpu()`, `.tolist()`, `.item()`, `bool()`, selections by a mask, `bincount`, `equal` and their like
    copies    to the device from memory that is not pinned, or that are asked to be waited for

`Watch.uploads` counts the copies nobody waits for. Operators of this library run whole, on their references, since what
their kernels do on a GPU is the matter of `tests/gpu`; the pieces of the expert MLP note bounds that the host has.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from moe_overlap.ops import registry
from moe_overlap.ops.expert_mlp_contract import Call
from moe_overlap.schedule.backward import Backward

CUDA = torch.device("cuda", 0)

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive",
         "bincount", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__",
         "histc", "_local_scalar_dense", "__contains__"}  # fmt: skip
_TORCH = os.path.dirname(torch.__file__)
FROM_PYTHON = ("tensor", "as_tensor", "scalar_tensor", "from_numpy")


class Played(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    device = CUDA
    is_cuda = True


class Pinned(torch.Tensor):
    """A host tensor in pinned memory."""


@dataclass(frozen=True)
class Wait:
    """What the host would wait for, the file that asked for it, and whether backward ran."""

    what: str
    file: str
    backward: bool


def play(value: torch.Tensor) -> torch.Tensor:
    """The tensor itself, on the device from now on."""
    value.__class__ = Played
    return value


def play_module(module: nn.Module) -> nn.Module:
    """Its parameters and buffers on the device."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(play(parameter.detach().clone()), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = play(buffer)
    return module


class Watch(TorchFunctionMode):
    """See the module. `ignoring`: files that play the network, whose looks at the rows do not count."""

    def __init__(self, ignoring: tuple[str, ...] = ("virtual.py", "channel.py")) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.uploads = 0
        self._ignoring = ignoring

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
        there = [one for one in tensors if isinstance(one, Played)]
        if name == "pin_memory":
            return args[0].detach().clone().as_subclass(Pinned)
        target = _asked_for(args, kwargs)
        onto = there != [] if target is None else target.type == "cuda"
        self._look(name, args, kwargs, tensors, there, target)
        if target is not None:
            args, kwargs = _without_device(args, kwargs)
        with _as_host(tensors):
            result = func(*args, **kwargs)
        moved = name == "cpu" or target is not None
        if moved and any(result is one for one in tensors):
            result = result.clone()  # the host's own tensor, which had nowhere to go
            result.__class__ = torch.Tensor
        onto = onto and name != "cpu"
        for one in tree_iter(result):
            if onto and type(one) is torch.Tensor:
                play(one)
        return result

    @staticmethod
    def backward(y: torch.Tensor, dy: torch.Tensor) -> None:
        """`y.backward(dy)`, which as a function of torch would run with the mode off."""
        Variable._execution_engine.run_backward((y,), (dy,), False, False, (), allow_unreachable=True,
                                                accumulate_grad=True)  # fmt: skip

    def note(self, what: str) -> None:
        frame: Any = sys._getframe(1)
        while frame.f_code.co_filename == __file__ or _TORCH in frame.f_code.co_filename:
            frame = frame.f_back
        file = os.path.basename(frame.f_code.co_filename)
        if file not in self._ignoring:
            self.waits.append(Wait(what, file, torch._C._current_graph_task_id() >= 0))

    def _look(
        self, name: str, args: Any, kwargs: Any, tensors: list[Any], there: list[Any], target: torch.device | None
    ) -> None:
        """Note what `name` would wait for."""
        if name in FROM_PYTHON and target is not None and target.type == "cuda":
            self.note(f"torch.{name} on the device")
        elif there and (name in READS or (target is not None and target.type == "cpu")):
            self.note(name)
        elif name == "to" and target is not None and not there:
            if target.type == "cuda":
                self._copied(tensors[0], kwargs)
        elif name in ("copy_", "__setitem__") and isinstance(args[0], Played) != isinstance(args[-1], Played):
            source = args[-1]
            if isinstance(source, torch.Tensor) and source.dim():
                self._copied(source, kwargs) if isinstance(args[0], Played) else self.note(name)
        elif there and name == "__getitem__" and _has_mask(args[1]):
            self.note("a selection by a mask")
        elif there and name == "where" and len(args) + len(kwargs) == 1:
            self.note("where")
        elif there and name == "repeat_interleave" and "output_size" not in kwargs and len(tensors) > 1:
            self.note(name)
        elif there:
            strangers = [one for one in tensors if not isinstance(one, Played) and one.dim() and one.numel()]
            # The engine hands over gradients that C++ has made, which are plain.
            known = torch._C._current_graph_task_id() >= 0 and all(one.is_floating_point() for one in strangers)
            assert not strangers or known, f"{name}: a host tensor among operands on the device"

    def _copied(self, source: torch.Tensor, kwargs: Any) -> None:
        if isinstance(source, Pinned) and kwargs.get("non_blocking"):
            self.uploads += 1
        else:
            self.note("a copy from pageable memory" if not isinstance(source, Pinned) else "a copy that is waited for")


@contextmanager
def _as_host(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the tensors are what they are: kernels see a CPU."""
    before = [(one, type(one)) for one in tensors if type(one) in (Played, Pinned)]
    for one, _ in before:
        one.__class__ = torch.Tensor
    try:
        yield
    finally:
        for one, kind in before:
            one.__class__ = kind


def _asked_for(args: Any, kwargs: Any) -> torch.device | None:
    """The device that a call names, or that of the tensor whose device and dtype it is to take."""
    for one in (*args, kwargs.get("device")):
        if isinstance(one, torch.device) or (isinstance(one, str) and one in ("cpu", "cuda")):
            return torch.device(one)
    return None


def _without_device(args: Any, kwargs: Any) -> tuple[Any, Any]:
    host = torch.device("cpu")
    return tuple(host if _is_device(one) else one for one in args), {
        key: host if _is_device(one) else one for key, one in kwargs.items()
    }


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", "cuda"))


def _has_mask(index: Any) -> bool:
    return any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in tree_iter(index))


def _tensors_of(value: Any) -> list[torch.Tensor]:
    """Those among arguments, and in the fields of a call."""
    if isinstance(value, Call):
        return [one for one in vars(value).values() if isinstance(one, torch.Tensor)]
    return [value] if isinstance(value, torch.Tensor) else []


@contextmanager
def playing(watch: Watch) -> Iterator[Watch]:
    """Inside, pieces of the expert MLP and backward bodies know the device; ranks enter `watch` themselves."""
    candidates, run_backward = registry._candidates, Backward.run_backward

    def on_the_device(op: str, device: torch.device, dtype: torch.dtype) -> Any:
        if device != CUDA:
            return candidates(op, device, dtype)
        (found,) = candidates(op, torch.device("cpu"), dtype)[:1]

        def call(*args: Any) -> Any:
            tensors = [one for arg in args for one in _tensors_of(arg)]
            if isinstance(args[0], Call):
                for bounds in args[0].bounds:
                    if bounds is not None and not isinstance(bounds, Played):
                        watch.note("bounds of the experts that the host has")
            with _as_host(tensors), torch._C.DisableTorchFunction():
                results = found.entry.call(*args)
            for one in tree_iter(results):
                if type(one) is torch.Tensor:
                    play(one)
            return results

        return (replace(found, entry=replace(found.entry, call=call, limit=None, misfit=None)),)

    def body(step: Backward, node: Any, ctx: Any, grad: torch.Tensor | None) -> Any:
        if grad is not None and type(grad) is torch.Tensor:
            play(grad)
        return run_backward(step, node, ctx, grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_candidates", on_the_device)
        patch.setattr(Backward, "run_backward", body)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        yield watch
