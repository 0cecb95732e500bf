"""The contract of the expert MLP: what a call of each of its five operators is, and what is checked about it.

An implementation takes one of these objects. The two operators of torch.library have x, w_in, w_out and `offs`, and set
the rows beyond the groups to zero; the three pieces of the schedule have groups that may lie apart, and buffers to
write. Fields stand in the order of the operator's arguments, so that `ExpertMlp(*args)` is a call of `_expert_mlp`.
Nobody changes a call; to freeze it would double the time it takes to make one, and every step makes many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import checks
from moe_overlap.ops.activation import width
from moe_overlap.ops.activation_kinds import is_gated
from moe_overlap.ops.row_groups import Bounds, Groups

OPS = ("expert_mlp", "expert_mlp_backward", "expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad")
"""The registry's operators that make up the expert MLP. Their calls are below, in this order."""


class DgradResult(NamedTuple):
    """What `expert_mlp_dgrad` gives: dx [R, D], dh [R, F'], a [R, F], and with a scale its gradient [R], else None."""

    dx: torch.Tensor
    dh: torch.Tensor
    a: torch.Tensor
    dscale: torch.Tensor | None


class Call:
    """What the registry, the choice and the launch of kernels read from any call."""

    num_sms: int | None
    _groups: Groups | None = None

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that the first matmul reads, whose device and dtype decide; w_out or the buffer of its gradient."""
        raise NotImplementedError

    @property
    def bounds(self) -> tuple[Bounds, Bounds | None]:
        """Ends and starts of the groups."""
        raise NotImplementedError

    @property
    def groups(self) -> Groups:
        """The rows of each expert."""
        if self._groups is None:
            self._groups = Groups(*self.bounds, self.num_rows, self.num_experts)
        return self._groups

    @property
    def device(self) -> torch.device:
        return self.operands[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.operands[0].dtype

    @property
    def num_rows(self) -> int:
        """Rows that experts compute, in groups or not."""
        return self.operands[0].shape[0]

    @property
    def num_experts(self) -> int:
        return self.operands[1].shape[0]

    @property
    def hidden(self) -> int:
        """D."""
        return self.operands[1].shape[1]

    @property
    def ffn(self) -> int:
        """F."""
        return self.operands[1].shape[2]

    def check_num_sms(self) -> None:
        """Refuse a budget with which nothing would run."""
        if self.num_sms is not None and self.num_sms < 1:
            raise ConfigError("num_sms", self.num_sms, "at least 1, or None for all")


class Operator(Call):
    """A call of an operator of torch.library."""

    x: torch.Tensor
    offs: torch.Tensor
    row_to_token: torch.Tensor | None

    @property
    def bounds(self) -> tuple[Bounds, Bounds | None]:
        return self.offs, None

    @property
    def num_rows(self) -> int:
        return (self.x if self.row_to_token is None else self.row_to_token).shape[0]

    def check_values(self) -> None:
        """Refuse a map to rows that x does not have."""
        if self.row_to_token is not None:
            num_tokens = self.x.shape[0]
            checks.check_values("row_to_token", self.row_to_token, -1, num_tokens, why="-1 = none, the rows of x")

    def nothing(self) -> torch.Tensor:
        """Stands for a result that was not asked for."""
        return self.x.new_empty((0,))


@dataclass(eq=False)
class ExpertMlp(Operator):
    """`_expert_mlp` -> y [R, D] and h [R, F'], or h [0, F'] without `save_h`; `ops.expert_mlp` has the arguments."""

    x: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    offs: torch.Tensor
    kind: str
    row_to_token: torch.Tensor | None
    row_scale: torch.Tensor | None
    num_sms: int | None
    save_h: bool = False

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x, self.w_out

    def check(self) -> None:
        """Refuse what does not fit together. torch.compile traces this."""
        _check_weights(self.x, self.w_in, self.w_out, self.kind, count="E", cast=True)
        device = self.x.device
        checks.check_tensor("offs", self.offs, (self.num_experts,), torch.int32, what="[E]", device=device)
        if self.row_to_token is not None:
            checks.check_tensor("row_to_token", self.row_to_token, (None,), torch.int32, what="[R]", device=device)
        if self.row_scale is not None:
            floats = (torch.float32, torch.float64)
            checks.check_tensor("row_scale", self.row_scale, (self.num_rows,), floats, what="[R]", device=device)
        self.check_num_sms()

    def new_h(self) -> torch.Tensor:
        """h, to be written."""
        return self.x.new_empty((self.num_rows if self.save_h else 0, self.w_in.shape[1]))


@dataclass(eq=False)
class ExpertMlpBackward(Operator):
    """`_expert_mlp_backward` -> the gradients of x, w_in, w_out and row_scale, those `wanted`, else `nothing`."""

    dy: torch.Tensor
    x: torch.Tensor
    h: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    offs: torch.Tensor
    kind: str
    row_to_token: torch.Tensor | None
    row_scale: torch.Tensor | None
    wanted: list[bool]
    num_sms: int | None = None

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dy, self.w_out


class Piece(Call):
    """A call of a piece of the schedule. It writes its buffers in the groups only.

    With `rows`, int32 [R], row i of the experts' order is read from row rows[i] of x and dy [N, D]; None: N = R.
    """

    ends: Bounds
    starts: Bounds | None
    rows: torch.Tensor | None

    @property
    def num_rows(self) -> int:
        return (self.operands[0] if self.rows is None else self.rows).shape[0]

    @property
    def bounds(self) -> tuple[Bounds, Bounds | None]:
        return self.ends, self.starts

    def buffers(self) -> dict[str, tuple[torch.Tensor | None, int]]:
        """Name -> the buffer given, and its width."""
        return {}

    def check_buffers(self) -> None:
        """Refuse buffers that the rows do not fit into."""
        for field, (given, columns) in self.buffers().items():
            if given is not None:
                shape = (self.num_rows, columns)
                checks.check_tensor(field, given, shape, self.dtype, what="[rows, width]", device=self.device)

    def check_rows(self) -> None:
        """Refuse a map that is none. Its values are looked at where they are read."""
        if self.rows is not None:
            checks.check_tensor("rows", self.rows, (None,), torch.int32, what="[R]", device=self.device)

    def check_scale(self, field: str, scale: torch.Tensor | None) -> None:
        """Refuse factors, or a buffer for their gradients, that are not one for each row in the dtype of sums."""
        if scale is not None:
            dtype = checks.accumulation_dtype(self.dtype)
            checks.check_tensor(field, scale, (self.num_rows,), dtype, what="[R]", device=self.device)

    def outputs(self) -> list[torch.Tensor]:
        """The buffers given, and new ones for the others, which are zero outside the groups."""
        rows, _ = self.operands
        return [
            self.groups.new_rows(columns, like=rows) if given is None else given
            for given, columns in self.buffers().values()
        ]


@dataclass(eq=False)
class Forward(Piece):
    """`ops.expert_mlp_forward` -> its outputs (y, h)."""

    x: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    ends: Bounds
    starts: Bounds | None
    kind: str
    y: torch.Tensor | None
    h: torch.Tensor | None
    num_sms: int | None
    rows: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x, self.w_out

    def buffers(self) -> dict[str, tuple[torch.Tensor | None, int]]:
        return {"y": (self.y, self.hidden), "h": (self.h, self.w_in.shape[1])}

    def check(self) -> None:
        _check_weights(self.x, self.w_in, self.w_out, self.kind, count="e")
        self.check_rows()
        self.check_scale("scale", self.scale)
        self.check_buffers()
        self.check_num_sms()


@dataclass(eq=False)
class Dgrad(Piece):
    """`ops.expert_mlp_dgrad` -> its outputs. The memory of dh may be that of h."""

    dy: torch.Tensor
    h: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    ends: Bounds
    starts: Bounds | None
    kind: str
    dx: torch.Tensor | None
    dh: torch.Tensor | None
    a: torch.Tensor | None
    num_sms: int | None
    rows: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    dscale: torch.Tensor | None = None

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dy, self.w_out

    def buffers(self) -> dict[str, tuple[torch.Tensor | None, int]]:
        return {"dx": (self.dx, self.hidden), "dh": (self.dh, self.w_in.shape[1]), "a": (self.a, self.ffn)}

    def check(self) -> None:
        _check_weights(self.dy, self.w_in, self.w_out, self.kind, count="e", rows_field="dy")
        self.check_rows()
        self.check_scale("scale", self.scale)
        self.check_scale("dscale", self.dscale)
        if self.scale is None and self.dscale is not None:
            raise ConfigError("dscale", f"shape {tuple(self.dscale.shape)}", "None, as there is no scale")
        shape = (self.num_rows, self.w_in.shape[1])
        checks.check_tensor("h", self.h, shape, self.dtype, what="[R, F']", device=self.device)
        self.check_buffers()
        self.check_num_sms()

    def new_dscale(self) -> torch.Tensor | None:
        """The buffer given for the scale's gradient or a new one, zero outside the groups; None without a scale."""
        return torch.zeros_like(self.scale) if self.scale is not None and self.dscale is None else self.dscale


@dataclass(eq=False)
class Wgrad(Piece):
    """`ops.expert_mlp_wgrad`: writes dw_in and dw_out of the experts first .. last-1."""

    x: torch.Tensor
    dy: torch.Tensor
    dh: torch.Tensor
    a: torch.Tensor
    ends: Bounds
    starts: Bounds | None
    dw_in: torch.Tensor
    dw_out: torch.Tensor
    experts: tuple[int, int]
    num_sms: int | None
    rows: torch.Tensor | None = None

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x, self.dw_out

    def check(self) -> None:
        first, last = self.experts
        if not 0 <= first <= last <= self.num_experts:
            raise ConfigError("experts", self.experts, f"0 <= first <= last <= {self.num_experts}")
        checks.check_tensor("x", self.x, (None, None), checks.FLOATS, what="[R, D]")
        self.check_rows()
        hidden, dtype, device = self.x.shape[1], self.dtype, self.device
        # A buffer of another shape would be resized, and what lies beside a view of it overwritten.
        checks.check_tensor("dw_out", self.dw_out, (None, hidden, None), dtype, what="[e, D, F]", device=device)
        shape = (self.num_experts, None, hidden)
        checks.check_tensor("dw_in", self.dw_in, shape, dtype, what="[e, F', D]", device=device)
        checks.check_tensor("dy", self.dy, self.x.shape, dtype, what="[rows, width]", device=device)
        for field, value, columns in (("dh", self.dh, self.dw_in.shape[1]), ("a", self.a, self.ffn)):
            checks.check_tensor(field, value, (self.num_rows, columns), dtype, what="[rows, width]", device=device)
        self.check_num_sms()


def _check_weights(
    rows: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    kind: str,
    *,
    count: str,
    rows_field: str = "x",
    cast: bool = False,
) -> None:
    """Rows [R, D], w_in [count, F', D], w_out [count, D, F]; one dtype, but where autocast is to `cast` them."""
    checks.check_kind(kind)
    checks.check_tensor(rows_field, rows, (None, None), checks.FLOATS, what="[R, D]")
    hidden, device = rows.shape[1], rows.device
    dtypes = checks.FLOATS if cast and checks.autocast_on(device) else (rows.dtype,)
    checks.check_tensor("w_in", w_in, (None, None, hidden), dtypes, what=f"[{count}, F', D]", device=device)
    experts, width_in = w_in.shape[0], w_in.shape[1]
    if is_gated(kind) and width_in % 2 != 0:
        raise ConfigError("w_in", f"shape {tuple(w_in.shape)}", f"[{count}, 2F, D] = [gate | up] for {kind}")
    shape = (experts, hidden, width(width_in, kind))
    checks.check_tensor("w_out", w_out, shape, dtypes, what=f"[{count}, D, F]", device=device)
