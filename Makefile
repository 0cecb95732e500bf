# make test | make bench [QUICK=1] | make soak | make lint | make docs | make setup | make gpu
#
# All of them share one set-up: .venv with the pinned packages of constraints.txt and an editable install with the
# compiled parts. A stamp makes the second call cheap.
#   VENV=      (empty) use the environment of PYTHON as it is: nothing is downloaded, only this package is installed.
#   PYTHON=    the interpreter to start from (default python3; 3.11 or later)
# MOE_OVERLAP_BUILD, TORCH_CUDA_ARCH_LIST and MAX_JOBS reach the build (see setup.py).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test bench soak lint docs gpu clean

PYTHON ?= python3
VENV ?= .venv
OUT ?= out/bench
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  # Another Python, or another container, is another set-up.
  SETUP := build/.setup-$(shell $(PYTHON) -c 'import hashlib, sys; \
    print(hashlib.sha256((sys.prefix + sys.version).encode()).hexdigest()[:12])')
else
  PY := $(VENV)/bin/python
  SETUP := $(VENV)/.setup
endif
# And so is another kind of build: the stamps of the others are removed when one is made.
STAMP := $(SETUP)-$(or $(MOE_OVERLAP_BUILD),auto)

help:
	@sed -n '1,8s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

# Three tests at a time for two cores, where pytest-xdist is there, as some wait for a limit, a slow link or a stopped rank;
# one thread each, as the tests start ranks of their own. Each worker has files that stand side by side, and takes half of
# what another one has left when it is done: no file stays over for one of them. Triton compiles kernels or interprets
# them, as the environment says when they are defined: its tests need a run of each kind, and skip in the other one (5: all
# of them did, as there is no Triton).
SHARED_OUT = $$($(PY) -c 'import xdist; print("-n 3 --dist worksteal")' 2>/dev/null || true)
TRITON_TESTS := $(shell find tests -name 'test_*_triton.py' | sort)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --durations=12 $(SHARED_OUT)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q --durations=4 $(SHARED_OUT) $(TRITON_TESTS) || [ $$? -eq 5 ]

# The main job and the main benchmark.
TRAIN_ARGS = --ranks 2 --kind scmoe_pos2 --steps $(if $(QUICK),10,60) --compare-overlap --save-routing $(OUT)/routing.safetensors
# Half the default tokens: both jobs are to fit into five minutes on two cores.
BENCH_ARGS = --comm-share 0.6 --routing real --tokens $(if $(QUICK),256,512) --out $(OUT) $(if $(QUICK),--repeats 3)

bench: $(STAMP)
	@mkdir -p $(OUT)
	$(PY) -m moe_overlap train $(TRAIN_ARGS)
	$(PY) -m moe_overlap bench layer $(BENCH_ARGS)

soak: $(STAMP)
	$(PY) -m pytest -q -m soak
	bash tests/image.sh

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# The site, in build/site. Its tools are those of the extra `docs`; a link or a name that leads nowhere is an error.
DOCS_TOOLS = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
docs: $(STAMP)
	$(PY) -m pip install -q $$($(PY) -c '$(DOCS_TOOLS)')
	$(PY) -m mkdocs build --strict

# In the environment of PYTHON as it is: the one whose torch knows the GPU. Nothing is installed.
gpu:
	@$(PYTHON) benchmarks/gpu_run.py

clean:
	rm -rf $(SETUP)-* build dist out *.egg-info moe_overlap/native/*.so moe_overlap/native/_build_info.json moe_overlap/native/_kernels.json

ifeq ($(strip $(VENV)),)
$(STAMP): $(NATIVE)
	$(PY) -m pip install --no-build-isolation --no-deps -e .
	@$(PY) moe_overlap/native/build_info.py
	@rm -f $(SETUP)-*; mkdir -p $(@D); touch $@
else
$(STAMP): constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.11 or later is needed; make PYTHON=... chooses one" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments (on Debian: apt install python3-venv)." \
	       "make VENV= uses the current environment instead." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $$(grep '^torch==' constraints.txt)
	$(PY) -m pip install $$(grep -E '^[a-z]' constraints.txt | grep -vE '^(triton|torchtitan)==')
	$(PY) -m pip install --no-deps $$(grep -E '^(triton|torchtitan)==' constraints.txt)
	$(PY) -m pip install --no-build-isolation --no-deps -e .
	@$(PY) moe_overlap/native/build_info.py
	@rm -f $(SETUP)-*; touch $@
endif
