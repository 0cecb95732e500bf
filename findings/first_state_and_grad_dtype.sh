#!/usr/bin/env bash
# get_optimizer_state_dict and set_optimizer_state_dict of a new optimizer fail where a parameter has a grad_dtype.
# Library: torch 2.13.0. Expected: `Tensor.grad_dtype` says in which dtype gradients are kept (float32 for a bfloat16
# weight, say), and the state-dict functions initialise an optimizer by a step with gradients of zero. Seen: they assign
# zeros in the dtype of the parameter, which the parameter refuses. After a real step the same call works.
# In this package: moe_overlap/parallel/optimizer_state.py (_attended) allows any dtype during the call.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv || exit 2
venv/bin/python -m pip install --quiet 'torch==2.13.0' numpy || exit 2

cat > check.py <<'PYTHON'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_state(grad_dtype):
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    model.weight.grad_dtype = grad_dtype
    try:
        state = get_optimizer_state_dict(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    except RuntimeError as error:
        return str(error).partition(".")[0]
    return ", ".join(state["state"]["weight"])


print(torch.__version__.split("+")[0])
for grad_dtype in (torch.bfloat16, None, torch.float32):
    print(grad_dtype, first_state(grad_dtype))
PYTHON

expected="2.13.0
torch.bfloat16 momentum_buffer
None momentum_buffer
torch.float32 attempting to assign a gradient with dtype 'c10::BFloat16' to a tensor with grad_dtype 'Float'"
seen=$(venv/bin/python check.py) || { echo "changed: the check now fails with an error" >&2; exit 1; }

printf 'seen:\n%s\n' "$seen"
if [ "$seen" != "$expected" ]; then
  printf 'changed, it was:\n%s\n' "$expected" >&2
  exit 1
fi
echo "unchanged"
