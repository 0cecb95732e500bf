"""What the compiler used for each kernel: registers, spills, stack, shared memory. A launcher for nvcc, and a merger.

    ptxas_report.py nvcc ARGS... -o OBJECT    runs nvcc, and writes OBJECT.resources.json from what ptxas said
    collect(FOLDER)                           the rows of all such files below FOLDER, sorted

As a launcher it keeps each object's report beside the object, so that a build which compiles only what changed still
has all of them. ptxas does not tell the block size a kernel was bounded to; the PTX does, so nvcc is told to keep it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SUFFIX = ".resources.json"
_COMPILING = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(.*?\)\s*((?:\.\w+[^\n{]*\n)*)", re.DOTALL)
_THREADS = re.compile(r"\.maxntid\s+(\d+)")


def main(command: list[str]) -> int:
    """Runs the compiler as it was asked for; its exit status is ours."""
    target = Path(command[command.index("-o") + 1])
    with tempfile.TemporaryDirectory(prefix="nvcc-") as folder:
        done = subprocess.run(
            [*command, "--keep", "--keep-dir", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        threads = block_sizes("\n".join(path.read_text() for path in sorted(Path(folder).glob("*.ptx"))))
    rest = [line for line in done.stdout.splitlines(True) if "ptxas info" not in line and not _STACK.search(line)]
    print("".join(rest), end="")
    if done.returncode == 0:
        rows = parse(done.stdout, threads, source=target.name.removesuffix(".o"))
        Path(f"{target}{SUFFIX}").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return done.returncode


def block_sizes(ptx: str) -> dict[str, int]:
    """Mangled kernel -> the most threads a block of it may have (its __launch_bounds__)."""
    result = {}
    for name, directives in _ENTRY.findall(ptx):
        if found := _THREADS.search(directives):
            result[name] = int(found[1])
    return result


def parse(text: str, threads: dict[str, int], source: str) -> list[dict[str, object]]:
    """The rows of one `-Xptxas -v` report."""
    rows: list[dict[str, object]] = []
    names = readable(sorted({name for name, _ in _COMPILING.findall(text)}))
    for line in text.splitlines():
        if begin := _COMPILING.search(line):
            row: dict[str, object] = {"source": source, "kernel": names[begin[1]], "arch": f"sm_{begin[2]}"}
            rows.append(row | {"threads": threads.get(begin[1])})
        elif found := _STACK.search(line):
            stack, stores, loads = map(int, found.groups())
            rows[-1] |= {"stack_bytes": stack, "spill_store_bytes": stores, "spill_load_bytes": loads}
        elif found := _USED.search(line):
            shared = _SHARED.search(line)
            rows[-1] |= {"registers": int(found[1]), "shared_bytes": int(shared[1]) if shared else 0}
    return rows


def readable(mangled: list[str]) -> dict[str, str]:
    """As in the source, without the namespace and the parameters: `copy_rows_kernel<Bytes16, false>`."""
    tool = shutil.which("c++filt")
    if tool is None or not mangled:
        return {name: name for name in mangled}
    text = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return {name: shorten(full) for name, full in zip(mangled, text.splitlines(), strict=True)}


def shorten(name: str) -> str:
    for prefix in ("moe_overlap::", "(anonymous namespace)::", "void "):
        name = name.replace(prefix, "")
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def collect(folder: Path) -> list[dict[str, object]]:
    """All rows below `folder`, in a fixed order."""
    rows = [row for path in folder.rglob(f"*{SUFFIX}") for row in json.loads(path.read_text(encoding="utf-8"))]
    return sorted(rows, key=lambda row: (row["source"], row["kernel"], int(re.sub(r"\D", "", str(row["arch"])))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
