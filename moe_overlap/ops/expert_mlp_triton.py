"""expert_mlp and its raw pieces in Triton: the same contracts as the references, on one GPU.

Forward is two kernels: `up_kernel` reads the rows of x through the map and writes h and a = act(h) * row_scale,
`rows_kernel` makes y. Backward is `hidden_gradient_kernel` (dh, a again, the parts of dscale), `rows_kernel` (dx) and
`weights_kernel` twice; with a map, the rows of dx are summed by token in their order. Groups are read on the device,
nothing here waits for the GPU, and y is never kept.

Saved for backward, with s bytes an element: h, F' s bytes a row (F' = 2F for swiglu), and x, D s bytes a row or, with a
map, D s bytes a token and 4 a row. While it runs, forward needs F s bytes a row more (for a), backward (F' + F) s (dh
and a) and with a map D s (dx of the rows).
The method is that of SonicMoE (arXiv 2512.14080): the gradient of row_scale is the sum of da * a along the row, so y
is not needed for it; the parts of each column tile are added in their order, without atomics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_overlap import config
from moe_overlap.errors import ConfigError
from moe_overlap.ops import hardware
from moe_overlap.ops.activation import width
from moe_overlap.ops.activation_math_triton import KIND_NUMBERS
from moe_overlap.ops.expert_mlp_backward_triton import (
    gather_rows_kernel,
    hidden_gradient_kernel,
    sum_parts_kernel,
    sum_rows_kernel,
    weights_kernel,
)
from moe_overlap.ops.expert_mlp_blocks_triton import Blocks, Problem, architecture_class, block_shape
from moe_overlap.ops.expert_mlp_contract import (
    Call,
    Dgrad,
    DgradResult,
    ExpertMlp,
    ExpertMlpBackward,
    Forward,
    Wgrad,
)
from moe_overlap.ops.expert_mlp_forward_triton import rows_kernel, up_kernel
from moe_overlap.ops.expert_mlp_tiles_triton import COUNTERS, SPLIT_TILES, list_tiles_kernel
from moe_overlap.ops.launch_triton import blocks, launch, power_of_two
from moe_overlap.ops.row_groups import Bounds

INTERPRETED_SMS = 3
"""Programs under the interpreter: few, so that each walks over several tiles."""

INTERPRET_DESCRIPTORS = False
"""Whether the interpreter takes descriptors where a chip with TMA would; tests set it."""

_TMA_CLASSES = ("sm_90", "sm_100")
_WIDE_BYTES = 16
"""The widest read of one thread, and what TMA asks of addresses and strides."""

_SUM_COLUMNS = 1024


def expert_mlp(call: ExpertMlp) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h) of the operator `_expert_mlp`; h is empty without save_h."""
    x, launcher = call.x, _Launcher(call, with_tail=True)
    y_RD, h_RF = x.new_empty(call.num_rows, call.hidden), call.new_h()
    a_RF = launcher.up(x, call.w_in, call.kind, call.row_to_token, call.row_scale, h_RF if call.save_h else None)
    launcher.rows(a_RF, call.w_out, y_RD, transposed=True)
    return y_RD, h_RF


def expert_mlp_backward(call: ExpertMlpBackward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, w_in, w_out and row_scale, those `wanted`; an empty tensor stands for the others."""
    wants_dx, wants_dw_in, wants_dw_out, wants_dscale = call.wanted
    dy_RD, x, w_in, w_out, row_to_token = call.dy, call.x, call.w_in, call.w_out, call.row_to_token
    launcher = _Launcher(call, with_tail=True)
    dh_RF, a_RF = torch.empty_like(call.h), x.new_empty(call.num_rows, call.ffn)
    dscale = torch.empty_like(call.row_scale) if call.row_scale is not None and wants_dscale else None
    launcher.hidden(dy_RD, w_out, call.kind, call.h, None, call.row_scale, dh_RF, a_RF, dscale)
    dx = dw_in = dw_out = call.nothing()
    if wants_dw_out:
        dw_out = torch.empty_like(w_out, memory_format=torch.contiguous_format)
        launcher.weights(dy_RD, a_RF, dw_out)
    if wants_dw_in:
        dw_in = torch.empty_like(w_in, memory_format=torch.contiguous_format)
        if row_to_token is not None and launcher.problem.arch in _TMA_CLASSES:
            # A copy of the rows, so that whole blocks of them can be read: TMA of these chips gathers no single rows.
            launcher.weights(dh_RF, _gathered(x, row_to_token), dw_in)
        else:
            launcher.weights(dh_RF, x, dw_in, right_map=row_to_token)
    if wants_dx:
        dx = x.new_empty(call.num_rows, x.shape[1])
        launcher.rows(dh_RF, w_in, dx, transposed=False)
        if row_to_token is not None:
            dx = _sum_by_token(dx, row_to_token, x.shape[0])
    return dx, dw_in, dw_out, call.nothing() if dscale is None else dscale


def expert_mlp_forward(call: Forward) -> tuple[torch.Tensor, torch.Tensor]:
    """The raw piece `ops.expert_mlp_forward`."""
    launcher, (y, h) = _Launcher(call), _outputs(call)
    a_RF = launcher.up(call.x, call.w_in, call.kind, call.rows, call.scale, h)
    launcher.rows(a_RF, call.w_out, y, transposed=True)
    return y, h


def expert_mlp_dgrad(call: Dgrad) -> DgradResult:
    """The raw piece `ops.expert_mlp_dgrad`."""
    launcher, (dx, dh, a), dscale = _Launcher(call), _outputs(call), call.new_dscale()
    launcher.hidden(call.dy, call.w_out, call.kind, call.h, call.rows, call.scale, dh, a, dscale)
    launcher.rows(dh, call.w_in, dx, transposed=False)
    return DgradResult(dx, dh, a, dscale)


def expert_mlp_wgrad(call: Wgrad) -> None:
    """The raw piece `ops.expert_mlp_wgrad`."""
    launcher = _Launcher(call)
    for dw in (call.dw_in, call.dw_out):
        _check_contiguous("dw_in, dw_out", dw, "contiguous buffers")
    launcher.weights(call.dh, call.x, call.dw_in, call.experts, right_map=call.rows)
    launcher.weights(call.dy, call.a, call.dw_out, call.experts, left_map=call.rows)


class _Launcher:
    """What the kernels of one call share: groups on the device, what chooses the blocks, the SM budget."""

    def __init__(self, call: Call, *, with_tail: bool = False) -> None:
        groups, (rows, w_out), self.device = call.groups, call.operands, call.device
        self.num_rows, self.num_experts, self.num_sms = call.num_rows, call.num_experts, call.num_sms
        self.ends, self.starts = _on_device(groups.ends, call.device), _on_device(groups.starts, call.device)
        self.with_tail, self.target = with_tail, target(call.device)
        self.problem = problem_of(rows, w_out, groups.total if groups.on_host else call.num_rows)
        self._tiles: dict[int, tuple[torch.Tensor, int]] = {}
        self.dealt, self._counters = config.TILES.read() == "dealt", list[torch.Tensor]()

    def up(
        self,
        x: torch.Tensor,
        w_in: torch.Tensor,
        kind: str,
        row_to_token: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        h_RF: torch.Tensor | None,
    ) -> torch.Tensor:
        """a = act(h) * row_scale, and h where a buffer is given."""
        hidden, ffn = w_in.shape[2], width(w_in.shape[1], kind)
        a_RF, shape = x.new_empty(self.num_rows, ffn), block_shape("up", self.problem)
        x, w_in = _unit_stride(x), _unit_stride(w_in)
        a_operand, a_tma = (x, False) if row_to_token is not None else _operand(x, self.problem, (shape.m, shape.k))
        b_operand, b_tma = _operand(w_in, self.problem, (1, shape.n, shape.k))
        self._over_rows(
            up_kernel, shape, ffn, a_operand, row_to_token, _float32(row_scale), b_operand, h_RF, a_RF,
            hidden, ffn, x.stride(0), w_in.stride(0), w_in.stride(1),
            KIND=KIND_NUMBERS[kind], MAPPED=row_to_token is not None, SCALED=row_scale is not None,
            SAVE_H=h_RF is not None, A_TMA=a_tma, B_TMA=b_tma, EVEN_K=hidden % shape.k == 0,
        )  # fmt: skip
        return a_RF

    def rows(self, a_RK: torch.Tensor, b: torch.Tensor, out_RN: torch.Tensor, *, transposed: bool) -> None:
        """out = a @ b[expert].T (`transposed`, b [E, N, K]) or a @ b[expert] (b [E, K, N])."""
        columns, inner = out_RN.shape[1], a_RK.shape[1]
        shape, b = block_shape("rows", self.problem), _unit_stride(b)
        a_operand, a_tma = _operand(a_RK, self.problem, (shape.m, shape.k))
        block = (1, shape.n, shape.k) if transposed else (1, shape.k, shape.n)
        b_operand, b_tma = _operand(b, self.problem, block)
        strides = (b.stride(1), 1) if transposed else (1, b.stride(1))
        self._over_rows(
            rows_kernel, shape, columns, a_operand, b_operand, out_RN, columns, inner, a_RK.stride(0), b.stride(0),
            *strides,
            A_TMA=a_tma, B_TMA=b_tma, B_IS_NK=transposed, EVEN_K=inner % shape.k == 0,
        )  # fmt: skip

    def hidden(
        self,
        dy_RD: torch.Tensor,
        w_out: torch.Tensor,
        kind: str,
        h_RF: torch.Tensor,
        row_map: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        dh_RF: torch.Tensor,
        a_RF: torch.Tensor,
        dscale_R: torch.Tensor | None,
    ) -> None:
        """Writes dh and a, and the gradient of row_scale where a buffer is given. `row_map`: of the rows of dy."""
        hidden, ffn = w_out.shape[1], w_out.shape[2]
        shape, dy_RD, w_out = block_shape("hidden", self.problem), _unit_stride(dy_RD), _unit_stride(w_out)
        parts = None
        if dscale_R is not None:
            parts = dy_RD.new_empty(blocks(ffn, shape.n), self.num_rows, dtype=torch.float32)
        a_operand, a_tma = (dy_RD, False) if row_map is not None else _operand(dy_RD, self.problem, (shape.m, shape.k))
        b_operand, b_tma = _operand(w_out, self.problem, (1, shape.k, shape.n))
        self._over_rows(
            hidden_gradient_kernel, shape, ffn, a_operand, row_map, b_operand, h_RF.contiguous(), _float32(row_scale),
            dh_RF, a_RF, parts, self.num_rows, hidden, ffn, dy_RD.stride(0), w_out.stride(0), w_out.stride(1),
            KIND=KIND_NUMBERS[kind], MAPPED=row_map is not None, SCALED=row_scale is not None,
            WANTS_DSCALE=dscale_R is not None, A_TMA=a_tma, B_TMA=b_tma, EVEN_K=hidden % shape.k == 0,
        )  # fmt: skip
        if dscale_R is not None and self.num_rows > 0:
            tiles, capacity = self._list_tiles(shape.m)
            launch(
                sum_parts_kernel, (capacity,), tiles, capacity, parts, dscale_R, self.num_rows, blocks(ffn, shape.n),
                BLOCK_M=shape.m,
            )  # fmt: skip

    def weights(
        self,
        left_RM: torch.Tensor,
        right_RN: torch.Tensor,
        out: torch.Tensor,
        experts: tuple[int, int] | None = None,
        *,
        left_map: torch.Tensor | None = None,
        right_map: torch.Tensor | None = None,
    ) -> None:
        """out[expert] = left.T @ right over its rows, for the experts first .. last-1 (None: all).

        One of the two may be read through a map.
        """
        first, last = (0, self.num_experts) if experts is None else experts
        shape = block_shape("weights", self.problem)
        row_map = left_map if right_map is None else right_map
        if row_map is not None:
            # The map is read ahead of the rows: it takes two of the stages.
            shape = replace(shape, stages=shape.stages + 2)
        left_RM, right_RN = _unit_stride(left_RM), _unit_stride(right_RN)
        _, left_width, right_width = out.shape
        tiles = (last - first) * blocks(left_width, shape.m) * blocks(right_width, shape.n)
        left_blocks, left_tma = _operand(left_RM, self.problem, (shape.k, shape.m))
        right_blocks, right_tma = _operand(right_RN, self.problem, (shape.k, shape.n))
        tma = left_tma and right_tma and row_map is None
        self._launch(
            weights_kernel, shape, tiles, self._counter(), left_RM, right_RN, left_blocks if tma else None,
            right_blocks if tma else None, row_map, out, self.starts, self.ends, first, last,
            self.num_rows, left_width, right_width, left_RM.stride(0), right_RN.stride(0),
            HAS_STARTS=self.starts is not None, MAP_LEFT=left_map is not None, MAP_RIGHT=right_map is not None, TMA=tma,
        )  # fmt: skip

    def _over_rows(self, kernel: Any, shape: Blocks, columns: int, *args: Any, **constants: Any) -> None:
        """Launch over row tiles x column tiles."""
        if self.num_rows > 0 and (self.num_experts > 0 or self.with_tail):
            tiles, capacity = self._list_tiles(shape.m)
            most = capacity * blocks(columns, shape.n)
            self._launch(kernel, shape, most, tiles, capacity, self._counter(), *args, **constants)

    def _list_tiles(self, block_m: int) -> tuple[torch.Tensor, int]:
        if block_m not in self._tiles:
            # Every expert, and the rows beyond the last, may end with a tile that is not full.
            capacity = blocks(self.num_rows, block_m) + self.num_experts + 1
            words, counters = 3 * capacity + 1, COUNTERS if self.dealt else 0
            tiles = torch.empty(words + counters, dtype=torch.int32, device=self.device)
            launch(
                list_tiles_kernel, (self.num_experts + self.with_tail,), self.starts, self.ends, tiles,
                self.num_experts, self.num_rows, capacity, HAS_STARTS=self.starts is not None, BLOCK_M=block_m,
                BLOCK_E=power_of_two(self.num_experts), SPLIT=SPLIT_TILES, COUNTERS=counters,
            )  # fmt: skip
            if counters:
                self._counters += tiles[words:].split(1)
            self._tiles[block_m] = tiles, capacity
        return self._tiles[block_m]

    def _counter(self) -> torch.Tensor | None:
        """A word that is zero on the device when the next kernel begins, for that kernel alone; None: tiles in turn."""
        if not self.dealt:
            return None
        return self._counters.pop() if self._counters else torch.zeros(1, dtype=torch.int32, device=self.device)

    def _launch(self, kernel: Any, shape: Blocks, most_tiles: int, *args: Any, **constants: Any) -> None:
        # Two programs may lie on two multiprocessors, so a budget counts programs.
        programs = self.target.multiprocessors * shape.per_sm if self.num_sms is None else self.num_sms
        launch(
            kernel, (min(programs, most_tiles),), *args, **constants, BLOCK_M=shape.m, BLOCK_N=shape.n,
            BLOCK_K=shape.k, GROUP=shape.group, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip


def _outputs(call: Forward | Dgrad) -> list[torch.Tensor]:
    for field, (given, _) in call.buffers().items():
        if given is not None:
            _check_contiguous(field, given, "a contiguous buffer")
    return call.outputs()


def _check_contiguous(field: str, buffer: torch.Tensor, expected: str) -> None:
    if not buffer.is_contiguous():
        raise ConfigError(field, f"strides {buffer.stride()}", f"{expected} for the Triton kernels")


def _operand(tensor: torch.Tensor, problem: Problem, block: tuple[int, ...]) -> tuple[Any, bool]:
    """(argument of a kernel, whether it is a TMA descriptor): where the chip has them and the tensor's layout allows.

    Addresses and strides must be multiples of 16 bytes.
    """
    itemsize = tensor.element_size()
    allowed = (
        (problem.arch in _TMA_CLASSES or (problem.arch == "interpreter" and INTERPRET_DESCRIPTORS))
        and tensor.numel() > 0
        and tensor.data_ptr() % _WIDE_BYTES == 0
        and all(stride > 0 and stride * itemsize % _WIDE_BYTES == 0 for stride in tensor.stride()[:-1])
    )
    return (TensorDescriptor.from_tensor(tensor, list(block)), True) if allowed else (tensor, False)


@dataclass(frozen=True)
class Target:
    """What a device is to the table of blocks and to the size of a grid."""

    arch: str
    multiprocessors: int


@cache
def target(device: torch.device) -> Target:
    """The target of tensors on this device."""
    if device.type == "cpu":
        return Target("interpreter", INTERPRETED_SMS)
    arch = architecture_class(hardware.architecture(device))
    return Target(arch, torch.cuda.get_device_properties(device).multi_processor_count)


def _gathered(x_TD: torch.Tensor, row_to_token: torch.Tensor) -> torch.Tensor:
    """x[row_to_token], zeros for -1: [R, D]."""
    out_RD, x_TD = x_TD.new_empty(row_to_token.shape[0], x_TD.shape[1]), x_TD.contiguous()
    if x_TD.shape[0] == 0:
        return out_RD.zero_()
    block = min(power_of_two(x_TD.shape[1]), 2 * _SUM_COLUMNS)
    grid = (out_RD.shape[0], blocks(x_TD.shape[1], block))
    launch(gather_rows_kernel, grid, x_TD, row_to_token, out_RD, x_TD.shape[1], BLOCK_N=block)
    return out_RD


def _sum_by_token(rows_RD: torch.Tensor, row_to_token: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """out[t] = sum of the rows of token t in the order of the rows; [T, D] in their dtype.

    Example: rows of the tokens [1, -1, 0, 1]: order [1, 2, 0, 3], of which bounds [1, 2, 4] give 2 to 0 and 0, 3 to 1.
    """
    tokens, order = torch.sort(row_to_token, stable=True)
    numbers = torch.arange(num_tokens + 1, dtype=tokens.dtype, device=tokens.device)
    bounds = torch.searchsorted(tokens, numbers)
    out_TD, block = rows_RD.new_empty(num_tokens, rows_RD.shape[1]), min(power_of_two(rows_RD.shape[1]), _SUM_COLUMNS)
    grid = (num_tokens, blocks(rows_RD.shape[1], block))
    launch(sum_rows_kernel, grid, rows_RD, order, bounds, out_TD, rows_RD.shape[1], BLOCK_N=block)
    return out_TD


def problem_of(like: torch.Tensor, w_out: torch.Tensor, num_rows: int) -> Problem:
    """What chooses the block shapes of a call with this many rows in all."""
    experts, hidden, ffn = w_out.shape
    arch, item_bytes = target(like.device).arch, like.element_size()
    # Rows that do not begin at multiples of 16 bytes are read element by element: large tiles would spill.
    if arch != "interpreter" and (hidden * item_bytes % _WIDE_BYTES or ffn * item_bytes % _WIDE_BYTES):
        arch = "portable"
    return Problem(arch=arch, item_bytes=item_bytes, hidden=hidden, ffn=ffn, rows=num_rows // max(experts, 1))


def _on_device(bounds: Bounds | None, device: torch.device) -> torch.Tensor | None:
    if bounds is None:
        return None
    if not isinstance(bounds, torch.Tensor):
        bounds = torch.tensor(bounds, dtype=torch.int32)
    return bounds.to(device=device, dtype=torch.int32).contiguous()


def _float32(row_scale: torch.Tensor | None) -> torch.Tensor | None:
    return None if row_scale is None else row_scale.to(torch.float32).contiguous()


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where neighbours in a row do not lie side by side (gradients may arrive with stride 0)."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
