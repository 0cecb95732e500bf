#!/usr/bin/env bash
# ptxas_cubin_differs: one PTX file, one ptxas, the same options: machine code that differs from run to run.
# Tool: ptxas of CUDA 12.9.86, which Triton 3.6.0 brings along as ptxas-blackwell and runs for sm_100a. Expected: a compiler
# that is a function of its input, as it is for sm_90a here and as the one in Triton 3.9.0 (CUDA 13.4.59) was for the same
# PTX in 10 runs. Seen: two cubins of one size, about as often each, in which scalar instructions stand in another order.
# With address randomisation off (setarch -R) all runs gave one of the two, so some order follows from addresses.
# Both are right; but a comparison or a cache that goes by the bytes of cubins takes the same kernel for another one.
# In this package: benchmarks/same_kernels.py, which shows that an edit left kernels as they were, takes equal PTX for
# enough, since for two kernels of sm_100 cubins of equal PTX differed (docs/notes/2026-11-29-dealt-tiles.md).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv || exit 2
venv/bin/python -m pip install --quiet 'torch==2.13.0' numpy || exit 2
venv/bin/python -m pip install --quiet 'triton==3.6.0' || exit 2

cat > check.py <<'PYTHON'
import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

M, N, K, RUNS = 128, 128, 64, 24


@triton.jit
def gated_up(x, w, out, num_tiles, inner, width, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """out = silu(x @ gate.T) * (x @ up.T); gate and up are the two halves of the rows of w."""
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = tile // tl.cdiv(width, N) * M
        column = tile % tl.cdiv(width, N) * N
        gate = tl.zeros((M, N), dtype=tl.float32)
        up = tl.zeros((M, N), dtype=tl.float32)
        for k in tl.range(0, inner, K):
            a = x.load([row, k])
            gate = tl.dot(a, w.load([column, k]).T, gate)
            up = tl.dot(a, w.load([width + column, k]).T, up)
        y = gate * tl.sigmoid(gate) * up
        at = out + (row + tl.arange(0, M))[:, None] * width + (column + tl.arange(0, N))[None, :]
        tl.store(at, y.to(tl.bfloat16), mask=(column + tl.arange(0, N) < width)[None, :])


signature = {"x": f"tensordesc<bf16[{M},{K}]>", "w": f"tensordesc<bf16[{N},{K}]>", "out": "*bf16", "num_tiles": "i32",
             "inner": "i32", "width": "i32", "M": "constexpr", "N": "constexpr", "K": "constexpr"}
source = ASTSource(gated_up, signature, constexprs={"M": M, "N": N, "K": K})
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
number = {}
for capability, name in ((90, "ptxas"), (100, "ptxas-blackwell")):
    kernel = triton.compile(source, GPUTarget("cuda", capability, 32), options={"num_warps": 8, "num_stages": 4})
    Path("kernel.ptx").write_text(kernel.asm["ptx"])
    found = Counter()
    for _ in range(RUNS):
        command = [tools / name, f"--gpu-name=sm_{capability}a", "kernel.ptx", "-o", "kernel.cubin"]
        subprocess.run(command, check=True)
        found[hashlib.sha256(Path("kernel.cubin").read_bytes()).hexdigest()] += 1
    number[capability] = len(found)
    print(f"triton {triton.__version__}, sm_{capability}a: {sorted(found.values())} runs of a cubin")
sys.exit(0 if number[100] > 1 else 1)
PYTHON

# Seen: "triton 3.6.0, sm_90a: [24] runs of a cubin" and "triton 3.6.0, sm_100a: [10, 14] runs of a cubin".
export TRITON_CACHE_DIR="$folder/cache" TRITON_DISABLE_LINE_INFO=1
venv/bin/python check.py || { echo "changed: one PTX gave one cubin for sm_100a, or the check failed" >&2; exit 1; }
echo "unchanged"
