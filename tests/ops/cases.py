"""Inputs for the tests of the operators."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from moe_overlap import ops
from moe_overlap.ops import compiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("swiglu", "gelu", "relu")


def compiled_obstacle(op: str) -> str | None:
    """Why the compiled implementation of an operator cannot run in this install, or None."""
    return compiled.obstacle(op)(torch.device("cpu"), torch.float32)


def cpu_implementations(op: str) -> list:
    """Values of a parameter: `reference`, and `cpp`, skipped where it was not built."""
    why_not = compiled_obstacle(op)
    return ["reference", pytest.param("cpp", marks=pytest.mark.skipif(why_not is not None, reason=str(why_not)))]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype).requires_grad_(grad)


@dataclass(frozen=True)
class Routing:
    """A routing and its maps."""

    ids_TK: torch.Tensor
    tokens_per_expert: torch.Tensor
    offs: torch.Tensor
    slot_to_row: torch.Tensor
    row_to_slot: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.row_to_slot.shape[0]


def routed(ids_TK: torch.Tensor, experts: int, **how: int) -> Routing:
    return Routing(ids_TK, *ops.row_map(ids_TK, num_experts=experts, **how))


def hard_ids() -> dict[str, torch.Tensor]:
    """int32 ids [T, K] for 4 experts: the cases in which index code goes wrong."""
    some = torch.tensor([[0, 3], [-1, 1], [3, 0], [2, -1], [-1, -1], [1, 3]], dtype=torch.int32)
    return {
        "mixed, unused": some,
        "no tokens": some[:0],
        "one token": some[:1],
        "nothing used": torch.full_like(some, -1),
        "all to one expert": torch.full_like(some, 2),
        "empty experts": some.clamp(max=1),
        "the same expert twice": torch.tensor([[1, 1], [0, 1], [3, 3]], dtype=torch.int32),
        "one expert per token": some[:, :1].clone(),
    }


def weights(experts: int, hidden: int, ffn: int, kind: str, dtype: torch.dtype, grad: bool = False) -> tuple:
    """w_in and w_out, scaled so that results stay near 1."""
    wide = 2 * ffn if kind == "swiglu" else ffn
    w_in = randn(experts, wide, hidden, seed=1) / hidden**0.5
    w_out = randn(experts, hidden, ffn, seed=2) / ffn**0.5
    return w_in.to(dtype).requires_grad_(grad), w_out.to(dtype).requires_grad_(grad)
