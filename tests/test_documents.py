"""Code blocks of README.md and docs/ that no other test runs: command lines are real ones, programs print what they
say, no block is of a kind that nobody runs. The site's navigation leads to pages, every name is in its reference."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moe_overlap
from moe_overlap import routing
from moe_overlap.commands import calibrate, cli, place, verify
from moe_overlap.commands.bench import balance_options, overlap_options
from moe_overlap.commands.bench import ops as bench_ops
from moe_overlap.commands.bench import options as bench_options
from moe_overlap.commands.plan import options as plan_options
from moe_overlap.commands.train import options as train_options
from tests.commands.hostile import COMMANDS, without_work
from tests.test_docs import BLOCK, blocks, promised, run

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]}
# The test that runs the programs of a page.
PROGRAMS = {
    "README.md": "tests/test_docs.py",
    "guide.md": "tests/test_docs.py",
    "ops.md": "tests/test_docs.py",
    "verify.md": "tests/test_docs.py",
    "parallel.md": "tests/parallel/test_recipes.py",
    "checkpoints.md": "tests/parallel/test_checkpoint_recipes.py",
    "transformers.md": "tests/integrations/test_transformers_docs.py",
    "torchtitan.md": "tests/integrations/test_torchtitan.py",
    "index.md": "tests/test_documents.py",
    "no_overlap.md": "tests/test_documents.py",
    "balance.md": "tests/test_pages_of_ranks.py",
    "routing.md": "tests/test_pages_of_ranks.py",
}
WITH_EXAMPLES = (
    balance_options, bench_options, bench_ops, calibrate, overlap_options, place, plan_options, train_options, verify,
)  # fmt: skip
INDENTED = re.compile(r"^    ```python\n(.*?)^    ```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def programs(page):
    """Those inside of lists too."""
    inside = [re.sub(r"^    ", "", text, flags=re.MULTILINE) for text in INDENTED.findall(PAGES[page])]
    return blocks(PAGES[page], "python") + inside


def command_lines():
    """(page, the words of `moe-overlap`) of every line of a block or of the end of a help that calls it, under torchrun
    too; but for the one that asks a card."""
    written = [(page, block) for page, text in PAGES.items() for language, block in FENCE.findall(text)
               if language in ("", "bash")]  # fmt: skip
    ends = [(f"--help of {module.__name__.removeprefix('moe_overlap.commands.')}", module.EXAMPLES)
            for module in WITH_EXAMPLES]  # fmt: skip
    for page, lines in written + ends:
        for line in lines.splitlines():
            if "--link staged" in line:
                continue
            words = shlex.split(line, comments=True)
            if "moe_overlap" in words:
                yield page, words[words.index("moe_overlap") + 1 :]
            elif words and words[0].split("/")[-1] == "moe-overlap":
                yield page, words[1:]


@pytest.mark.parametrize("page", [page for page, test in PROGRAMS.items() if test == "tests/test_documents.py"])
def test_programs_print_what_they_say(page, tmp_path, capsys):
    assert programs(page)
    for program in programs(page):
        run(program, tmp_path)
        assert capsys.readouterr().out.splitlines() == promised(program) != []


def test_every_page_with_programs_has_a_test_that_runs_them():
    assert sorted(page for page in PAGES if programs(page)) == sorted(PROGRAMS)
    for page, test in PROGRAMS.items():
        assert page in (ROOT / test).read_text(), f"{test} does not name {page}"


@pytest.mark.parametrize(
    "line", [pytest.param(words, id=f"{page}: {' '.join(words)}") for page, words in command_lines()]
)
def test_command_lines_are_taken(line, tmp_path, monkeypatch, capsys):
    """By the commands as they are, without the work behind them. What they read is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # some lines are for machines with GPUs
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    command = tuple(line[:2]) if line[0] == "bench" else (line[0],)
    assert command in COMMANDS
    if {"--resume", "mine:Mine"} & set(line) or line[0] == "train":  # their checks read a run, a module, a text
        line = [word for word in line if word != "mine:Mine"]
        text = tmp_path / "text.txt"
        text.write_text("a text of some words, " * 20000)
        line = line + ["--text", str(text)] if line[0] == "train" else line
        if "--resume" in line:
            del line[line.index("--resume") : line.index("--resume") + 2]
    if "config.json" in line:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2,
                 "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **sizes}))
    if line[0] == "place":
        (tmp_path / "counts.jsonl").write_text("[9, 2, 1, 1, 1, 1, 1, 1]\n" * 2)
        ids = torch.arange(8, dtype=torch.int32).repeat(4).view(16, 2)
        save_file({"ids": ids, "weights": torch.ones(16, 2)}, tmp_path / "r.safetensors", {"E": "8"})
    with without_work(command):
        assert cli.main(line) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_says_defaults_as_they_are_typed_and_has_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "(default: )" not in said and "(default: (" not in said and "(default: False)" not in said
    assert ("examples: moe-overlap" in said) == (command not in {("info",), ("kernels",)})


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = [word for text in PAGES.values() for _, block in FENCE.findall(text)
             for word in re.findall(r"^make ([a-z]+)", block, re.MULTILINE)]  # fmt: skip
    assert {"test", "bench", "docs"} <= set(named)
    assert not [name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)]


def test_no_block_is_lost():
    for page, text in PAGES.items():
        assert text.count("```") == 2 * (len(FENCE.findall(text)) + len(INDENTED.findall(text))), page
        assert {language for language, _ in BLOCK.findall(text)} <= {"python", "bash", "text"}, page


def test_the_navigation_leads_to_pages():
    """A page that is missing in it is an error of `make docs`."""
    pages = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(pages) > 10 and not [page for page in pages if not (DOCS / page).is_file()]


def test_every_public_name_is_in_the_reference():
    page = PAGES["api.md"]
    missing = [name for name in moe_overlap.__all__ if name not in ("functional", "ops") and
               f"::: moe_overlap.{name}\n" not in page]  # fmt: skip
    assert not missing
    named = re.findall(r"^::: moe_overlap\.routing\.(\w+)$", page, re.MULTILINE)
    assert named and not [name for name in named if name not in routing.__all__]


@pytest.mark.parametrize("word", "joined tap slot bound share lane flagged Pos-1 Pos-2 Pos-3".split())
def test_the_glossary_has_the_words_of_the_tables(word):
    assert re.search(rf"^\| [^|]*\b{word}\b[^|]* \|", PAGES["glossary.md"], re.MULTILINE)
