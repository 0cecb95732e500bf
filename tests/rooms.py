"""The rooms of the package: who imports whom, read from the source files, and the order that they have to keep.

`python tests/rooms.py` prints the rooms and what breaks the order; `--write` puts the rooms into docs/design.md.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_overlap"
DESIGN = ROOT / "docs" / "design.md"
NAME = "moe_overlap"

# From top to bottom. A file may import what stands on lower floors, its own room, and errors and config; nothing beside
# it. A room is a folder or one of the files at the root.
FLOORS = (
    ("__main__",),
    ("commands",),
    ("__init__",),
    ("verify", "integrations"),
    ("layer",),
    ("auto", "parallel"),
    ("planning", "measure"),
    ("schedule",),
    ("transport", "routing"),
    ("ops", "agreement"),
    ("placement",),
    ("native", "launch"),
    ("errors", "config"),
)
ALWAYS = {"errors", "config"}
AT_THE_ROOT = {"__main__.py", "__init__.py", "__init__.pyi", "errors.py", "config.py", "py.typed"}

# Of the lower rooms, these only.
ONLY = {
    "planning": {"schedule", "agreement", "native"},
    "measure": {"schedule"},
    "parallel": {"transport", "agreement"},
    "schedule": {"agreement", "native"},
    "transport": {"agreement"},
    "routing": {"ops"},
    "ops": {"native"},
    "agreement": {"placement"},
    "placement": {"native"},
    "native": set(),
    "launch": set(),
}
# The executor alone brings ops (through rows.py) and transport together, and the autograd nodes it drives. Its files,
# and what they may import beyond the others of the schedule room. Who imports one of them has torch, ops and transport
# with it: the rooms of ONLY and the other files of the schedule room do without.
EXECUTOR = {
    "schedule/run.py": {"transport"},
    "schedule/backward.py": {"transport"},
    "schedule/lanes.py": {"transport"},
    "schedule/agreeing.py": {"transport"},
    "schedule/nodes.py": set(),
    "schedule/dispatch.py": {"transport", "placement"},
    "schedule/rows.py": {"ops"},
    "schedule/weights.py": {"ops"},
    "schedule/expert_copies.py": {"ops"},
    "schedule/host_experts.py": {"transport"},
    "schedule/static_dispatch.py": {"transport", "ops"},
    "schedule/static_rows.py": {"ops"},
    "schedule/static_word.py": {"transport"},
    "schedule/distinct_rows.py": {"ops"},
    "schedule/distinct_maps.py": {"ops"},
    "schedule/gateway.py": {"ops"},
    "schedule/tables.py": {"ops"},
    "schedule/clocks.py": set(),
    "schedule/numbers.py": set(),
    "schedule/user_ops.py": {"transport"},
}
NO_DISTRIBUTED = {"routing", "placement", "ops", "schedule", "planning"}
NO_TORCH = {"planning", "schedule"}  # the executor excepted

BEGIN = "<!-- from the tree: python tests/rooms.py --write -->"
END = "<!-- end of the rooms -->"
WIDTH = 118


@dataclass(frozen=True)
class File:
    """What one file says about others."""

    names: tuple[str, ...]  # the full names of all that it imports, of this package or not
    imports: tuple[str, ...]  # the files of the package that it imports, or whose module it names in a string
    put_together: tuple[str, ...]  # strings that are the beginning of a module's name
    type_checking: tuple[int, ...]  # lines of `if TYPE_CHECKING`
    mentions_of_it: tuple[int, ...]  # the other lines with that word: it may be imported under another name


def read(root: Path) -> dict[str, File]:
    """Every file of the package at `root`, by its path from there."""
    texts = {path.relative_to(root).as_posix(): path.read_text() for path in sorted(root.rglob("*.py"))}
    files = {module_of(file): file for file in texts}
    return {file: _read(file, text, files) for file, text in texts.items()}


def _read(file: str, text: str, files: dict[str, str]) -> File:
    tree = ast.parse(text)
    names = sorted(set(_imported(tree)))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    imports = {_file_of(name, files) for name in names if name.split(".")[0] == NAME}
    # The name of the package alone is also that of its operators' namespace and of its logger: no module is meant.
    imports |= {files[string] for string in strings if string in files and string != NAME}
    type_checking = {node.lineno for node in ast.walk(tree) if _is_type_checking(node)}
    mentions = {number for number, line in enumerate(text.splitlines(), 1) if "TYPE_CHECKING" in line}
    return File(
        names=tuple(names),
        imports=tuple(sorted(imports - {file})),
        put_together=tuple(sorted(s for s in strings if re.fullmatch(rf"{NAME}(\.\w+)*\.", s))),
        type_checking=tuple(sorted(type_checking)),
        mentions_of_it=tuple(sorted(mentions - type_checking)),
    )


def _imported(tree: ast.Module) -> Iterator[str]:
    """Wherever in the file: in a function and under a condition as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (f"{node.module}." if node.module else "")
            yield from (start + alias.name for alias in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def module_of(file: str) -> str:
    """`ops/gate.py` is moe_overlap.ops.gate, `ops/__init__.py` moe_overlap.ops."""
    parts = [NAME, *Path(file).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _file_of(name: str, files: dict[str, str]) -> str:
    """The file of the longest module that `name` begins with; what follows is a name in it."""
    while name not in files and name != NAME:
        name = name.rpartition(".")[0]
    return files[name]


def room_of(file: str) -> str:
    """The folder, or the name of a file at the root."""
    return file.split("/")[0].removesuffix(".py")


def floor_of(room: str) -> int | None:
    """Counted from the top."""
    return next((number for number, floor in enumerate(FLOORS) if room in floor), None)


def violations(root: Path) -> list[str]:
    """All that breaks the order, a line each."""
    package = read(root)
    return [
        *strangers(root),
        *forbidden_imports(package),
        *circles(package),
        *hidden_imports(package),
        *forbidden_libraries(package),
    ]


def strangers(root: Path) -> list[str]:
    """Loose files at the root, and folders that are no room of the table."""
    lines = []
    for path in sorted(root.iterdir()):
        if path.is_file() and path.name not in AT_THE_ROOT:
            lines.append(f"{path.name} stands loose at the root: it belongs into a room")
        # A folder that has only caches left is what git leaves behind when its files move.
        elif path.is_dir() and floor_of(path.name) is None and any(path.rglob("*.py")):
            lines.append(f"{path.name}/ is not a room of the table in tests/rooms.py")
    return lines


def forbidden_imports(package: dict[str, File]) -> list[str]:
    """Imports that go up, to a room beside, or to a lower room that is not open to this file."""
    found = ((file, imported, _why_not(file, imported)) for file in package for imported in package[file].imports)
    return [f"{file} imports {module_of(imported)}: {why_not}" for file, imported, why_not in found if why_not]


def _why_not(file: str, imported: str) -> str | None:
    here, there = room_of(file), room_of(imported)
    floor_here, floor_there = floor_of(here), floor_of(there)
    if floor_here is None or floor_there is None:
        return None  # what has no floor is reported as a stranger
    if imported in EXECUTOR and file not in EXECUTOR and here in ONLY and floor_here <= floor_there:
        return f"{'the data of ' if here == there else ''}{here} does without the executor"
    if here == there or there in ALWAYS:
        return None
    if floor_there < floor_here:
        return f"{_called(there)} is above {_called(here)}"
    if floor_there == floor_here:
        return f"{_called(there)} is beside {_called(here)}"
    if here in ONLY and there not in ONLY[here] | EXECUTOR.get(file, set()):
        return f"{here} imports only {', '.join(sorted(ONLY[here])) or 'errors and config'}"
    return None


def _called(room: str) -> str:
    return "the public face" if room == "__init__" else room


def circles(package: dict[str, File]) -> list[str]:
    """The shortest circles, so many that every file that stands on one is in a line."""
    lines, covered = [], set()
    for file in package:
        circle = () if file in covered else _circle_through(file, package)
        if circle:
            lines.append(" -> ".join(circle))
            covered.update(circle)
    return lines


def _circle_through(start: str, package: dict[str, File]) -> tuple[str, ...]:
    """The shortest way by imports from a file back to itself; empty if there is none."""
    seen, ways = set(), [(start,)]
    for way in ways:  # which grows meanwhile, shorter ways before longer ones
        for file in package[way[-1]].imports:
            if file == start:
                return (*way, file)
            if file not in seen:
                seen.add(file)
                ways.append((*way, file))
    return ()


def hidden_imports(package: dict[str, File]) -> list[str]:
    """Ways to import that a reader, or this module, would not see."""
    lines = []
    for file, said in package.items():
        lines += [f"{file}:{line}: an `if TYPE_CHECKING` block" for line in said.type_checking]
        lines += [f"{file}:{line}: a mention of TYPE_CHECKING" for line in said.mentions_of_it]
        lines += [f"{file} imports {name}: relative" for name in said.names if name.startswith(".")]
        lines += [f'{file} puts names of modules together ("{start}"): write them out' for start in said.put_together]
    return lines


def forbidden_libraries(package: dict[str, File]) -> list[str]:
    """Process groups, or torch at all, where there may be none."""
    lines = []
    for file, said in package.items():
        for name in said.names:
            distributed = room_of(file) in NO_DISTRIBUTED and name.startswith("torch.distributed")
            torch = room_of(file) in NO_TORCH and file not in EXECUTOR and name.split(".")[0] == "torch"
            if distributed or torch:
                lines.append(f"{file} imports {name}: {room_of(file)} does without")
    return lines


def draw(root: Path) -> str:
    """The rooms in the order of their floors: what each is for, and its files."""
    floors = []
    for floor in FLOORS:
        lines = [line for room in floor for line in _draw_room(root, room)]
        floors += ["\n".join(lines)] if lines else []
    return "\n\n".join(floors) + "\n"


def _draw_room(root: Path, room: str) -> list[str]:
    folder, file = root / room, root / f"{room}.py"
    if file.is_file():
        return _column(file.name, purpose(file))
    if not (folder / "__init__.py").is_file():
        return []
    stems = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    packages = sorted(f"{path.parent.name}/" for path in folder.glob("*/__init__.py"))
    return _column(f"{room}/", purpose(folder / "__init__.py")) + _column("", " ".join([*stems, *packages]))


def _column(name: str, text: str) -> list[str]:
    wrap = textwrap.TextWrapper(WIDTH, f"{name:13}", " " * 13, break_long_words=False, break_on_hyphens=False)
    return wrap.wrap(text)


def purpose(path: Path) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def with_rooms(text: str, root: Path) -> str:
    """A document with the rooms of the package at `root` between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"no block between {BEGIN} and {END}"
    return f"{before}{begin}\n```\n{draw(root)}```\n{end}{after}"


def main(words: list[str]) -> int:
    if words not in ([], ["--write"]):
        print("python tests/rooms.py [--write]", file=sys.stderr)
        return 2
    if words:
        DESIGN.write_text(with_rooms(DESIGN.read_text(), PACKAGE))
        return 0
    problems = violations(PACKAGE)
    print(draw(PACKAGE), *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
