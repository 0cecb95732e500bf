"""docs/ops.md does not go stale: its programs print what they say, its signatures and its table are the code's.

The programs of README.md and docs/guide.md run as they are written, README's first one on two ranks; links lead to
files.
"""

from __future__ import annotations

import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_overlap import ConfigError, ops
from moe_overlap.ops import registry
from moe_overlap.verify.run import CHECKS
from tests import oracle
from tests.tolerances import close

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "ops.md").read_text()
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
VERIFY = (ROOT / "docs" / "verify.md").read_text()
FINDINGS = (ROOT / "findings" / "README.md").read_text()
OPERATORS = [name for name in ops.__all__ if not inspect.ismodule(getattr(ops, name))]

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINT = re.compile(r"^ *print\(.*?\)(?: +# (.*))?$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)")
HEADING = re.compile(r"^### (.*)$", re.MULTILINE)
SIGNATURE = re.compile(r"^`(\w+\([^`]*\))`\s->\s`", re.MULTILINE)
NAMES = r"`\w+`(?:, `\w+`)*"
TABLE_ROW = re.compile(rf"^\| ({NAMES}) \| ({NAMES}) \|$", re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [text for found, text in BLOCK.findall(page) if found == language]


def promised(program: str) -> list[str]:
    """What a program's `print` lines say they print, in their order. One without a comment promises "".

    A comment on the output stands on the line of its `print`, and such a line runs once.
    """
    return PRINT.findall(program)


def named(text: str) -> list[str]:
    """The names in backticks."""
    return re.findall(r"`(\w+)`", text)


def run(program: str, folder: Path) -> dict[str, Any]:
    """The names a program leaves behind. torch's random numbers are afterwards as before."""
    path = folder / "program.py"
    path.write_text(program)
    with torch.random.fork_rng(devices=[]):
        return runpy.run_path(str(path))


def signature(name: str) -> str:
    """An operator's signature without annotations, as the page writes it."""
    found = inspect.signature(getattr(ops, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    text = found.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    return f"{name}{text}".replace("'", '"')


@pytest.mark.parametrize("number", range(len(blocks(PAGE, "python"))))
def test_every_program_runs_and_prints_what_it_says(number, tmp_path, capsys):
    program = blocks(PAGE, "python")[number]
    wanted = promised(program)
    run(program, tmp_path)
    assert capsys.readouterr().out.splitlines() == wanted
    # A program that says nothing about itself would pass whatever it does.
    assert wanted or "assert " in program


@pytest.mark.parametrize("program", blocks(README, "python") + blocks(GUIDE, "python"))
def test_the_programs_of_readme_and_guide_print_what_they_say(program, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    run(program, tmp_path)
    assert capsys.readouterr().out.splitlines() == promised(program) != []


def test_the_links_of_the_documents_lead_to_files():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]
    links = [(page, link) for page in pages for link in LINK.findall(page.read_text()) if "://" not in link]
    assert len(links) >= 10
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).is_file()] == []


def test_no_program_is_lost():
    """Each block that a reader sees as Python is one that was run."""
    assert PAGE.count("```python") == len(blocks(PAGE, "python")) > 0
    assert PAGE.count("```") == 2 * len(BLOCK.findall(PAGE))


@pytest.mark.parametrize("top_k", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_layer_of_the_page_is_the_oracle(dtype, top_k, tmp_path):
    moe = run(blocks(PAGE, "python")[0], tmp_path)["moe"]
    seeded = torch.Generator().manual_seed(7)
    shapes = ((20, 6), (5, 6), (5, 14, 6), (5, 6, 7))
    given = [torch.randn(shape, generator=seeded, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    exact = [value.detach().double().requires_grad_() for value in given]

    x_TD, router_ED, w_in, w_out = exact
    weights_TK, ids_TK = (x_TD @ router_ED.T).softmax(dim=1).topk(top_k, dim=1)
    want = oracle.moe(x_TD, ids_TK, weights_TK / weights_TK.sum(dim=1, keepdim=True), w_in, w_out)
    got = moe(*given, top_k=top_k)

    close(got, want)
    dy = torch.randn(want.shape, generator=seeded, dtype=torch.float64)
    gradients = torch.autograd.grad(got, given, dy.to(dtype))
    for gradient, wanted in zip(gradients, torch.autograd.grad(want, exact, dy), strict=True):
        close(gradient, wanted)


def test_every_operator_has_a_heading_and_its_real_signature():
    assert OPERATORS
    headings = [name for heading in HEADING.findall(PAGE) for name in named(heading)]
    assert sorted(headings) == sorted(OPERATORS)
    written = [" ".join(text.split()) for text in SIGNATURE.findall(PAGE)]
    assert sorted(written) == sorted(signature(name) for name in OPERATORS)


def test_the_table_has_the_implementations_that_there_are():
    written = {op: named(impls) for left, impls in TABLE_ROW.findall(PAGE) for op in named(left)}
    there_are = {}
    for op in {line.split(":")[0] for line in registry.explain()}:
        with pytest.raises(ConfigError) as refusal:
            registry.function(op, "of another name")
        there_are[op] = refusal.value.expected.split(": ")[1].split(", ")
    assert written == there_are


def test_the_first_program_of_the_readme_runs_on_two_ranks_as_the_line_below_it_says(tmp_path):
    (tmp_path / "demo.py").write_text(blocks(README, "python")[0])
    (line,) = re.findall(r"^torchrun (.*)$", README, re.MULTILINE)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # What both print may be mixed, so each writes a file of its own.
    apart = ["--redirects", "1", "--log-dir", str(tmp_path / "log")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *apart, *line.split()]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    # The sum is over the ranks: 128 tokens with two experts on each.
    assert [one.read_text() for one in (tmp_path / "log").rglob("stdout.log")] == ["(128, 64) 512\n"] * 2


def test_the_readme_is_short_and_says_first_where_it_has_run():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("| CPU") for line in lines[:10]) and any("**not run**" in line for line in lines[:10])


def test_the_programs_of_the_kits_page_run(tmp_path):
    for program in blocks(VERIFY, "python"):
        (name,) = re.findall(r"^# (\w+\.py)$", program, re.MULTILINE)
        (tmp_path / name).write_text(program)
    assert len((tmp_path / "mine.py").read_text().splitlines()) <= 40
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for words in (["mine.py"], ["-m", "pytest", "-q", "test_mine.py"]):
        result = subprocess.run([sys.executable, *words], env=environment, cwd=tmp_path, capture_output=True, text=True,
                                timeout=120)  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_kits_page_has_its_checks():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", VERIFY, re.MULTILINE)[1:]
    assert ", ".join(rows) == ", ".join(check.title for check in CHECKS)


def test_the_skeleton_of_a_finding_is_a_shell_script():
    (script,) = blocks(FINDINGS, "bash")
    result = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
