"""The cases of gpu_expert_mlp.py: shapes with their targets, routing, tensors, and what is right, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moe_overlap.ops import registry
from tests.tolerances import TOLERANCES

PHASES = ("forward", "backward")
FLOP_FACTOR = {"forward": 6, "backward": 12}
"""Of R * D * F: three matmuls of a row forward (gate, up, down), the gradient of both operands of each backward."""

ROUTINGS = ("uniform", "uneven")
UNEVENNESS = 0.5
"""Sigma of the log-normal popularity of experts: the one wanted most of 128 gets about three times the mean."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """tokens: of one rank. top_k: experts of a token; None: `tokens` counts rows that arrived for the experts of this
    rank and lie in their order, so that there is nothing to gather and to sum. targets: TFLOP/s on one H200 in bf16,
    public: the best published figure."""

    name: str
    tokens: int
    top_k: int | None
    experts: int
    hidden: int
    ffn: int
    targets: Mapping[str, float] = field(default_factory=dict)
    public: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.tokens * (self.top_k or 1)

    def flop(self, phase: str) -> int:
        return FLOP_FACTOR[phase] * self.rows * self.hidden * self.ffn


def _qwen3(tokens: int, targets: tuple[float, float], public: tuple[str, str]) -> Shape:
    return Shape(
        name=f"Qwen3-30B-A3B T={tokens}", tokens=tokens, top_k=8, experts=128, hidden=2048, ffn=768,
        targets=dict(zip(PHASES, targets, strict=True)), public=dict(zip(PHASES, public, strict=True)),
    )  # fmt: skip


SHAPES = (
    _qwen3(8192, (430.0, 400.0), ("345 (H200)", "194 (H200)")),
    _qwen3(32768, (520.0, 480.0), ("about 501 (H100)", "413 with forward (H100)")),
    Shape(
        name="Mixtral 8x7B T=8192", tokens=8192, top_k=2, experts=8, hidden=4096, ffn=14336,
        targets={"forward": 620.0, "backward": 560.0}, public={"forward": "613 (H200)", "backward": "452 (H200)"},
    ),
    Shape(
        name="DeepSeek-V3 EP8 R=32768", tokens=32768, top_k=None, experts=32, hidden=7168, ffn=2048,
        targets={"forward": 600.0},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """One problem. x, dout: [T, D]. ids int32, weights float32: [T, K]. The maps are those of `row_map`; row_to_token
    and row_scale [R] are None where rows arrived in the experts' order."""

    x: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    dout: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    offs: torch.Tensor
    slot_to_row: torch.Tensor
    row_to_slot: torch.Tensor
    row_to_token: torch.Tensor | None
    row_scale: torch.Tensor | None

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        """What has a gradient."""
        named = {"x": self.x, "w_in": self.w_in, "w_out": self.w_out}
        return named if self.row_scale is None else named | {"row_scale": self.row_scale}


def route(shape: Shape, routing: str, generator: torch.Generator) -> torch.Tensor:
    """ids int32 [T, K], distinct in a row (top_k None: [R, 1], sorted), drawn with equal or with uneven popularity."""
    device = generator.device
    popularity_E = torch.zeros(shape.experts, device=device)
    if routing == "uneven":
        popularity_E = UNEVENNESS * torch.randn(shape.experts, device=device, generator=generator)
    # The largest of logits with Gumbel noise are a draw without repetition.
    uniform_TE = torch.rand(shape.tokens, shape.experts, device=device, generator=generator).clamp_(1e-12, 1 - 1e-7)
    scores_TE = popularity_E - uniform_TE.log().neg_().log_()
    ids_TK = scores_TE.topk(shape.top_k or 1, dim=1).indices.to(torch.int32)
    return ids_TK if shape.top_k else ids_TK.sort(dim=0).values


def make(shape: Shape, routing: str, *, device: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random tensors, scaled so that h and y stay near 1."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_(std=std, generator=generator)

    ids_TK = route(shape, routing, generator)
    row_map = registry.function("row_map", "reference")
    _, offs, slot_to_row, row_to_slot = row_map(ids_TK, shape.experts, 0, shape.experts, 1, None)
    weights_TK, row_to_token, row_scale = torch.ones(ids_TK.shape, device=device), None, None
    if shape.top_k:
        weights_TK = torch.randn(ids_TK.shape, device=device, generator=generator).softmax(dim=1)
        row_to_token = (row_to_slot // shape.top_k).to(torch.int32)
        row_scale = weights_TK.view(-1)[row_to_slot.long()]
    experts, hidden, ffn = shape.experts, shape.hidden, shape.ffn
    return Inputs(
        normal(shape.tokens, hidden), normal(experts, 2 * ffn, hidden, std=hidden**-0.5),
        normal(experts, hidden, ffn, std=ffn**-0.5), normal(shape.tokens, hidden), ids_TK, weights_TK, offs,
        slot_to_row, row_to_slot, row_to_token, row_scale,
    )  # fmt: skip


@dataclass(frozen=True)
class Right:
    """Float64 results. Valid for the tokens and the experts whose number is a multiple of `every`: out, dx [T, D],
    drow_scale [R] at the rows of those tokens, dw_in, dw_out of those experts, stacked."""

    every: int
    values: Mapping[str, torch.Tensor]


def right(inputs: Inputs, every: int = 1) -> Right:
    """Forward and backward expert by expert. Where `every` is more than 1 only what is valid is computed."""
    x, dout, device = inputs.x, inputs.dout, inputs.x.device
    out, dx = (torch.zeros(x.shape, dtype=torch.float64, device=device) for _ in range(2))
    dscale_R = torch.zeros(inputs.row_to_slot.shape, dtype=torch.float64, device=device)
    dw_in, dw_out, begin = [], [], 0
    for expert, end in enumerate(inputs.offs.tolist()):
        row_n = torch.arange(begin, end, device=device)
        token_n = row_n if inputs.row_to_token is None else inputs.row_to_token[begin:end].long()
        whole, begin = expert % every == 0, end
        if not whole:
            kept_n = token_n % every == 0
            row_n, token_n = row_n[kept_n], token_n[kept_n]
        w_in, w_out = inputs.w_in[expert].double(), inputs.w_out[expert].double()
        x_nD, dy_nD = x[token_n].double(), dout[token_n].double()
        scale_n = 1.0 if inputs.row_scale is None else inputs.row_scale[row_n].double()[:, None]
        gate_nF, up_nF = (x_nD @ w_in.T).chunk(2, dim=1)
        sigmoid_nF = gate_nF.sigmoid()
        a_nF = gate_nF * sigmoid_nF * up_nF
        out.index_add_(0, token_n, (a_nF * scale_n) @ w_out.T)
        da_nF = dy_nD @ w_out
        dscale_R[row_n] = (da_nF * a_nF).sum(dim=1)
        da_nF = da_nF * scale_n
        dgate_nF = da_nF * up_nF * sigmoid_nF * (1 + gate_nF * (1 - sigmoid_nF))
        dh_nF = torch.cat([dgate_nF, da_nF * gate_nF * sigmoid_nF], dim=1)
        dx.index_add_(0, token_n, dh_nF @ w_in)
        if whole:
            dw_in.append(dh_nF.T @ x_nD)
            dw_out.append(dy_nD.T @ (a_nF * scale_n))
    values = {"out": out, "x": dx, "w_in": torch.stack(dw_in), "w_out": torch.stack(dw_out)}
    return Right(every, values if inputs.row_scale is None else values | {"row_scale": dscale_R})


def check_every(shape: Shape, flop_per_s: float, most_s: float = 2.0) -> int:
    """The `every` with which `right` takes about `most_s` at this float64 rate."""
    return max(1, math.ceil((shape.flop("forward") + shape.flop("backward")) / flop_per_s / most_s))


def error(want: Right, name: str, got: torch.Tensor, inputs: Inputs) -> float:
    """The largest difference over what the table of tolerances allows: right is at most 1, NaN is wrong."""
    value, every = want.values[name], want.every
    looked_at: torch.Tensor | slice = slice(None, None, every)
    if name == "row_scale" and inputs.row_to_token is not None:
        looked_at = inputs.row_to_token % every == 0
    got, value = got[looked_at], value if name in ("w_in", "w_out") else value[looked_at]
    if got.shape != value.shape:
        return math.inf
    tolerance = TOLERANCES[inputs.x.dtype]
    limit = tolerance.atol + tolerance.rtol * value.abs().max().item()
    # An expert at a time: copies in float64 of all weights' gradients would be large.
    pairs = zip(got, value, strict=True) if got.dim() == 3 else [(got, value)]
    worst = max((have.double() - should).abs().max().item() for have, should in pairs)
    return worst / limit if bool(got.isfinite().all()) else math.nan
