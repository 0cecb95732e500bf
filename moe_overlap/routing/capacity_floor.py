"""LocMoE's lower bound of an expert's capacity (arXiv 2401.13920, section 3.2 and appendix A).

A token is one that expert i can tell apart if |cos(x, w_i)| >= delta. For directions that are even on the sphere of d
dimensions the probability of that is p = 1 - I_{delta^2}(1/2, (d - 1)/2) (Lemma 3, eq. 8; I: the regularised
incomplete beta function), and so one such token in 1/(n p) is expected (Theorem 1, eq. 9). That is a floor and no
capacity: p counts both caps of the sphere, although a router takes tokens from one only, and the bound explodes with
delta * sqrt(d) (d 5120, n 16: 1.97 tokens at delta .03, 181 at .05, 3602 at .06).

LocMoE+ (arXiv 2406.00023, Remark 7) prints exp(d delta^2 / (2 - delta^2)) / n, which is looser (0.63 in the place of
1.97), and measures delta again in every batch: `measured_floor`.
"""

from __future__ import annotations

import math

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing.checks import check_count, is_finite

FORMS = ("exact", "erfc", "exp")
MEASURED_FORMS = ("erfc", "exp")  # what a device computes without the host
_MOST_TERMS = 500


def cap_probability(delta: float, hidden_size: int, *, form: str = "exact") -> float:
    """Share of the directions in `hidden_size` dimensions with |cos| >= delta to a given one: both caps. "erfc": its
    value for many dimensions, erfc(sqrt(z)) with z = delta^2 d / (2 - delta^2). "exp": exp(-z), which lies above that.
    Raises ConfigError."""
    check_delta(delta)
    if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 2:
        raise ConfigError("hidden_size", hidden_size, "an integer of at least 2")
    if form not in FORMS:
        raise ConfigError("form", form, f"one of {', '.join(FORMS)}")
    square = delta * delta
    z = square * hidden_size / (2 - square)
    if form == "erfc":
        return math.erfc(math.sqrt(z))
    if form == "exp":
        return math.exp(-z)
    return _beta_tail(square, 0.5, (hidden_size - 1) / 2)


def capacity_bound(num_experts: int, hidden_size: int, delta: float, *, form: str = "exact") -> float:
    """1 / (n p), unrounded: in how many tokens one that the expert can tell apart is expected (inf where p is 0)."""
    check_count("num_experts", num_experts)
    share = num_experts * cap_probability(delta, hidden_size, form=form)
    return 1 / share if share > 0 else math.inf


def clamp_capacity(bound: float, num_tokens: int) -> int:
    """The bound as a number of slots of one expert: rounded up, from 1 to the number of tokens."""
    return num_tokens if bound >= num_tokens and num_tokens > 0 else max(1, math.ceil(min(bound, num_tokens)))


def measured_floor(
    cosines: torch.Tensor, num_experts: int, hidden_size: int, num_tokens: int, *, form: str
) -> torch.Tensor:
    """int64 scalar: `clamp_capacity` of the bound at the greatest of `cosines` (none of them, or none above 0: at 0),
    on their device, without a wait of the host. form: one of MEASURED_FORMS."""
    cosines = cosines.detach().double().flatten()
    square = torch.cat([cosines, cosines.new_zeros(1)]).max().square()
    z = square * hidden_size / (2 - square)
    share = num_experts * (torch.exp(-z) if form == "exp" else torch.erfc(z.sqrt()))
    return (1 / share).ceil().clamp(1, max(num_tokens, 1)).to(torch.int64)


def check_delta(delta: float) -> None:
    if not (is_finite(delta) and 0 < delta < 1):
        raise ConfigError("delta", delta, "a cosine between 0 and 1")


def _beta_tail(x: float, a: float, b: float) -> float:
    """1 - I_x(a, b), without losing the digits of a small tail; 0 < x < 1, 0 < a < 1."""
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    front = math.exp(log_front)
    # The fraction converges fast below the mean of the distribution; above it the one of 1 - I is taken.
    if x < (a + 1) / (a + b + 2):
        return 1 - front * _fraction(x, a, b) / a
    return front * _fraction(1 - x, b, a) / b


def _fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function (DLMF 8.17.22), by Lentz's method."""
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _MOST_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1 / (1 + step * d)
            c = 1 + step / c
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value
