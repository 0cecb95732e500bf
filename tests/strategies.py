"""Seeded generators of routing: every shape of imbalance a router can hand to the layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

Ids = torch.Tensor


def balanced(tokens: int, experts: int, k: int, generator: torch.Generator) -> Ids:
    """Round robin: expert counts differ by at most one."""
    first_T = torch.arange(tokens) * k
    return (first_T[:, None] + torch.arange(k)) % experts


def uniform(tokens: int, experts: int, k: int, generator: torch.Generator) -> Ids:
    """K distinct experts per token, all equally likely."""
    return torch.rand(tokens, experts, generator=generator).argsort(dim=-1)[:, :k]


def zipf(tokens: int, experts: int, k: int, generator: torch.Generator) -> Ids:
    """Expert i is wanted with weight 1 / (i + 1); K distinct experts per token (Gumbel top-k)."""
    weights_E = 1.0 / torch.arange(1, experts + 1, dtype=torch.float64)
    uniform_TE = torch.rand(tokens, experts, generator=generator, dtype=torch.float64).clamp_min(1e-12)
    return (weights_E.log() - (-uniform_TE.log()).log()).topk(k, dim=-1).indices


def one_expert(tokens: int, experts: int, k: int, generator: torch.Generator) -> Ids:
    """Every token to the last expert and nowhere else: the other K-1 slots are unused (-1)."""
    ids_TK = torch.full((tokens, k), -1)
    ids_TK[:, 0] = experts - 1
    return ids_TK


def empty_expert(tokens: int, experts: int, k: int, generator: torch.Generator) -> Ids:
    """Uniform, except that the middle expert gets nothing (no effect when K needs every expert)."""
    scores_TE = torch.rand(tokens, experts, generator=generator)
    scores_TE[:, experts // 2] = 2.0
    return scores_TE.argsort(dim=-1)[:, :k]


def with_unused(tokens: int, experts: int, k: int, generator: torch.Generator) -> Ids:
    """Uniform, then about a third of the slots unused (-1), so some tokens have no expert at all."""
    ids_TK = uniform(tokens, experts, k, generator)
    return ids_TK.masked_fill(torch.rand(tokens, k, generator=generator) < 1 / 3, -1)


def nobody(tokens: int, experts: int, k: int, generator: torch.Generator) -> Ids:
    """No token has an expert."""
    return torch.full((tokens, k), -1)


ROUTINGS: dict[str, Callable[[int, int, int, torch.Generator], Ids]] = {
    "balanced": balanced,
    "uniform": uniform,
    "zipf": zipf,
    "one_expert": one_expert,
    "empty_expert": empty_expert,
    "with_unused": with_unused,
    "nobody": nobody,
}


def make_routing(
    kind: str, tokens: int, experts: int, k: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32 [T, K], weights [T, K] in (0, 1], 0 where the id is -1) of the named kind."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = ROUTINGS[kind](tokens, experts, k, generator).to(torch.int32)
    weights_TK = 1.0 - torch.rand(tokens, k, generator=generator, dtype=torch.float64)
    return ids_TK, weights_TK.masked_fill(ids_TK < 0, 0.0).to(dtype)


LOGITS = ("normal", "skewed", "one_expert", "ties", "all_equal", "partly_minus_inf")


def make_logits(
    kind: str, tokens: int, experts: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Logits [T, E] of the named kind. "ties" holds few distinct values; "partly_minus_inf" masks half the experts."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    if kind == "skewed":
        logits_TE -= 2.0 * torch.arange(1, experts + 1, dtype=torch.float64).log()
    elif kind == "one_expert":
        logits_TE[:, experts - 1] += 50.0
    elif kind == "ties":
        logits_TE = logits_TE.round()
    elif kind == "all_equal":
        logits_TE = torch.zeros_like(logits_TE)
    elif kind == "partly_minus_inf":
        logits_TE[:, : experts // 2] = float("-inf")
    elif kind != "normal":
        raise ValueError(f"unknown kind of logits: {kind}")
    return logits_TE.to(dtype)
