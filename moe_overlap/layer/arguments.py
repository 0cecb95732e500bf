"""The arguments of a layer, checked, and the shape of its result. A user's mistake is a ConfigError."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_overlap.agreement.header import WEIGHTS_AT as WEIGHTS_AT
from moe_overlap.agreement.record import DTYPES
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.auto.beside import Op
from moe_overlap.errors import ConfigError
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.transport.host_link import HostLink

AnySchedule = SchedulePair | AutoSchedule
Given = Mapping[str, torch.Tensor | None]  # what a layer's caller has for its router, by name
DEDUP = ("off", "auto", "on")
MODES = ("host", "static")
NOT_TRACEABLE = "exchanges and the order of backward are not traceable: one graph break"


@dataclass(frozen=True, eq=False, kw_only=True)
class Beside:
    """Backbone ops that run beside a layer's exchanges, their input, and the schedules that order both. `late`: the
    layer's x is what its router alone reads; this gives the ops' input and what the experts read, both of x's shape,
    and is called while ranks agree."""

    hidden: torch.Tensor
    schedule: AnySchedule
    backbone: Sequence[Op]
    late: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None


def check_positive(*, optional: Mapping[str, object] | None = None, **sizes: object) -> None:
    """Raises ConfigError for a size that is no integer of at least 1; those of `optional` may be None."""
    given = {name: value for name, value in (optional or {}).items() if value is not None}
    for name, value in (sizes | given).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(name, value, "an integer of at least 1")


def check_choices(num_experts: int, top_k: object, dtype: torch.dtype | None, weights_at: str) -> str:
    """`weights_at`. Raises ConfigError for a top_k out of range, a dtype that rows cannot have, or a place for the
    weights that does not exist."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ConfigError("top_k", top_k, f"an integer from 1 to num_experts ({num_experts})")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError("dtype", dtype, f"None or one of {DTYPES}")
    if weights_at not in WEIGHTS_AT:
        raise ConfigError("weights_at", weights_at, f"one of {WEIGHTS_AT}")
    if weights_at == "input" and top_k > 1:
        raise NotImplementedError('MoELayer(weights_at="input") with top_k above 1, which is K rows for a token: see '
                                  'moe_forward(weights_at="input")')  # fmt: skip
    return weights_at


def check_mode(mode: object) -> None:
    """Raises ConfigError for a mode that does not exist."""
    if mode not in MODES:
        raise ConfigError("mode", mode, f"one of {MODES}")


def check_dedup(dedup: object) -> None:
    """Raises ConfigError for a way of deduplication that does not exist."""
    if dedup == "gather":
        raise NotImplementedError('dedup="gather": an all-gather of rows where top_k exceeds the ranks')
    if dedup not in DEDUP:
        raise ConfigError("dedup", dedup, f"one of {DEDUP}")


def check_payload(dtype: object) -> None:
    """Raises ConfigError for a dtype in which rows cannot travel: it has to hold the range of float32."""
    if dtype not in (None, torch.bfloat16):
        expected = "None (rows travel as they are) or torch.bfloat16, which has the range of float32 rows"
        raise ConfigError("payload_dtype", dtype, expected)


def check_options(mode: object, dedup: object, max_in_flight_bytes: object, schedule: object, payload: object) -> None:
    """The checks of a layer's words, of its budget and of the dtype of its rows on the wire."""
    check_mode(mode)
    check_dedup(dedup)
    check_budget(max_in_flight_bytes, "auto" if mode == "static" else schedule)
    check_payload(payload)


def check_budget(max_in_flight_bytes: object, schedule: object) -> None:
    """Raises ConfigError for a budget that is no integer above 0, or that nobody would keep."""
    if max_in_flight_bytes is None:
        return
    if isinstance(max_in_flight_bytes, bool) or not isinstance(max_in_flight_bytes, int) or max_in_flight_bytes < 1:
        raise ConfigError("max_in_flight_bytes", max_in_flight_bytes, "None or an integer of at least 1")
    if schedule != "auto":
        expected = 'None, or schedule="auto", which plans within it, or mode="static"'
        raise ConfigError("max_in_flight_bytes", max_in_flight_bytes, expected)


def rows_dtype(x: object, weight: torch.Tensor, hidden: int, link: HostLink | None = None) -> torch.dtype:
    """The dtype of the rows of x [..., D] beside an expert weight, which comes to x by `link` or is there: the
    weight's, or autocast's.

    Raises ConfigError for an x that does not fit.
    """
    if not isinstance(x, torch.Tensor):
        raise ConfigError("x", type(x).__name__, f"a tensor [..., {hidden}]")
    if x.dim() < 1 or x.shape[-1] != hidden:
        raise ConfigError("x.shape[-1]", x.shape[-1] if x.dim() else 0, f"hidden_size = {hidden}")
    if not x.is_floating_point():
        raise ConfigError("x.dtype", x.dtype, f"a floating-point dtype: that of the expert weights, {weight.dtype}")
    device = weight.device if link is None else link.device
    if x.device != device:
        raise ConfigError("x.device", x.device, f"the device of the expert weights, {device}")
    if hasattr(weight, "device_mesh"):
        raise ConfigError(
            "experts.down_proj",
            "a DTensor in forward",
            "a plain one: make the layer or what contains it an FSDP unit, not its experts alone, as the layer reads "
            "their weights and does not call them",
        )
    # Autocast leaves float64 alone, here as everywhere in torch.
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype:
        raise ConfigError("x.dtype", x.dtype, f"the dtype of the expert weights, {weight.dtype}, or autocast")
    return weight.dtype


def check_router_input(router_input: object, x: torch.Tensor) -> torch.Tensor:
    """What the router reads instead of x [..., D], as [T, D]. Raises ConfigError for what does not go with x."""
    if not isinstance(router_input, torch.Tensor):
        raise ConfigError("router_input", type(router_input).__name__, f"None or a tensor {tuple(x.shape)}, as x is")
    if router_input.shape != x.shape or router_input.device != x.device or not router_input.is_floating_point():
        given = f"{router_input.dtype} {tuple(router_input.shape)} on {router_input.device}"
        raise ConfigError("router_input", given, f"a floating-point tensor {tuple(x.shape)} on {x.device}, as x is")
    return router_input.reshape(-1, x.shape[-1])


def check_choice(ids_TK: torch.Tensor, num_experts: int, status: torch.Tensor | None = None) -> None:
    """Raises ConfigError for an id outside -1..num_experts-1 or where the router saw bad logits: one rank's form of
    what ranks agree on. One device-to-host read; none where torch.compile traces, which checks on the device, and none
    while a CUDA graph is captured, which may hold no read and checks nothing: the kernels skip ids out of range."""
    if ids_TK.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    logits_text = "logits: a row with NaN or +inf, or with -inf everywhere"
    ids_text = f"expert ids from -1 to {num_experts - 1}"
    if torch.compiler.is_compiling():
        ids = ((ids_TK < -1) | (ids_TK >= num_experts)).any()
        torch._assert_async(~ids, f"topk_ids: not {ids_text}")
        if status is not None:
            torch._assert_async(~(status != 0).any(), logits_text)
        return
    # Few kernels, and one read.
    words = [] if status is None else [status.max()]
    words += torch.aminmax(ids_TK) if ids_TK.numel() else []
    said = torch.stack(words).tolist() if words else []
    bad_logits = said.pop(0) if status is not None else 0
    if said and (said[0] < -1 or said[1] >= num_experts):
        bad = ids_TK[(ids_TK < -1) | (ids_TK >= num_experts)]
        raise ConfigError("topk_ids", int(bad.reshape(-1)[0]), ids_text)
    if bad_logits:
        expected = "no row with NaN or +inf, none that is all -inf (or bad_logits='drop')"
        raise ConfigError("logits", bad_logits, expected)
