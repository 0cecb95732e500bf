"""One launch of a kernel at the size of its benchmark, for a profiler to look at (gpu_run.py runs it under ncu).

ncu python benchmarks/gpu_counters.py permute|gate|row_map|mlp
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_expert_mlp_cases, gpu_kernels  # noqa: E402
from benchmarks.gpu_expert_mlp_ways import Way, contender  # noqa: E402
from moe_overlap.ops import cuda_kernels, registry  # noqa: E402


def main(op: str) -> None:
    assert cuda_kernels.missing() is None, cuda_kernels.missing()  # and loads them
    if op == "mlp":
        inputs = gpu_expert_mlp_cases.make(
            gpu_expert_mlp_cases.SHAPES[0], "uniform", device="cuda", dtype=torch.bfloat16
        )
        contender(Way("triton"), inputs, {}).forward()
    else:
        case = {
            "permute": gpu_kernels.permute(8192, 8, 2048, None),
            "gate": gpu_kernels.gate(16384, 128, 8, 6),
            "row_map": gpu_kernels.row_map(8192, 8, 128, 8),
        }[op]
        case.run(lambda name: registry.function(name, "cuda"), *case.make(0))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
