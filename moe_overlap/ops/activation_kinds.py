"""The activations that there are, by name: three built in, and any other function of a row of h.

Built in are "swiglu", "gelu" and "relu" (`activation.py`). Here are "geglu" and "geglu_tanh" (arXiv 2002.05202, with
the erf and with its tanh form), "relu2" (arXiv 2109.08668), the forms of swiglu that `swiglu_kind` names, and whatever
`register_activation` is given. They run by the pure PyTorch path of every operator, in the dtype of accumulation and
rounded once; compiled kernels and those for GPUs have the built-in ones and say so.

A name is all that ranks compare: every process registers the same function under it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from moe_overlap.errors import ConfigError

BUILT_IN = ("swiglu", "gelu", "relu")
ONES = 8
"""Columns that a bias of the second matmul takes: 16 bytes of a row in bfloat16, which kernels ask for."""
Function = Callable[[torch.Tensor], torch.Tensor]
Derivative = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Activation:
    """forward(h [n, F']) -> a [n, F]; backward(da [n, F], h) -> dh [n, F']. gated: F' = 2F, else F."""

    name: str
    gated: bool
    forward: Function
    backward: Derivative


_registered: dict[str, Activation] = {}


def register_activation(name: str, f: Function, df: Derivative | None = None, *, gated: bool = False) -> str:
    """Make an activation known by `name`, which is returned.

    f: h [n, F'] -> a [n, F], each row a function of itself alone, in float32 or float64, without random numbers; with a
    gate F' = 2F. df: (da, h) -> dh; None: by autograd through f. Both are tried on a few numbers in float64.

    Raises ConfigError for a name that is taken, and for functions that do not fit: shape, rows that are not
    independent, a derivative that differs from a difference quotient.
    """
    if not isinstance(name, str) or not name or is_activation(name):
        raise ConfigError("name", name, "a name that no activation has")
    kind = Activation(name=name, gated=gated, forward=f, backward=df or _by_autograd(f))
    _try(kind)
    _registered[name] = kind
    return name


def swiglu_kind(
    *, limit: float | None = None, alpha: float = 1.0, offset: float = 0.0, interleaved: bool = False
) -> str:
    """The name of a = (u + offset) * g * sigmoid(alpha * g) with g = min(gate, limit), u = clamp(up, -limit, limit).

    With the defaults it is "swiglu". limit alone is the clamped form (DeepSeek-V4); limit 7, alpha 1.702, offset 1 that
    of GPT-OSS. interleaved: h holds gate and up in turns instead of [gate | up].
    """
    if (limit, alpha, offset, interleaved) == (None, 1.0, 0.0, False):
        return "swiglu"
    if limit is not None and not limit > 0:
        raise ConfigError("limit", limit, "None or a number above 0")
    parts = [f"limit={float(limit)}"] if limit is not None else []
    parts += [f"{word}={float(value)}" for word, value, plain in (("alpha", alpha, 1), ("offset", offset, 0))
              if value != plain]  # fmt: skip
    name = f"swiglu({', '.join([*parts, *(['interleaved'] if interleaved else [])])})"
    if name not in _registered:
        form = _Swiglu(float("inf") if limit is None else float(limit), float(alpha), float(offset), interleaved)
        register_activation(name, form.forward, form.backward, gated=True)
    return name


def softcapped_swiglu_kind(*, gate_cap: float, up_cap: float) -> str:
    """The name of a = cap(gate, gate_cap) * sigmoid(gate) * cap(up, up_cap) with cap(x, c) = c * tanh(x / c)."""
    name = f"softcapped_swiglu({float(gate_cap)}, {float(up_cap)})"
    if name not in _registered:

        def f(h: torch.Tensor) -> torch.Tensor:
            gate, up = h.chunk(2, dim=-1)
            g, u = torch.tanh(gate / gate_cap), torch.tanh(up / up_cap)
            return gate_cap * g * torch.sigmoid(gate) * (up_cap * u)

        def df(da: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            gate, up = h.chunk(2, dim=-1)
            g, u, s = torch.tanh(gate / gate_cap), torch.tanh(up / up_cap), torch.sigmoid(gate)
            dgate = da * (up_cap * u) * ((1 - g * g) * s + gate_cap * g * s * (1 - s))
            return torch.cat([dgate, da * (gate_cap * g * s) * (1 - u * u)], dim=-1)

        register_activation(name, f, df, gated=True)
    return name


def with_ones_kind(kind: str) -> str:
    """The name of `kind` whose last ONES columns of a are 1, 0, 0, ...: for a bias of the second matmul.

    The columns of h beside them are read by nobody: the last 2 * ONES with a gate, else ONES.
    """
    name = f"{kind} with ones"
    if name not in _registered:
        check_activation("kind", kind)
        inner, beside = function_of(kind), ONES * (1 + is_gated(kind))

        def f(h: torch.Tensor) -> torch.Tensor:
            a = inner.forward(h[..., :-beside])
            ones = torch.zeros(a.shape[0], ONES, dtype=a.dtype, device=a.device)
            ones[:, 0] = 1
            return torch.cat([a, ones], dim=-1)

        def df(da: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return functional.pad(inner.backward(da[..., :-ONES], h[..., :-beside]), (0, beside))

        register_activation(name, f, df, gated=is_gated(kind))
    return name


def function_of(kind: str) -> Activation:
    """Any activation as functions: a built-in one by PyTorch's own."""
    if kind not in BUILT_IN:
        return _registered[kind]
    if kind == "swiglu":
        plain = _Swiglu(float("inf"), 1.0, 0.0, False)
        return Activation(name=kind, gated=True, forward=plain.forward, backward=plain.backward)
    f = functional.gelu if kind == "gelu" else functional.relu
    return Activation(name=kind, gated=False, forward=f, backward=_by_autograd(f))


def is_activation(name: object) -> bool:
    return name in BUILT_IN or name in _registered


def check_activation(field: str, name: object) -> None:
    """Raises ConfigError for what is no activation's name."""
    if not is_activation(name):
        names = ", ".join(repr(known) for known in (*BUILT_IN, *_registered))
        raise ConfigError(field, name, f"one of {names}, or a name given to register_activation")


def registered(name: str) -> Activation | None:
    """What was registered; None for a built-in one."""
    return _registered.get(name)


def is_gated(name: str) -> bool:
    """Whether h is twice as wide as a."""
    return name == "swiglu" or (name in _registered and _registered[name].gated)


def not_built_in(name: str) -> str | None:
    """Why a kernel that has the built-in activations does not take this one, or None."""
    return None if name in BUILT_IN else f"activation {name}; it has {', '.join(BUILT_IN)}"


def _by_autograd(f: Function) -> Derivative:
    def backward(da: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        # A kernel runs below autograd, which is to look at f here.
        here, without = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        for name in ("AutogradOther", "AutogradCPU", "ADInplaceOrView"):  # that of the CPU is that of all devices
            without = without.remove(getattr(torch._C.DispatchKey, name))
        with torch._C._ForceDispatchKeyGuard(here, without), torch.enable_grad():
            h = h.detach().requires_grad_()
            return torch.autograd.grad(f(h), h, da)[0]

    return backward


def _try(kind: Activation) -> None:
    """On numbers that are the same everywhere. Raises ConfigError."""
    generator = torch.Generator().manual_seed(zlib.crc32(kind.name.encode()))
    width = ONES + 4
    h = 2 * torch.randn(3, width * (1 + kind.gated), generator=generator, dtype=torch.float64)
    da = torch.randn(3, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        a = kind.forward(h)
        if not isinstance(a, torch.Tensor) or a.shape != da.shape or a.dtype != h.dtype:
            got = f"{tuple(a.shape)}, {a.dtype}" if isinstance(a, torch.Tensor) else type(a).__name__
            raise ConfigError("f", got, f"a tensor {tuple(da.shape)} of {h.dtype} for h {tuple(h.shape)}")
        alone = torch.cat([kind.forward(row) for row in h.split(1)])
        if not torch.allclose(alone, a, rtol=1e-5, atol=1e-5):  # vector code rounds otherwise than scalar code
            raise ConfigError("f", kind.name, "a function of each row alone")
        step = 1e-6
        quotient = torch.stack([
            (da * (kind.forward(h + step * unit) - kind.forward(h - step * unit))).sum(dim=1) / (2 * step)
            for unit in torch.eye(h.shape[1], dtype=h.dtype)
        ], dim=1)  # fmt: skip
        dh = kind.backward(da, h)
    worst = (dh - quotient).abs().max().item() if dh.shape == h.shape else float("inf")
    if not worst <= 1e-5:
        raise ConfigError("df", f"{worst:.2g} away from a difference quotient", "the derivative of f, (da, h) -> dh")


@dataclass(frozen=True)
class _Swiglu:
    limit: float
    alpha: float
    offset: float
    interleaved: bool

    def _parts(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.interleaved:
            return h[..., ::2], h[..., 1::2]
        gate, up = h.chunk(2, dim=-1)
        return gate, up

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = self._parts(h)
        g, u = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (u + self.offset) * (g * torch.sigmoid(self.alpha * g))

    def backward(self, da: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        gate, up = self._parts(h)
        g, u = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        s = torch.sigmoid(self.alpha * g)
        dgate = da * (u + self.offset) * (s + self.alpha * g * s * (1 - s)) * (gate <= self.limit)
        dup = da * (g * s) * (up.abs() <= self.limit)
        return torch.stack([dgate, dup], dim=-1).flatten(-2) if self.interleaved else torch.cat([dgate, dup], dim=-1)


def _geglu(approximate: str) -> tuple[Function, Derivative]:
    def forward(h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        return functional.gelu(gate, approximate=approximate) * up

    def backward(da: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        dgate = torch.ops.aten.gelu_backward(da * up, gate, approximate=approximate)
        return torch.cat([dgate, da * functional.gelu(gate, approximate=approximate)], dim=-1)

    return forward, backward


register_activation("geglu", *_geglu("none"), gated=True)
register_activation("geglu_tanh", *_geglu("tanh"), gated=True)
register_activation("relu2", lambda h: h.clamp(min=0).square(), lambda da, h: 2 * da * h.clamp(min=0))
