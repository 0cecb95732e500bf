"""How two tensors differ, in words: a factor, a missing rank, experts of another place, or by how much.

`got` is what n ranks have, `want` what one rank has with all experts and all tokens. No process group in here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from moe_overlap.verify.tolerances import TOLERANCES

# How much wider than the tolerance a pattern may fit: got = factor * want carries the error of the factor too.
PATTERN_SLACK = 100.0


def describe(
    got: torch.Tensor,
    want: torch.Tensor,
    *,
    dtype: torch.dtype,
    ranks: int,
    top_k: int = 0,
    parts: Sequence[torch.Tensor] = (),
    experts: bool = False,
) -> str | None:
    """None where `got` is `want` as nearly as computing in `dtype` allows, else what is wrong with it.

    parts: what each rank's tokens contribute to `want`, where known. experts: dim 0 is the experts of the layer, rank
    r of `ranks` holding the r-th part.
    """
    if got.shape != want.shape:
        return f"has the shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    parts = [part.detach().double() for part in parts]
    if near(got, want, dtype):
        return None
    bad = int((~want.isfinite()).sum())
    if bad:
        return f"cannot be compared: one rank's has {bad} entries of {want.numel()} that are not finite"
    whole = _pattern(got, want, dtype, ranks, top_k, parts)
    if whole is None and experts and ranks > 1 and got.shape[0] % ranks == 0:
        whole = _by_rank(got, want, dtype, ranks, top_k, parts)
    return whole or _by_how_much(got, want, dtype)


def near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, slack: float = 1.0) -> bool:
    """By the table of tolerances, `slack` times as wide. NaN is near nothing."""
    if not want.numel():
        return True
    limit = TOLERANCES[dtype].limit(want.abs().max().item()) * slack
    return bool((got - want).abs().max().item() <= limit)


def named_factor(factor: float, ranks: int, top_k: int = 0) -> str:
    """A factor and where it is likely to come from: "2.00 times (= EP)"."""
    known = {
        "EP": ranks, "1/EP": 1 / ranks, "EP squared": ranks**2, "1/EP squared": 1 / ranks**2, "sqrt(EP)": ranks**0.5,
        "1/sqrt(EP)": ranks**-0.5, "1/(EP - 1)": 1 / max(1, ranks - 1), "top_k": top_k, "1/top_k": 1 / max(1, top_k),
    }  # fmt: skip
    found = [name for name, value in known.items() if value != 1 and math.isclose(factor, value, rel_tol=1e-3)]
    digits = 3 if abs(factor - 1) > 0.01 else 7
    return f"{factor:.{digits}g} times" + (f" (= {found[0]})" if found else "")


def _pattern(
    got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, ranks: int, top_k: int, parts: Sequence[torch.Tensor]
) -> str | None:
    """What the whole tensor looks like, as the end of a sentence; None where nothing fits."""
    bad = int((~got.isfinite()).sum())
    if bad:
        return f"has {bad} entries of {got.numel()} that are not finite"
    if not got.any():
        return "is zero"
    factor = _factor(got, want, dtype)
    if factor is not None and not math.isclose(factor, 1, rel_tol=1e-5):
        return f"is {named_factor(factor, ranks, top_k)} what it should be"
    for count in range(1, len(parts)):
        for chosen in itertools.combinations(range(len(parts)), count):
            some = torch.stack([parts[rank] for rank in chosen]).sum(dim=0)
            factor = _factor(got, some, dtype)
            if factor is not None:
                times = "" if math.isclose(factor, 1, rel_tol=1e-3) else f", {named_factor(factor, ranks, top_k)}"
                return f"has the part of the tokens of {_ranks(chosen)} alone{times}"
    return None


def _factor(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> float | None:
    """f where got = f * want."""
    square = float((want * want).sum())
    if not square:
        return None
    factor = float((got * want).sum()) / square
    return factor if factor and near(got, factor * want, dtype, PATTERN_SLACK) else None


def _by_rank(
    got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, ranks: int, top_k: int, parts: Sequence[torch.Tensor]
) -> str | None:
    """Which rank's experts are wrong, and how; None where no rank's experts show a pattern."""
    each = got.shape[0] // ranks
    found, patterns = [], 0
    for rank, (one, right) in enumerate(zip(got.chunk(ranks), want.chunk(ranks), strict=True)):
        if near(one, right, dtype):
            continue
        pattern = _pattern(one, right, dtype, ranks, top_k, [part.chunk(ranks)[rank] for part in parts])
        other = [at for at, its in enumerate(want.chunk(ranks)) if at != rank and near(one, its, dtype)]
        if other:
            pattern = f"is that of the experts of rank {other[0]}"
        patterns += pattern is not None
        found.append(f"{pattern or _by_how_much(one, right, dtype)} for the experts {_span(rank, each)} of rank {rank}")
    return "; ".join(found) if patterns or len(found) < ranks else None


def _by_how_much(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> str:
    largest = want.abs().max().item()
    difference = (got - want).abs()
    wrong = int((difference > TOLERANCES[dtype].limit(largest)).sum())
    worst = difference.max().item()
    size = f"{worst / largest:.2g} of its largest entry" if largest else f"{worst:.2g}, and should be zero"
    return f"differs by up to {size}, in {wrong} of {want.numel()} entries"


def _ranks(chosen: Sequence[int]) -> str:
    return f"rank {chosen[0]}" if len(chosen) == 1 else f"ranks {', '.join(map(str, chosen))}"


def _span(rank: int, each: int) -> str:
    return f"{rank * each}..{(rank + 1) * each - 1}"
