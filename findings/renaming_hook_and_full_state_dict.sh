#!/usr/bin/env bash
# set_model_state_dict with full_state_dict=True cannot load a checkpoint of old names into a model of FSDP2, although a
# load_state_dict pre-hook of the module renames them and the same call works on a plain model.
# Library: torch 2.13.0. Expected: `register_load_state_dict_pre_hook` is for such renaming, and torch.distributed's
# state-dict page promises one call for models however they are parallelised. Seen: values are sharded by the names that
# the model has, before the hook runs, so a renamed one stays a plain tensor and its copy into a DTensor is refused.
# In this package: docs/status.md says so; moe_overlap/layer/experts.py (take_old_names) is such a hook.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv || exit 2
venv/bin/python -m pip install --quiet 'torch==2.13.0' numpy || exit 2

cat > check.py <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class Renamed(nn.Linear):
    """A layer whose weight used to be called `kernel`."""

    def __init__(self):
        super().__init__(4, 4, bias=False)
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module, state_dict, prefix, *rest):
        if prefix + "kernel" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel")


def load(model, name):
    try:
        set_model_state_dict(model, {name: torch.ones(4, 4)}, options=StateDictOptions(full_state_dict=True))
    except RuntimeError as error:
        return "RuntimeError: mixed tensors" if "mixed torch.Tensor and DTensor" in str(error) else str(error)
    return "loaded"


print(torch.__version__.split("+")[0])
mesh = init_device_mesh("cpu", (1,))
for sharded in (False, True):
    for name in ("weight", "kernel"):
        model = Renamed()
        if sharded:
            fully_shard(model, mesh=mesh)
        print("sharded" if sharded else "plain", name, load(model, name))
dist.destroy_process_group()
PYTHON

expected='2.13.0
plain weight loaded
plain kernel loaded
sharded weight loaded
sharded kernel RuntimeError: mixed tensors'
seen=$(venv/bin/python check.py) || { echo "changed: the check now fails with an error" >&2; exit 1; }

printf 'seen:\n%s\n' "$seen"
if [ "$seen" != "$expected" ]; then
  printf 'changed, it was:\n%s\n' "$expected" >&2
  exit 1
fi
echo "unchanged"
