"""Block shapes of the expert MLP measured on the GPU at hand, when someone asks; a training step never measures.

found = tune(x, w_in, w_out, offs, kind="swiglu", row_to_token=row_to_token)
with use(found): ...
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from moe_overlap.errors import ConfigError
from moe_overlap.ops.expert_mlp_blocks_triton import STAGES, Blocks, Measured, Problem, candidates, use
from moe_overlap.ops.expert_mlp_contract import ExpertMlp, ExpertMlpBackward
from moe_overlap.ops.expert_mlp_triton import expert_mlp, expert_mlp_backward, problem_of

__all__ = ["table_lines", "tune", "use"]


def tune(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    offs: torch.Tensor,
    *,
    kind: str,
    row_to_token: torch.Tensor | None = None,
    seconds_of: Callable[[Callable[[], object]], float] | None = None,
) -> Measured:
    """The fastest block shape of each kernel for these tensors, one kernel after the other, to be passed to `use`.

    Measured are forward and backward together, as a change in one kernel moves what is in L2 for the next.

    Args:
        x, w_in, w_out, offs, kind, row_to_token: as for `ops.expert_mlp`.
        seconds_of: time of a function in seconds; None: the median of Triton's do_bench.

    Raises:
        ConfigError: no block shape of a kernel can be launched on this device.
    """
    timed = seconds_of or _median_s
    num_rows = x.shape[0] if row_to_token is None else row_to_token.shape[0]
    problem = problem_of(x, w_out, num_rows)
    dy_RD = torch.ones(num_rows, w_out.shape[1], dtype=x.dtype, device=x.device)
    operands = (x, w_in, w_out, offs, kind, row_to_token, None)

    def step() -> None:
        _, h_RF = expert_mlp(ExpertMlp(*operands, None, save_h=True))
        expert_mlp_backward(ExpertMlpBackward(dy_RD, x, h_RF, *operands[1:], [True] * 4))

    found: dict[tuple[str, Problem], Blocks] = {}
    with torch.no_grad():
        for stage in STAGES:
            seconds: dict[Blocks, float] = {}
            for shape in candidates(stage, problem):
                try:
                    with use({**found, (stage, problem): shape}):
                        seconds[shape] = timed(step)
                except OutOfResources:
                    continue
            if not seconds:
                raise ConfigError("arch", problem.arch, f"a device on which a block shape of {stage!r} can be launched")
            found[stage, problem] = min(seconds, key=lambda shape: seconds[shape])
    return found


def table_lines(found: Measured) -> list[str]:
    """What `tune` found as rows for the table of expert_mlp_blocks_triton, each valid up to the sizes measured.

    A person commits them: to the front of their stage, with an inner block as in the stage's other rows.
    """
    return [
        f'"{stage}": _row("{problem.arch}", {problem.item_bytes}, {(shape.m, shape.n, shape.k)}, '
        f"{(shape.group, shape.warps, shape.stages, shape.per_sm)}, "
        f"rows={problem.rows}, ffn={problem.ffn}, hidden={problem.hidden}),"
        for (stage, problem), shape in found.items()
    ]


def _median_s(body: Callable[[], object]) -> float:
    return float(do_bench(body, return_mode="median")) / 1e3
