"""EPS-MoE's rule for the number of expert groups (arXiv 2410.12247, section 5.2), and what it costs against a search.

T_comm and T_comp overlap in N stages but for one: the gain is L(N) = min(T_comm, T_comp) (N - 1) / N, and N stages cost
R(N) = k N + b. The best real N is sqrt(C / k), C = min(T_comm, T_comp); N divides the experts of a rank.
"""

from __future__ import annotations

import math

from moe_overlap.errors import ConfigError


def eps_stages(comm_s: float, comp_s: float, stage_s: float, fixed_s: float = 0.0, *, local_experts: int) -> int:
    """How many groups of experts: comm_s both exchanges of a layer, comp_s its experts, stage_s the paper's k (what one
    stage more costs), fixed_s its b, all in seconds; local_experts of a rank.

    1 where no N gains anything. Of the divisors of local_experts the one with the largest L(N) - R(N), which for a
    concave gain is one of the two next to sqrt(C / k); the smaller one where they tie.
    """
    for name, value in (("comm_s", comm_s), ("comp_s", comp_s), ("stage_s", stage_s), ("fixed_s", fixed_s)):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ConfigError(name, value, "seconds: a finite number that is not negative")
    if not isinstance(local_experts, int) or isinstance(local_experts, bool) or local_experts < 1:
        raise ConfigError("local_experts", local_experts, "an integer of at least 1")
    hidden_s = min(comm_s, comp_s)

    def gain_s(stages: int) -> float:
        return hidden_s * (stages - 1) / stages - (stage_s * stages + fixed_s)

    divisors = [n for n in range(2, min(local_experts, 16) + 1) if local_experts % n == 0]
    best = max(divisors, key=gain_s, default=1)
    return best if best > 1 and gain_s(best) > 0 else 1
