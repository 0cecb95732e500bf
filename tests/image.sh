#!/usr/bin/env bash
# The operators under the pair of releases that GPU images have today: torch 2.11.0 and Triton 3.6.0 (constraints.txt has
# newer ones). In an environment of its own the package is built from a clone of this tree, its operators are loaded and
# run, the Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100, and run once under the interpreter.
#
#     tests/image.sh [VENV]      default build/image/venv; one that has torch 2.11.0 and Triton 3.6.0 is used as it is
#
# Part of `make soak`. Without MOE_OVERLAP_BUILD the compiled parts are those of a CPU.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(realpath -m "${1:-$root/build/image/venv}")
tree=$root/build/image/tree
if ! "$venv/bin/python" -c 'import torch, triton; assert (torch.__version__[:6], triton.__version__) == ("2.11.0", "3.6.0")'; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q torch==2.11.0 triton==3.6.0
  "$venv/bin/pip" install -q $(grep -E '^[a-z]' "$root/constraints.txt" | grep -vE '^(torch|triton|torchtitan)==')
fi
rm -rf "$tree"
git clone -q --local "$root" "$tree"
cd "$tree"
MOE_OVERLAP_BUILD=${MOE_OVERLAP_BUILD:-cpu} "$venv/bin/python" setup.py -q build_ext --inplace
export OMP_NUM_THREADS=1
"$venv/bin/python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
"$venv/bin/python" -m pytest -q -n 2 --dist worksteal tests/ops tests/layer tests/test_equality.py
TRITON_INTERPRET=1 "$venv/bin/python" -m pytest -q -n 2 --dist worksteal $(find tests -name 'test_*_triton.py' | sort)
