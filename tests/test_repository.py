"""Rules of the repository that a machine can check: who may import whom, what is banned, how long things are."""

from __future__ import annotations

import ast
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_overlap"

# room -> the rooms and modules of this package it may import, beside itself and errors, config.
ROOMS = {
    "routing": {"ops"},
    "placement": set(),
    "ops": {"native"},
    "transport": {"agreement"},
    "schedule": {"agreement", "native"},
    "planning": {"schedule", "agreement", "native"},
}
# The executor alone brings ops (through rows.py) and transport together, and the autograd nodes it drives.
EXECUTOR = ("run.py", "lanes.py", "rows.py", "nodes.py", "clocks.py", "dispatch.py")
EXTRA = {
    "schedule/run.py": {"transport"},
    "schedule/lanes.py": {"transport"},
    "schedule/dispatch.py": {"transport", "placement"},
    "schedule/rows.py": {"ops"},
}
NO_CIRCLES = ("transport",)
NO_DISTRIBUTED = ("routing", "placement", "ops", "schedule", "planning")
ALWAYS = {"errors", "config"}

BANNED = {
    "pickle": re.compile(r"\bpickle\b|\bcloudpickle\b|\bshelve\b"),
    "object collectives": re.compile(r"\b(all_gather|broadcast|gather|scatter|send|recv)_object"),
    "eval and exec": re.compile(r"(?<![\w.])(eval|exec)\("),
    "unsafe torch.load": re.compile(r"weights_only\s*=\s*False|torch\.load\("),
    "shell": re.compile(r"shell\s*=\s*True|os\.system\("),
    "left for later": re.compile(r"\b(TODO|FIXME|XXX|HACK)\b"),
}
# A package registry's address, or a folder of one person's machine.
PRIVATE = re.compile(r"https?://\S+/(?:simple|pypi)/|index[-_]url|/(?:root|home|Users)/\w|/tmp/\w+_jobs")


def package_files():
    return sorted(PACKAGE.rglob("*.py"))


def tracked(*patterns):
    out = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / name for name in out.stdout.split("\0") if name and (ROOT / name).exists()]


def imports(path):
    """(module of this package, or None; full name) of every import in a file, `if TYPE_CHECKING` included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            yield (parts[1] if parts[0] == "moe_overlap" and len(parts) > 1 else None), name


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_only_what_they_may(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    for path in files:
        relative = path.relative_to(PACKAGE).as_posix()
        allowed = ROOMS[room] | EXTRA.get(relative, set()) | ALWAYS | {room}
        for module, name in imports(path):
            assert module is None or module in allowed, f"{relative} imports {name}"
            if room in NO_DISTRIBUTED:
                assert not name.startswith("torch.distributed"), f"{relative} imports {name}"


@pytest.mark.parametrize("room", NO_CIRCLES)
def test_files_of_a_room_do_not_import_in_a_circle(room):
    """What a type checker alone would import counts too."""
    names = {f"moe_overlap.{room}.{path.stem}" for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__"}
    graph = {name: set() for name in names}
    for path in (PACKAGE / room).glob("*.py"):
        for _, imported in imports(path):
            graph.setdefault(f"moe_overlap.{room}.{path.stem}", set()).update(names & {imported.rpartition(".")[0]})
    TopologicalSorter(graph).prepare()  # raises CycleError, which has the circle


def test_planning_and_schedules_are_data():
    """Only the executor of the schedule room knows torch; planning does not."""
    for path in (*(PACKAGE / "schedule").glob("*.py"), *(PACKAGE / "planning").glob("*.py")):
        if path.name not in EXECUTOR:
            assert all(not name.split(".")[0] == "torch" for _, name in imports(path)), path


@pytest.mark.parametrize("rule", sorted(BANNED))
def test_banned_calls(rule):
    here = Path(__file__)
    for path in [
        *package_files(),
        *tracked("examples/*.py", "benchmarks/*.py", "setup.py", "tests/*.py", "tests/**/*.py"),
    ]:
        if path == here:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not BANNED[rule].search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()} ({rule})"


def test_environment_is_read_in_one_place():
    allowed = {"config.py", "info.py"}
    for path in package_files():
        if path.name in allowed:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            reads = re.search(r"os\.environ(\.get)?[\[(]\s*[\"']MOE_OVERLAP|getenv\(\s*[\"']MOE_OVERLAP", line)
            assert not reads, f"{path.relative_to(ROOT)}:{number}"


def test_nothing_names_a_private_place():
    for path in tracked():
        if path == Path(__file__) or path.suffix in (".png", ".safetensors"):
            continue
        text = path.read_text(errors="replace")
        assert not PRIVATE.search(text), f"{path.relative_to(ROOT)}: {PRIVATE.search(text)}"


def test_files_and_functions_stay_readable():
    for path in package_files():
        lines = path.read_text().splitlines()
        assert len(lines) <= 450, f"{path.relative_to(ROOT)} has {len(lines)} lines"
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 75, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"


def test_public_names_have_docstrings():
    import moe_overlap

    for name in moe_overlap.__all__:
        assert getattr(moe_overlap, name).__doc__, name


def test_readme_is_short_and_names_existing_files():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    for name in re.findall(r"`((?:moe_overlap|csrc|tests|benchmarks|docs|examples)/[\w./-]+)`", readme):
        assert (ROOT / name).exists(), name
