#!/usr/bin/env bash
# lora_on_spread_experts: LoRA on a three-dimensional parameter (PEFT's `target_parameters`, as for the experts of a
# Mixture-of-Experts model) fails in the forward call when that parameter is a DTensor, as transformers' expert
# parallelism and FSDP2 leave it.
# Library: peft 0.21.2, torch 2.13.0. Expected: PEFT accepts such a parameter, and its adapter computes what it computes on
# a plain one. Seen: the same model with the plain parameter works; with a DTensor of one rank PEFT makes its adapter
# weights plain tensors, adds their product to the DTensor, and torch raises a RuntimeError about mixed tensors.
# In this package: docs/absent.md says that LoRA on experts is for one rank; there the integration takes it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv || exit 2
venv/bin/python -m pip install --quiet 'torch==2.13.0' || exit 2
venv/bin/python -m pip install --quiet 'peft==0.21.2' || exit 2

cat > check.py <<'PYTHON'
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.ones(4, 8, 6))

    def forward(self, x):
        weight = self.up.to_local() if isinstance(self.up, DTensor) else self.up
        return torch.einsum("td,edf->tf", x, weight)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


dist.init_process_group("gloo")
for spread in (False, True):
    model = Model()
    if spread:
        whole = model.experts.up.detach()
        model.experts.up = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)]))
    adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=["experts.up"], target_modules=[]))
    try:
        said = tuple(adapted(torch.ones(3, 8)).shape)
    except RuntimeError as error:
        said = f"RuntimeError, mixed tensors: {'mixed torch.Tensor and DTensor' in str(error)}"
    print(f"DTensor {spread}: {said}")
dist.destroy_process_group()
PYTHON

expected="DTensor False: (3, 6)
DTensor True: RuntimeError, mixed tensors: True"
seen=$(OMP_NUM_THREADS=1 venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 1 check.py 2> errors) ||
  { echo "changed: the check now fails with an error" >&2; cat errors >&2; exit 1; }

printf 'seen:\n%s\n' "$seen"
if [ "$seen" != "$expected" ]; then
  printf 'changed, it was:\n%s\n' "$expected" >&2
  exit 1
fi
echo "unchanged"
