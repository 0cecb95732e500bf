"""Rules of the repository that a machine can check: who may import whom, what is banned, how long things are."""

from __future__ import annotations

import ast
import fnmatch
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import rooms

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_overlap"

BANNED = {
    "pickle": re.compile(r"\bpickle\b|\bcloudpickle\b|\bshelve\b"),
    "object collectives": re.compile(r"\b(all_gather|broadcast|gather|scatter|send|recv)_object"),
    "eval and exec": re.compile(r"(?<![\w.])(eval|exec)\("),
    "unsafe torch.load": re.compile(r"weights_only\s*=\s*False|torch\.load\((?!.*weights_only=True)"),
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


@pytest.fixture(scope="module")
def package():
    return rooms.read(PACKAGE)


def none_of(violations):
    assert not violations, "\n" + "\n".join(violations)


def test_nothing_stands_loose():
    none_of(rooms.strangers(PACKAGE))


def test_no_import_goes_up(package):
    """Nor to a room beside, nor to a lower one that is not open to the room."""
    none_of(rooms.forbidden_imports(package))


def test_no_files_import_each_other_in_a_circle(package):
    none_of(rooms.circles(package))


def test_no_import_is_hidden(package):
    none_of(rooms.hidden_imports(package))


def test_planning_and_schedules_are_data(package):
    """Only the executor of the schedule room knows torch; planning does not. The lower rooms know no process group."""
    none_of(rooms.forbidden_libraries(package))


def test_the_executor_is_where_the_table_says(package):
    assert set(rooms.EXECUTOR) <= set(package)


def test_every_room_says_what_it_is_for():
    for path in PACKAGE.glob("*/__init__.py"):
        assert rooms.purpose(path).endswith("."), f"{path.relative_to(ROOT)}: {rooms.purpose(path)}"


def test_the_design_draws_the_rooms_as_they_are():
    text = rooms.DESIGN.read_text()
    assert text == rooms.with_rooms(text, PACKAGE), "python tests/rooms.py --write"


# What breaks the order -> files to plant, and what has to be said of them. `layer/planted.py` is there for all.
PLANTED = {
    "up": (
        {"ops/up.py": "from moe_overlap.layer.planted import anything"},
        ["ops/up.py imports moe_overlap.layer.planted: layer is above ops"],
    ),
    "up, by the folder": (
        {"ops/by_folder.py": "from moe_overlap.layer import planted"},
        ["ops/by_folder.py imports moe_overlap.layer.planted: layer is above ops"],
    ),
    "up, for types": (
        {
            "ops/for_types.py": "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from moe_overlap.layer.planted import Anything"
        },
        [
            "ops/for_types.py imports moe_overlap.layer.planted: layer is above ops",
            "ops/for_types.py:1: a mention of TYPE_CHECKING",
            "ops/for_types.py:2: an `if TYPE_CHECKING` block",
        ],
    ),
    "for types, by another name": (
        {"ops/renamed.py": "from typing import TYPE_CHECKING as T\nif T:\n    from moe_overlap.ops import gate"},
        ["ops/renamed.py:1: a mention of TYPE_CHECKING"],
    ),
    "up, in a function": (
        {"ops/in_function.py": "def late():\n    import moe_overlap.layer.planted"},
        ["ops/in_function.py imports moe_overlap.layer.planted: layer is above ops"],
    ),
    "up, by a string": (
        {"ops/by_string.py": "TABLE = {'x': ('moe_overlap.layer.planted', 'help')}"},
        ["ops/by_string.py imports moe_overlap.layer.planted: layer is above ops"],
    ),
    "up, by a name put together": (
        {"ops/put_together.py": "def late(stem):\n    return importlib.import_module(f'moe_overlap.layer.{stem}')"},
        ['ops/put_together.py puts names of modules together ("moe_overlap.layer."): write them out'],
    ),
    "up, relative": (
        {"ops/relative.py": "from ..layer import planted"},
        ["ops/relative.py imports ..layer.planted: relative"],
    ),
    "relative, in the same room": (
        {"ops/dot.py": "from . import gate"},
        ["ops/dot.py imports .gate: relative"],
    ),
    "up to the face": (
        {"layer/face.py": "from moe_overlap import MoELayer"},
        ["layer/face.py imports moe_overlap: the public face is above layer"],
    ),
    "beside": (
        {"planning/planted.py": "", "measure/beside.py": "from moe_overlap.planning import planted"},
        ["measure/beside.py imports moe_overlap.planning.planted: planning is beside measure"],
    ),
    "down, to a room that is not open": (
        {"placement/planted.py": "", "ops/not_open.py": "from moe_overlap.placement import planted"},
        ["ops/not_open.py imports moe_overlap.placement.planted: ops imports only native"],
    ),
    "down, as only the executor may": (
        {"transport/planted.py": "", "schedule/data.py": "from moe_overlap.transport import planted"},
        ["schedule/data.py imports moe_overlap.transport.planted: schedule imports only agreement, native"],
    ),
    "down to the executor, from planning": (
        {"planning/back_door.py": "from moe_overlap.schedule.run import Step"},
        ["planning/back_door.py imports moe_overlap.schedule.run: planning does without the executor"],
    ),
    "down to the executor, from measure, in a function": (
        {"measure/back_door.py": "def late():\n    from moe_overlap.schedule import lanes"},
        ["measure/back_door.py imports moe_overlap.schedule.lanes: measure does without the executor"],
    ),
    "the executor, in the data of its room": (
        {"schedule/back_door.py": "import moe_overlap.schedule.clocks\nTABLE = ['moe_overlap.schedule.rows']"},
        [
            f"schedule/back_door.py imports moe_overlap.schedule.{stem}: the data of schedule does without the executor"
            for stem in ("clocks", "rows")
        ],
    ),
    "circle of two": (
        {"auto/one.py": "import moe_overlap.auto.two", "auto/two.py": "def late():\n    import moe_overlap.auto.one"},
        ["auto/one.py -> auto/two.py -> auto/one.py"],
    ),
    "circle of three, by a string": (
        {
            "commands/one.py": "TABLE = ['moe_overlap.commands.two']",
            "commands/two/__init__.py": "from moe_overlap.commands.two import three",
            "commands/two/three.py": "from moe_overlap.commands.one import TABLE",
        },
        ["commands/one.py -> commands/two/__init__.py -> commands/two/three.py -> commands/one.py"],
    ),
    "loose": (
        {"helpers.py": "", "notes.txt": ""},
        [f"{name} stands loose at the root: it belongs into a room" for name in ("helpers.py", "notes.txt")],
    ),
    "unknown room": (
        {"shed/__init__.py": ""},
        ["shed/ is not a room of the table in tests/rooms.py"],
    ),
    "process group": (
        {"routing/group.py": "import torch.distributed as dist"},
        ["routing/group.py imports torch.distributed: routing does without"],
    ),
    "torch": (
        {"schedule/tensors.py": "from torch import Tensor"},
        ["schedule/tensors.py imports torch.Tensor: schedule does without"],
    ),
}


def plant(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What is found in a copy of the package once all of PLANTED is there, and was not found before."""
    root = tmp_path_factory.mktemp("planted") / "moe_overlap"
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.json"))
    before = rooms.violations(root)
    plant(root, {"layer/planted.py": ""})
    for files, _ in PLANTED.values():
        plant(root, files)
    return [line for line in rooms.violations(root) if line not in before]


@pytest.mark.parametrize("case", PLANTED)
def test_what_breaks_the_order_is_found(planted, case):
    for line in PLANTED[case][1]:
        assert line in planted


def test_nothing_else_is_found(planted):
    assert sorted(planted) == sorted(line for _, lines in PLANTED.values() for line in lines)


SMALL_HOUSE = {
    "__init__.py": '"""The face."""\nfrom moe_overlap.layer.layer import Layer',
    "__main__.py": '"""The command."""\nfrom moe_overlap.commands import cli',
    "config.py": '"""The environment."""\nfrom moe_overlap.errors import ConfigError',
    "errors.py": '"""What can go wrong."""',
    "py.typed": "",
    "commands/__init__.py": '"""The commands."""',
    "commands/cli.py": "from moe_overlap import Layer\nTABLE = ['moe_overlap.commands.bench']",
    "commands/bench/__init__.py": "import moe_overlap.commands.bench.rows",
    "commands/bench/rows.py": "NAME = 'moe_overlap.commands.bench.rows'",
    "layer/__init__.py": '"""What a model calls."""',
    "layer/layer.py": "from moe_overlap import ops\nfrom moe_overlap.schedule.run import Step",
    "schedule/__init__.py": '"""The order of actions.\n\nAnd more."""',
    "schedule/run.py": "import torch.nn\nimport moe_overlap.transport.base",
    "transport/__init__.py": '"""Bytes between ranks."""\nfrom moe_overlap.transport.base import Transport',
    "transport/base.py": "import torch.distributed as dist\nfrom moe_overlap import config",
    "ops/__init__.py": '"""Arithmetic."""\nfrom moe_overlap.ops import gate',
    "ops/gate.py": "from moe_overlap.errors import ConfigError\nLIBRARY = Library('moe_overlap')",
}
DRAWN = """\
__main__.py  The command.

commands/    The commands.
             cli bench/

__init__.py  The face.

layer/       What a model calls.
             layer

schedule/    The order of actions.
             run

transport/   Bytes between ranks.
             base

ops/         Arithmetic.
             gate

errors.py    What can go wrong.
config.py    The environment.
"""


def test_a_small_house_in_order(tmp_path):
    plant(tmp_path, SMALL_HOUSE)
    (tmp_path / "left" / "__pycache__").mkdir(parents=True)
    assert rooms.violations(tmp_path) == []
    assert rooms.draw(tmp_path) == DRAWN
    text = f"above\n{rooms.BEGIN}\n{rooms.END}\nbelow\n"
    written = rooms.with_rooms(text, tmp_path)
    assert written == f"above\n{rooms.BEGIN}\n```\n{DRAWN}```\n{rooms.END}\nbelow\n"
    assert rooms.with_rooms(written, tmp_path) == written


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
    for path in package_files():
        if path == PACKAGE / "config.py":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not re.search(r"\benviron\b|\bgetenv\b", line), f"{path.relative_to(ROOT)}:{number}"


def test_nothing_names_a_private_place():
    for path in tracked():
        if path == Path(__file__) or path.suffix in (".png", ".safetensors"):
            continue
        text = path.read_text(errors="replace")
        assert not PRIVATE.search(text), f"{path.relative_to(ROOT)}: {PRIVATE.search(text)}"


def line_limit(file):
    """Lower where the thread of a step runs through."""
    if file == "layer/layer.py":
        return 300
    return 400 if rooms.room_of(file) in ("layer", "auto", "schedule", "agreement") else 450


def test_files_and_functions_stay_readable():
    for path in package_files():
        lines = path.read_text().splitlines()
        limit = line_limit(path.relative_to(PACKAGE).as_posix())
        assert len(lines) <= limit, f"{path.relative_to(ROOT)} has {len(lines)} lines; at most {limit}"
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 75, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"


def test_compiled_files_stay_readable():
    paths = [path for path in tracked() if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert len(paths) > 50
    for path in paths:
        lines = len(path.read_text().splitlines())
        assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines; at most 450"


def test_public_names_have_docstrings():
    import moe_overlap

    for name in moe_overlap.__all__:
        assert getattr(moe_overlap, name).__doc__, name


FOLDERS = "moe_overlap|csrc|tests|benchmarks|docs|examples"


def test_readme_is_short_and_names_existing_files():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", readme):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", ["docs/design.md", "docs/parallel.md", "docs/status.md", "CONTRIBUTING.md"])
def test_documents_name_existing_files(document):
    """By their paths, within a command too; or shorter, as `ops/gate.py` or `gate.py`, if a file's path ends so."""
    existing = [f"/{path.relative_to(ROOT).as_posix()}" for path in tracked()]
    for span in re.findall(r"`([^`\n]+)`", (ROOT / document).read_text()):
        for name in re.findall(rf"(?:^|(?<=\s))(?:{FOLDERS})/[^\s,]+", span):
            assert "<" in name or any(ROOT.glob(name.rstrip("/"))), f"{document}: {name}"
        if re.fullmatch(r"[\w*/-]+\.(?:py|cu|cuh|cpp|h)", span):
            assert fnmatch.filter(existing, f"*/{span}"), f"{document}: {span}"
        elif re.fullmatch(r"[\w/-]+/", span):
            assert any(f"/{span}" in path for path in existing), f"{document}: {span}"
