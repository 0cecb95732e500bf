#!/usr/bin/env bash
# expert_parallelism_alone: transformers refuses the configuration that its documentation gives for expert parallelism
# without tensor parallelism, and with it the deprecated flag that stands for that configuration.
# Library: transformers 5.24.0, torch 2.13.0. Expected: the docstring of DistributedConfig says of `tp_plan` that "an empty
# dictionary applies no tensor parallel rule", and of `enable_expert_parallel` that it is the same as
# `ep_size=tp_size, tp_plan={}`; its warning tells users to write this. Seen: loading raises a ValueError, since a tp_size
# above 1 without any rule counts as a model that has no plan.
# In this package: the adapters of moe_overlap/verify/adapters/transformers.py use tensor parallelism or FSDP beside it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv || exit 2
venv/bin/python -m pip install --quiet 'torch==2.13.0' 'transformers==5.24.0' accelerate || exit 2

cat > check.py <<'PYTHON'
import sys
import warnings

import torch.distributed as dist
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeModel
from transformers.distributed import DistributedConfig

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
warnings.simplefilter("ignore")
dist.init_process_group("gloo")
config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
                        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, head_dim=8, vocab_size=12)
if dist.get_rank() == 0:
    Qwen3MoeModel(config).save_pretrained(sys.argv[1])
dist.barrier()
for options in ({"ep_size": 2}, {"ep_size": 2, "tp_plan": {}}, {"enable_expert_parallel": True}):
    try:
        Qwen3MoeModel.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2, **options))
        said = "loaded"
    except ValueError as error:
        said = f"ValueError: {str(error).split('.')[0]}"
    if dist.get_rank() == 0:
        print(f"{options}: {said}")
dist.destroy_process_group()
PYTHON

expected="{'ep_size': 2}: loaded
{'ep_size': 2, 'tp_plan': {}}: ValueError: \`tp_size=2\` was requested, but \`Qwen3MoeModel\` has no \`tp_plan\`
{'enable_expert_parallel': True}: ValueError: \`tp_size=2\` was requested, but \`Qwen3MoeModel\` has no \`tp_plan\`"
seen=$(OMP_NUM_THREADS=1 venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 check.py "$folder/model") ||
  { echo "changed: the check now fails with an error" >&2; exit 1; }

printf 'seen:\n%s\n' "$seen"
if [ "$seen" != "$expected" ]; then
  printf 'changed, it was:\n%s\n' "$expected" >&2
  exit 1
fi
echo "unchanged"
