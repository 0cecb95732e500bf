"""Which functions of libtorch's stable C interface torch 2.10 exports: derived from the headers of the torch at hand.

The headers guard everything that a later version added by its version number, so preprocessing them for 2.10 leaves
what 2.10 has. `python tests/native/stable_symbols.py` writes the result to torch_2_10_symbols.txt beside this file;
tests/test_build.py compares the compiled binding with that list, and the list with the headers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

LIST = Path(__file__).with_name("torch_2_10_symbols.txt")
TARGET = "0x020a000000000000ULL"
HEADERS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h")
# AOTI_TORCH_EXPORT expands to a visibility attribute; a function's name is what stands before its parameters. A few
# `static inline` helpers look alike but have no attribute.
EXPORT = re.compile(r"__attribute__\s*\(\(\s*__?visibility(?:__)?\s*\(\"default\"\)\s*\)\)([^;{}]*?)\b(\w+)\s*\(")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


def derive(include_dir: Path, target: str = TARGET) -> list[str]:
    """The names declared for `target`, sorted. Needs a C++ compiler."""
    source = "".join(f"#include <{header}>\n" for header in HEADERS)
    command = [compiler() or "c++", "-E", "-P", "-x", "c++", "-std=c++17", f"-DTORCH_TARGET_VERSION={target}"]
    done = subprocess.run(
        [*command, f"-I{include_dir}", "-"], input=source, capture_output=True, text=True, check=True, timeout=120
    )
    names = {match[2] for match in EXPORT.finditer(done.stdout)}
    return sorted(name for name in names if name.startswith(("aoti_torch_", "torch_")))


def undefined(library: Path) -> list[str]:
    """The stable C functions a compiled library asks for. Anything else from torch would be mangled C++."""
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True, timeout=60
    )
    names = [line.split()[-1].split("@")[0] for line in done.stdout.splitlines() if line.strip()]
    return sorted(name for name in names if re.search(r"torch|c10|aten|at_", name, re.IGNORECASE))


def main() -> None:
    import torch

    names = derive(Path(torch.__file__).parent / "include")
    LIST.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    print(f"{LIST.name}: {len(names)} names, from the headers of torch {torch.__version__}")


if __name__ == "__main__":
    main()
