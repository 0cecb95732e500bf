"""The names of the package itself: loaded when asked for, and the same for type checkers."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import moe_overlap
from moe_overlap.agreement.record import RECORD_FIELDS
from moe_overlap.agreement.sizes import RECORD_WORDS


def test_the_stub_has_the_same_names_from_the_same_places():
    stub = ast.parse((Path(moe_overlap.__file__).parent / "__init__.pyi").read_text())
    said = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(said) - {"VERSION"} == set(moe_overlap.__all__)
    assert import_module("moe_overlap.layer.functional") is moe_overlap.functional
    for name in set(moe_overlap.__all__) - {"functional"}:
        assert getattr(import_module(said[name]), name) is getattr(moe_overlap, name), name


def test_a_name_that_is_none():
    assert not hasattr(moe_overlap, "anything_else") and "MoELayer" in dir(moe_overlap)


def test_the_package_alone_loads_no_torch():
    code = "import sys, moe_overlap; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_words_of_a_record_are_as_many_as_its_fields():
    assert len(RECORD_FIELDS) == RECORD_WORDS
