"""The language model: decoder-only, RMSNorm, rotary positions, causal attention, experts in every second block.

Blocks come in pairs: attention, dense MLP, attention, experts. `moe_block` is the one place that knows how the five
kinds differ. Shapes: B sequences, S tokens each, D hidden, H heads of size d, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from moe_overlap.commands.train.options import TrainOptions
from moe_overlap.commands.train.routers import give_tokens, router_options
from moe_overlap.commands.train.seeds import generator
from moe_overlap.layer.experts import old_name
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.shortcut import ShortcutBlock
from moe_overlap.schedule.builders import tap_of_position
from moe_overlap.transport import EmulatedLinkTransport, LinkSpec, NodeTopology, ProcessGroupTransport, Transport

EMBEDDING_STD = 0.05
ROPE_BASE = 10000.0
NORM_EPS = 1e-6


class Attention(nn.Module):
    """h + causal attention of norm(h), with rotary positions (RoFormer, arXiv 2104.09864). [B, S, D] -> [B, S, D]."""

    cos_Sd: torch.Tensor
    sin_Sd: torch.Tensor

    def __init__(self, hidden: int, head_size: int, seq: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.norm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        frequencies = ROPE_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
        angles_Sd = torch.outer(torch.arange(seq, dtype=torch.float64), frequencies).repeat(1, 2)
        self.register_buffer("cos_Sd", angles_Sd.cos().float(), persistent=False)
        self.register_buffer("sin_Sd", angles_Sd.sin().float(), persistent=False)

    def forward(self, h_BSD: torch.Tensor) -> torch.Tensor:
        batch, seq, hidden = h_BSD.shape
        qkv = self.qkv(self.norm(h_BSD)).view(batch, seq, 3, -1, self.head_size)
        q_BHSd, k_BHSd, v_BHSd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHSd = F.scaled_dot_product_attention(self._rotate(q_BHSd), self._rotate(k_BHSd), v_BHSd, is_causal=True)
        return h_BSD + self.out(mixed_BHSd.transpose(1, 2).reshape(batch, seq, hidden))

    def _rotate(self, x_BHSd: torch.Tensor) -> torch.Tensor:
        seq = x_BHSd.shape[2]
        first, second = x_BHSd.chunk(2, dim=-1)
        return x_BHSd * self.cos_Sd[:seq] + torch.cat((-second, first), dim=-1) * self.sin_Sd[:seq]


class MLP(nn.Module):
    """SwiGLU MLP of norm(h), without the residual: the form a shared expert has. [..., D] -> [..., D]."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(self.norm(h)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Residual(nn.Module):
    """h + branch(h)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.branch(h)


def moe_block(options: TrainOptions, group: dist.ProcessGroup | None) -> nn.Module:
    """One block pair of the kind asked for, [B, S, D] -> [B, S, D].

    top2: two routed experts. shared1: one routed and one shared. scmoe_pos1|2|3: the same, but the routed expert
    reads an earlier activation (ScMoE, arXiv 2404.05019, section 3.1), so that its exchanges hide under the backbone.
    """
    backbone: list[nn.Module] = [
        Attention(options.hidden, options.head_size, options.seq),
        Residual(MLP(options.hidden, options.ffn)),
        Attention(options.hidden, options.head_size, options.seq),
    ]
    overlap = options.overlap == "on"
    new_layer = partial(
        MoELayer,
        options.hidden,
        options.ffn,
        options.experts,
        options.top_k,
        transport=_transport(options, group),
        ranks_per_node=None if group is None else options.ranks_per_node,
        overlap=overlap,
        **router_options(options),
    )
    if options.position:
        middle = (options.window_ops + 1) // 2
        order: dict[str, Any] = {"slot": middle if options.slot is None else options.slot, "chunks": options.chunks}
        return ShortcutBlock(
            backbone,
            new_layer(),
            tap=tap_of_position(options.position),
            shared_expert=MLP(options.hidden, options.ffn),
            combine="gated",
            pre_norm=nn.RMSNorm(options.hidden, eps=NORM_EPS),
            overlap=overlap,
            **({"schedule": "auto"} if options.schedule == "auto" else order),
        )
    default = "chunked(2)" if options.kind == "top2" else "shared_expert"
    shared = None if options.kind == "top2" else options.ffn
    layer = new_layer(schedule=options.schedule or default, shared_expert_size=shared)
    norm = nn.RMSNorm(options.hidden, eps=NORM_EPS)
    return nn.Sequential(*backbone, Residual(nn.Sequential(norm, layer)))


def _transport(options: TrainOptions, group: dist.ProcessGroup | None) -> Transport | None:
    """None for one rank; each layer has a transport of its own, and all of them share the rank's emulated link."""
    if group is None:
        return None
    inner = ProcessGroupTransport(group, timeout_s=options.timeout_s)
    link = LinkSpec.parse(options.link)
    if link is None:
        return inner
    return EmulatedLinkTransport(
        inner, link, NodeTopology(world_size=inner.world_size, ranks_per_node=options.ranks_per_node)
    )


class LanguageModel(nn.Module):
    """tokens int64 [B, S] -> logits [B, S, V]. The embedding is also the output matrix."""

    def __init__(self, options: TrainOptions, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(options.vocab, options.hidden)
        self.pairs = nn.ModuleList(moe_block(options, group) for _ in range(options.layers // 2))
        self.norm = nn.RMSNorm(options.hidden, eps=NORM_EPS)

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        give_tokens(self, tokens_BS)
        h_BSD = self.embedding(tokens_BS)
        for pair in self.pairs:
            h_BSD = pair(h_BSD)
        return F.linear(self.norm(h_BSD), self.embedding.weight)

    def cross_entropy(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean nats per token over int64 [B, S + 1] windows, each token predicted from those before it."""
        logits_BSV = self(windows[:, :-1])
        return F.cross_entropy(logits_BSV.flatten(0, 1), windows[:, 1:].flatten())


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """In order of depth."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(dense, expert) parameters by name. Dense ones are equal on all ranks; experts are this rank's slots."""
    expert_ids = {id(weight) for layer in moe_layers(model) for weight in layer.experts.parameters()}
    dense: dict[str, nn.Parameter] = {}
    expert: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        (expert if id(parameter) in expert_ids else dense)[name] = parameter
    return dense, expert


def router_biases(model: nn.Module) -> dict[str, torch.Tensor]:
    """The biases of --balance loss-free by name: buffers, equal on all ranks."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias_E")}


@torch.no_grad()
def initialise(model: LanguageModel, *, seed: int, rank: int) -> None:
    """Seeded values that depend on the parameter's name and, for experts, on the logical expert, not on the ranks.

    Matrices: normal, std 1 / sqrt(fan_in), the router a tenth of it (a balanced start). Vectors keep their values, and
    so do the zeros of a locality bias.
    Experts go by their old names, so that a seed stands for the run that it always stood for.
    """
    dense, expert = split_parameters(model)
    for name, parameter in dense.items():
        if parameter.dim() < 2 or "locality_bias" in name:
            continue
        std = 1 / math.sqrt(parameter.shape[-1])
        if name == "embedding.weight":
            std = EMBEDDING_STD
        elif "router" in name:
            std /= 10
        _fill(parameter, std, seed, name)
    for name, stacked in expert.items():
        for slot, matrix in enumerate(stacked.unbind(0)):
            logical = rank * stacked.shape[0] + slot
            _fill(matrix, 1 / math.sqrt(matrix.shape[-1]), seed, f"{old_name(name)}[{logical}]")


def _fill(tensor: torch.Tensor, std: float, seed: int, name: str) -> None:
    tensor.copy_(torch.randn(tensor.shape, generator=generator(name, seed)) * std)


def decay_groups(model: nn.Module, weight_decay: float) -> Iterator[dict[str, object]]:
    """Parameter groups for AdamW: matrices decay; the embedding, vectors and routers do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        keep = parameter.dim() < 2 or name == "embedding.weight" or "router" in name
        (plain if keep else decayed).append(parameter)
    yield {"params": decayed, "weight_decay": weight_decay}
    yield {"params": plain, "weight_decay": 0.0}
