#!/usr/bin/env bash
# norm_gradient_all_reduced_twice: transformers' tensor parallelism sums the gradients of Qwen3's q_norm and k_norm over
# the ranks after every backward, what earlier backwards left in them included; so with gradient accumulation over N
# micro-batches the first of them counts ranks ** (N - 1) times.
# Library: transformers 5.24.0, torch 2.13.0. Expected: two backwards of the same loss give twice the gradient of one, as
# they do in one process and for every other parameter. Seen: three times, on two ranks. The style is
# "replicated_with_grad_allreduce" (distributed/tensor_parallel.py), whose hook runs after accumulation and reduces
# param.grad. The loss does not show it.
# In this package: `moe-overlap verify` found it, check "two micro-batches", with the adapter Qwen3MoESharedBatch of
# moe_overlap/verify/adapters/transformers.py. Our own hook for replicas knows of accumulation.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv || exit 2
venv/bin/python -m pip install --quiet 'torch==2.13.0' 'transformers==5.24.0' accelerate || exit 2

cat > check.py <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3Model
from transformers.distributed import DistributedConfig

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
dist.init_process_group("gloo")
torch.manual_seed(0)
config = Qwen3Config(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=4, head_dim=8, vocab_size=12, attn_implementation="eager")
model = Qwen3Model(config)
if dist.get_rank() == 0:
    model.save_pretrained(sys.argv[1])
dist.barrier()
x = torch.randn(1, 6, 16)


def gradients(model, backwards):
    model.zero_grad()
    for _ in range(backwards):
        model(inputs_embeds=x).last_hidden_state.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


alone = Qwen3Model.from_pretrained(sys.argv[1])
parallel = Qwen3Model.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
for label, model in (("one process", alone), ("tp_size=2", parallel)):
    once, twice = gradients(model, 1), gradients(model, 2)
    for name in ("q_norm", "k_norm", "q_proj"):
        name = f"layers.0.self_attn.{name}.weight"
        if dist.get_rank() == 0:
            print(f"{label}: {name}: {(twice[name] / once[name]).mean():.2f}")
dist.destroy_process_group()
PYTHON

expected='one process: layers.0.self_attn.q_norm.weight: 2.00
one process: layers.0.self_attn.k_norm.weight: 2.00
one process: layers.0.self_attn.q_proj.weight: 2.00
tp_size=2: layers.0.self_attn.q_norm.weight: 3.00
tp_size=2: layers.0.self_attn.k_norm.weight: 3.00
tp_size=2: layers.0.self_attn.q_proj.weight: 2.00'
seen=$(OMP_NUM_THREADS=1 venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 check.py "$folder/model") ||
  { echo "changed: the check now fails with an error" >&2; exit 1; }

printf 'seen:\n%s\n' "$seen"
if [ "$seen" != "$expected" ]; then
  printf 'changed, it was:\n%s\n' "$expected" >&2
  exit 1
fi
echo "unchanged"
