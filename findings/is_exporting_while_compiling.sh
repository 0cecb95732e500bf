#!/usr/bin/env bash
# torch.compiler.is_exporting() is true inside torch.compile, where nothing is exported.
# Library: torch 2.11.0. Expected: the page of torch.compiler.is_exporting says that it tells whether the code is being
# exported, beside is_compiling() for both. Seen: traced by torch.compile it is the constant True, with every backend, so
# code that leaves something out of exported programs leaves it out of compiled ones too, without an error. Eager it is
# False, and torch.compiler._is_exporting_flag is False in torch.compile. In 2.13.0 it is False there.
# In this package: moe_overlap/layer/last_call.py reads the flag (the losses of compiled layers were lost under 2.11.0);
# tests/image.sh runs tests/layer/test_left.py under it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv || exit 2
venv/bin/python -m pip install --quiet 'torch==2.11.0' numpy || exit 2

cat > check.py <<'PYTHON'
import torch


def both(x):
    named = 1 if torch.compiler.is_exporting() else 0
    flag = 1 if torch.compiler._is_exporting_flag else 0
    return x + 10 * named + flag


class Module(torch.nn.Module):
    def forward(self, x):
        return both(x)


x = torch.zeros(1)
print(torch.__version__.split("+")[0])
print("eager", both(x).tolist())
for backend in ("eager", "aot_eager"):
    print("compiled", backend, torch.compile(both, backend=backend)(x).tolist())
print("exported", torch.export.export(Module(), (x,)).module()(x).tolist())
PYTHON

expected='2.11.0
eager [0.0]
compiled eager [10.0]
compiled aot_eager [10.0]
exported [11.0]'
seen=$(venv/bin/python check.py) || { echo "changed: the check now fails with an error" >&2; exit 1; }

printf 'seen:\n%s\n' "$seen"
if [ "$seen" != "$expected" ]; then
  printf 'changed, it was:\n%s\n' "$expected" >&2
  exit 1
fi
echo "unchanged"
