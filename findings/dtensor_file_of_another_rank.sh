#!/usr/bin/env bash
# A DTensor that rank 0 has saved by torch.save is, loaded on rank 1, rank 0's part in the place of rank 1's: no error.
# Library: torch 2.13.0. Expected: an error, or rank 0's part as such, since a DTensor's file has the mesh and the place in
# it (`device_mesh.get_coordinate()` says 0 after loading), and load_state_dict refuses what does not fit. Seen: it loads,
# and the whole tensor has rank 0's rows twice. Equal meshes are taken for one another, whatever place they say.
# In this package: moe_overlap/parallel/state.py gives the mesh of each rank's experts another name, and refuses.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main(rank):
    store = dist.FileStore("store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [2.0]]))
    fully_shard(model, mesh=mesh)
    if rank == 0:
        torch.save(model.state_dict(), "file")
    dist.barrier()
    state = torch.load("file", weights_only=True)
    place = state["weight"].device_mesh.get_coordinate()[0]
    print_in_turn(rank, f"rank {rank}: the file's place is {place}, {model.load_state_dict(state)}")
    whole = model.weight.full_tensor().flatten().tolist()
    print_in_turn(rank, f"rank {rank}: [1.0, 2.0] has become {whole}")
    dist.barrier()
    dist.destroy_process_group()


def print_in_turn(rank, text):
    for turn in range(2):
        if turn == rank:
            print(text, flush=True)
        dist.barrier()


if __name__ == "__main__":
    print(torch.__version__.split("+")[0], flush=True)
    torch.multiprocessing.spawn(main, nprocs=2)
PYTHON

expected='2.13.0
rank 0: the file'"'"'s place is 0, <All keys matched successfully>
rank 1: the file'"'"'s place is 0, <All keys matched successfully>
rank 0: [1.0, 2.0] has become [1.0, 1.0]
rank 1: [1.0, 2.0] has become [1.0, 1.0]'
seen=$(venv/bin/python check.py) || { echo "changed: the check now fails with an error" >&2; exit 1; }

printf 'seen:\n%s\n' "$seen"
if [ "$seen" != "$expected" ]; then
  printf 'changed, it was:\n%s\n' "$expected" >&2
  exit 1
fi
echo "unchanged"
