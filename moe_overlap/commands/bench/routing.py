"""Which experts the tokens of a benchmark want: drawn, or read from a file of `moe-overlap train --save-routing` or of
a `RoutingLog`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.routing.decision import RoutingDecision

KINDS = ("balanced", "uniform", "zipf", "real")
REAL_FILE = "routing.safetensors"


class ForcedRouter(nn.Module):
    """A router that wants what it is told: ids_TK int32 [T, K] and weights_TK [T, K] (a parameter, so that backward
    has the router's gradient to compute), whatever its input."""

    ids_TK: torch.Tensor
    tokens_per_expert_E: torch.Tensor
    differs_by_rank = True  # the weights are those of a rank's tokens

    def __init__(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int) -> None:
        super().__init__()
        used = ids_TK[ids_TK >= 0].long()
        self.register_buffer("ids_TK", ids_TK.to(torch.int32))
        self.register_buffer("tokens_per_expert_E", torch.bincount(used, minlength=num_experts))
        self.weight = nn.Parameter(weights_TK.clone())

    def forward(
        self, x_TD: torch.Tensor, *, reduce: Any = None, local_experts: torch.Tensor | None = None
    ) -> RoutingDecision:
        return RoutingDecision(
            topk_ids_TK=self.ids_TK,
            topk_weights_TK=self.weight,
            tokens_per_expert_E=self.tokens_per_expert_E,
            dropped_tokens=torch.zeros((), dtype=torch.int64),
            status=torch.zeros(1, dtype=torch.int32),
        )


def load(
    routing: str, *, out: str, tokens: int, experts: int, top_k: int, rank: int, ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32 [T, top_k], weights float32 [T, top_k]) of this rank's tokens, choices in order of score.

    routing: "balanced" (round robin), "uniform" (all choices equally likely), "zipf" (expert i wanted with weight
    1 / (i + 1)), "real" (the file in `out`) or a path. ranks: of the benchmark. See `RoutingFile.of_rank`.
    Raises ConfigError for a file that is missing, broken, made for another number of experts, or too narrow.
    """
    if routing == "balanced":
        first_T = torch.arange(tokens) * top_k
        ids_TK = (first_T[:, None] + torch.arange(top_k)) % experts
        return ids_TK.to(torch.int32), torch.full((tokens, top_k), 1.0 / top_k)
    if routing == "uniform":
        scores_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1000 + rank))
        return scores_TE.topk(top_k).indices.to(torch.int32), torch.full((tokens, top_k), 1.0 / top_k)
    if routing == "zipf":
        return _zipf(tokens, experts, top_k, torch.Generator().manual_seed(1000 + rank))
    path = routing_file(routing, out)
    assert path is not None
    return read_file(path, experts=experts, top_k=top_k).of_rank(rank, ranks, tokens=tokens, top_k=top_k)


def routing_file(routing: str, out: str) -> Path | None:
    """The file that `routing` means; None where it is drawn."""
    if routing in ("balanced", "uniform", "zipf"):
        return None
    return Path(out) / REAL_FILE if routing == "real" else Path(routing)


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutingFile:
    """A routing file, checked. ids_NK: int32 [N, K'], weights_NK: float32 [N, K'], of all tokens. From the metadata,
    None where it does not say: router and mu, what they come from; rank_tokens, how many of them were whose, by rank.
    """

    ids_NK: torch.Tensor
    weights_NK: torch.Tensor
    router: str | None = None
    mu: float | None = None
    rank_tokens: tuple[int, ...] | None = None

    def of_rank(self, rank: int, ranks: int, *, tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [T, top_k], weights [T, top_k]) of a rank's T tokens: those that it had when the file was written, from
        the first one again where they end. Where nothing says whose they were, or as many ranks are not there, the file
        is one list of tokens, and rank w takes those from w * T on."""
        begin, count = 0, self.ids_NK.shape[0]
        first = rank * tokens
        if self.rank_tokens is not None and len(self.rank_tokens) == ranks and all(self.rank_tokens):
            begin, count, first = sum(self.rank_tokens[:rank]), self.rank_tokens[rank], 0
        rows_T = begin + (first + torch.arange(tokens)) % count
        return self.ids_NK[rows_T, :top_k].contiguous(), self.weights_NK[rows_T, :top_k].contiguous()


def read_file(path: Path, *, experts: int, top_k: int) -> RoutingFile:
    """The file, whose tokens have at least `top_k` experts each. Raises ConfigError("--routing")."""
    if not path.is_file():
        hint = "an existing routing file (moe-overlap train --save-routing FILE writes one)"
        raise ConfigError("--routing", str(path), hint)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ConfigError("--routing", str(path), f"a whole safetensors file ({error})") from None
    if metadata.get("E") != str(experts):
        raise ConfigError(
            "--routing", str(path), f"a file for --experts {experts}; its metadata says E = {metadata.get('E')!r}"
        )
    ids, weights = tensors.get("ids"), tensors.get("weights")
    if ids is None or weights is None or ids.dtype != torch.int32 or weights.dtype != torch.float32:
        raise ConfigError("--routing", str(path), "a file with ids (int32) and weights (float32)")
    if ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] < 1 or ids.shape[1] < top_k:
        shapes = (tuple(ids.shape), tuple(weights.shape))
        raise ConfigError("--routing", str(path), f"ids and weights [N >= 1, K >= --top-k {top_k}], not {shapes}")
    if int(ids.min()) < -1 or int(ids.max()) >= experts or not bool(weights.isfinite().all()):
        raise ConfigError("--routing", str(path), f"ids from -1 to {experts - 1} and finite weights")
    rank_tokens = _rank_tokens(metadata, ids.shape[0])
    return RoutingFile(ids_NK=ids, weights_NK=weights, router=metadata.get("router"), mu=_mu(path, metadata),
                       rank_tokens=rank_tokens)  # fmt: skip


def _mu(path: Path, metadata: Mapping[str, str]) -> float | None:
    try:
        mu = float(metadata["mu"]) if "mu" in metadata else None
    except ValueError:
        mu = math.nan
    if mu is not None and not math.isfinite(mu):
        raise ConfigError("--routing", str(path), f"a finite number for mu in its metadata, not {metadata['mu']!r}")
    return mu


def _rank_tokens(metadata: Mapping[str, str], tokens: int) -> tuple[int, ...] | None:
    """Numbers whose sum is `tokens`; None for anything else, as for a file that does not say it."""
    try:
        given = json.loads(metadata.get("rank_tokens", "null"))
    except (ValueError, RecursionError):
        return None
    counts = tuple(given) if isinstance(given, list) and set(map(type, given)) <= {int} else ()
    return counts if sum(counts) == tokens and min(counts, default=-1) >= 0 else None


def _zipf(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts by Gumbel top-k; weights proportional to the experts' popularity."""
    log_E = -torch.arange(1, experts + 1, dtype=torch.float64).log()
    uniform_TE = torch.rand(tokens, experts, generator=generator, dtype=torch.float64).clamp_min(1e-12)
    ids_TK = (log_E - (-uniform_TE.log()).log()).topk(top_k, dim=-1).indices
    weights_TK = torch.softmax(log_E[ids_TK], dim=-1)
    return ids_TK.to(torch.int32), weights_TK.to(torch.float32)
