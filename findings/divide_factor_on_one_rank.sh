#!/usr/bin/env bash
# divide_factor_on_one_rank: FSDP2's set_gradient_divide_factor(f) divides gradients by f squared where the mesh has one
# rank and gradients are reduced in float64 or float16, or the sum is forced for communication.
# Library: torch 2.13.0. Expected: division by f, as its docstring says, and as for float32 and bfloat16. Seen: 1/4 of
# the gradient for f = 2. A mesh of one rank is what experts have that are spread over all ranks and sharded no further:
# transformers 5.24.0 calls this for them with fsdp_size = ep_size (it knows of the forced sum, not of the dtype), so
# their gradients are 1 / ranks of the right ones in these dtypes, and no loss shows it.
# In this package: `moe-overlap verify transformers` found it in float64, check "gradients"; --dtype float32 is right.
# docs/parallel.md keeps experts on a mesh of one rank too, without a divide factor.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv || exit 2
venv/bin/python -m pip install --quiet 'torch==2.13.0' numpy || exit 2

cat > check.py <<'PYTHON'
import torch
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


def gradient(dtype, forced):
    layer = nn.Linear(4, 4, bias=False, dtype=dtype)
    fully_shard(layer, mesh=mesh)
    layer.set_gradient_divide_factor(2.0)
    layer.set_force_sum_reduction_for_comms(forced)
    layer(torch.ones(1, 4, dtype=dtype)).sum().backward()  # its gradient is one everywhere
    return layer.weight.grad.full_tensor().mean().item()


for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
    print(dtype, gradient(dtype, False))
print("float32, forced sum", gradient(torch.float32, True))
destroy_process_group()
PYTHON

expected='torch.float32 0.5
torch.bfloat16 0.5
torch.float64 0.25
torch.float16 0.25
float32, forced sum 0.25'
seen=$(OMP_NUM_THREADS=1 venv/bin/python check.py) || { echo "changed: the check now fails with an error" >&2; exit 1; }

printf 'seen:\n%s\n' "$seen"
if [ "$seen" != "$expected" ]; then
  printf 'changed, it was:\n%s\n' "$expected" >&2
  exit 1
fi
echo "unchanged"
