"""Source patches: a module of the package with one text replaced, in a rank process and nowhere else.

`patched(patches)` makes the modules anew from changed source while it lasts; what stands on the disk and in the cache
of compiled files stays. Modules below `KEPT` register operators with torch when they are imported, which can be done
once in a process, and are never patched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

PACKAGE = "moe_overlap"
KEPT = tuple(f"{PACKAGE}.{name}" for name in ("ops", "native", "errors", "config"))
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Patch:
    """In the source of `module` (its name without "moe_overlap."), `old`, which stands there exactly once, becomes
    `new`."""

    module: str
    old: str
    new: str

    @property
    def path(self) -> Path:
        return ROOT / PACKAGE / (self.module.replace(".", "/") + ".py")

    def apply(self, source: str) -> str:
        """The changed source. Raises AssertionError where `old` is not found exactly once: the patch is out of date."""
        found = source.count(self.old)
        assert found == 1, f"{self.path.relative_to(ROOT)}: found {found} times, not once:\n{self.old}"
        return source.replace(self.old, self.new)


class _Loader(SourceFileLoader):
    """Compiles changed source; the cache of compiled files is neither read nor written. Unchanged source is compiled
    once in a process."""

    patches: Sequence[Patch]

    def get_code(self, fullname: str) -> CodeType:
        if not self.patches and self.path in _UNCHANGED:
            return _UNCHANGED[self.path]
        source = self.get_data(self.path).decode()
        for patch in self.patches:
            source = patch.apply(source)
        code: CodeType = compile(source, self.path, "exec", dont_inherit=True)
        if not self.patches:
            _UNCHANGED[self.path] = code
        return code


_UNCHANGED: dict[str, CodeType] = {}


class _Finder(MetaPathFinder):
    def __init__(self, patches: Sequence[Patch]) -> None:
        self._by_module: dict[str, list[Patch]] = {}
        for patch in patches:
            self._by_module.setdefault(f"{PACKAGE}.{patch.module}", []).append(patch)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not _is_remade(name):
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.origin is not None
        loader = _Loader(name, spec.origin)
        loader.patches = self._by_module.get(name, ())
        spec.loader = loader
        return spec


@contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    """While it lasts, what is imported of the package is made from changed source; afterwards all is as before."""
    before = {name: module for name, module in sys.modules.items() if _is_remade(name)}
    hooks = [(table, dict(table)) for table in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)]
    finder = _Finder(patches)
    _forget()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget()
        sys.modules.update(before)
        for table, entries in hooks:
            table.clear()
            table.update(entries)


def _forget() -> None:
    for name in [name for name in sys.modules if _is_remade(name)]:
        del sys.modules[name]


def _is_remade(name: str) -> bool:
    below = name == PACKAGE or name.startswith(f"{PACKAGE}.")
    return below and not any(name == kept or name.startswith(f"{kept}.") for kept in KEPT)
