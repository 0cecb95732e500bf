"""`transformers_ep.py --compute slept`: what computes sleeps for as long, so that more ranks than cores can be timed.

Rank 0 measures while the others wait: the seconds that one process, with the part of a rank, takes for a token of a
decoder layer without its experts (norms, attention, router), for a token of what stands around the layers (embedding,
last norm, head, loss), for a row of the experts (this library's operators), and for a parameter of AdamW. The three
ways have the same seconds, and each sleeps for what it computes:

                           all_reduce                moe_overlap, all_to_all
    tokens of a rank       all of the global batch   its own part, 1 / ranks
    rows of a rank         those of its experts, of the global batch, in all three
    parameters of a rank   its experts and all else  its experts and 1 / ranks of all else

So all_reduce is not charged for passing over the rows of experts of other ranks, as it does. Modules, parameters and
their gradients (zeros) stay, and so do all collectives with their bytes; results are not right. Choices are drawn once,
alike for all ways and steps, each token's experts equally likely. What is not replaced: collectives, permutations, the
sums of combine, FSDP2's copies, Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_overlap.commands.bench.slept import ExpertSeconds, expert_seconds, median_s

IMPLEMENTATION = "slept"  # of the experts, for transformers' two ways


@dataclass(frozen=True, kw_only=True)
class Seconds(ExpertSeconds):
    """And those of a token in a layer without experts and around all layers, and of a parameter in the optimizer."""

    layer_forward_s: float
    layer_backward_s: float
    around_forward_s: float
    around_backward_s: float
    parameter_s: float


def measure(folder: str, config: Any, *, batch: int, length: int, ranks: int) -> Seconds:
    """Of one process with the part of a rank; the same on all ranks. Collective."""
    names = [field.name for field in fields(Seconds)]
    found = torch.zeros(len(names), dtype=torch.float64)
    if dist.get_rank() == 0:
        rows = batch * length * config.num_experts_per_tok // ranks
        experts = expert_seconds(rows, config.num_experts // ranks, hidden=config.hidden_size,
                                 ffn=config.moe_intermediate_size, dtype=torch.float32)  # fmt: skip
        own = asdict(experts) | _dense_seconds(folder, torch.randint(config.vocab_size, (batch // ranks, length)))
        found = torch.tensor([own[name] for name in names], dtype=torch.float64)
    dist.broadcast(found, 0)
    return Seconds(**dict(zip(names, found.tolist(), strict=True)))


def _dense_seconds(folder: str, ids: torch.Tensor) -> dict[str, float]:
    """Of all but the experts, on ids [B, L]."""
    model = Qwen3MoeForCausalLM.from_pretrained(folder).train()
    layers = len(model.model.layers)
    for layer in model.model.layers:
        layer.mlp.experts.forward = lambda x, ids, weights: x * weights.sum(dim=1, keepdim=True)

    def loss() -> torch.Tensor:
        model.zero_grad()
        found: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    def timed(num_layers: int) -> tuple[float, float]:
        model.config.num_hidden_layers = num_layers
        forward_s = median_s(loss)
        return forward_s, max(0.0, median_s(lambda: loss().backward()) - forward_s)

    around, whole = timed(0), timed(layers)
    forward_s, backward_s = (
        max(0.0, all_s - without_s) / layers for all_s, without_s in zip(whole, around, strict=True)
    )
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    step_s = median_s(torch.optim.AdamW(parameters, lr=1e-3, foreach=False).step)
    tokens = ids.numel()
    return {
        "layer_forward_s": forward_s / tokens, "layer_backward_s": backward_s / tokens,
        "around_forward_s": around[0] / tokens, "around_backward_s": around[1] / tokens,
        "parameter_s": step_s / sum(parameter.numel() for parameter in parameters),
    }  # fmt: skip


class Slept:
    """Puts sleeps into models; `asked_s`: how long it slept, the total of this rank. choices: int [layers, T, K], the
    experts of all tokens of a global batch."""

    def __init__(self, seconds: Seconds, choices: torch.Tensor) -> None:
        self.seconds, self.choices, self.asked_s = seconds, choices, 0.0
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, self._experts)

    def sleep(self, seconds: float) -> None:
        self.asked_s += seconds
        time.sleep(seconds)

    def put_into(self, model: Any, part: slice) -> None:
        """Have all but the experts of a Qwen3-MoE sleep, for the tokens `part` of a global batch."""
        inner, hidden = model.model, model.config.hidden_size
        embedding, norm, head, s = inner.embed_tokens, inner.norm, model.lm_head, self.seconds

        def last(x: torch.Tensor) -> torch.Tensor:
            tokens = _tokens(x)
            return self(x, tokens * s.around_forward_s, tokens * s.around_backward_s, head.weight).sum()

        # Sums, as FSDP2 warns of modules that return views.
        embedding.forward = lambda ids: torch.zeros(*ids.shape, hidden) + self(torch.zeros(1), 0, 0, embedding.weight)
        norm.forward = lambda x: self(x, 0, 0, norm.weight)
        head.forward = last
        model.loss_function = lambda logits, *_, **__: logits
        for layer, choices in zip(inner.layers, self.choices, strict=True):
            layer.forward = self._layer(layer, choices[part])

    def optimize(self, model: nn.Module) -> None:
        """An optimizer's step over the parameters that this rank holds."""
        held = [getattr(one, "_local_tensor", one) for one in model.parameters()]
        self.sleep(self.seconds.parameter_s * sum(one.numel() for one in held))

    def __call__(self, x: torch.Tensor, forward_s: float, backward_s: float, *also: torch.Tensor) -> torch.Tensor:
        """x after forward_s; its backward takes backward_s, and gives zeros to `also`."""
        slept: torch.Tensor = _Sleep.apply(x, self.sleep, forward_s, backward_s, *also)
        return slept

    def _layer(self, layer: Any, choices_TK: torch.Tensor) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            # Here, inside the call, FSDP2 has whole parameters in the place of its shards.
            own = [one for name, one in layer.named_parameters() if not name.startswith("mlp.experts.")]
            tokens, s = _tokens(hidden_states), self.seconds
            x = self(hidden_states, tokens * s.layer_forward_s, tokens * s.layer_backward_s, *own)
            weights_TK = self(torch.full(choices_TK.shape, 1 / choices_TK.shape[1]), 0, 0, layer.mlp.gate.weight)
            return x + layer.mlp.experts(x.flatten(0, 1), choices_TK, weights_TK).view_as(x)

        return forward

    def _experts(self, experts: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """In the place of grouped_mm; ids from num_experts on are of other ranks."""
        rows, s = int((ids < experts.num_experts).sum()), self.seconds
        # A result of its own: all_reduce sums in place.
        return self(x.clone(), rows * s.expert_row_s, rows * (s.dgrad_row_s + s.wgrad_row_s), weights)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sleep: Callable[[float], None], forward_s: float, backward_s: float,
                *also: torch.Tensor) -> torch.Tensor:  # fmt: skip
        ctx.sleep, ctx.backward_s, ctx.shapes = sleep, backward_s, [one.shape for one in also]
        sleep(forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.sleep(ctx.backward_s)
        return grad, None, None, None, *(torch.zeros(shape) for shape in ctx.shapes)


def _tokens(x_BLD: torch.Tensor) -> int:
    return x_BLD.shape[0] * x_BLD.shape[1]


def draw_choices(*, layers: int, tokens: int, experts: int, top_k: int, seed: int) -> torch.Tensor:
    """int64 [layers, T, K]: different experts for each token, all equally likely."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layers, tokens, experts, generator=generator).argsort(dim=2)[:, :, :top_k].contiguous()
