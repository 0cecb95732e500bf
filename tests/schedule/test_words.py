"""A pair as a line of Python: the line, read back, is the pair."""

from __future__ import annotations

import runpy
from dataclasses import replace

import pytest

from moe_overlap.errors import ConfigError
from moe_overlap.schedule.actions import VERBS
from moe_overlap.schedule.builders import (
    agree_ahead,
    chunked,
    deduplicate,
    parse_choice,
    serial,
    shared_expert,
    shortcut,
    window,
    with_copies,
)
from moe_overlap.schedule.words import from_text, imports_of, legend, overlaps, python_of


@pytest.mark.parametrize("word", ["serial", "chunked(1)", "chunked(4)", "chunked(3,experts)"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_word_is_found_again(word, shared):
    assert python_of(parse_choice(word, shared=shared)) == f'MoELayer(..., schedule="{word}")'


def test_the_words_of_a_shared_expert_and_overlap_off():
    assert python_of(shared_expert(0)) == 'MoELayer(..., schedule="shared_expert(0)")'
    assert python_of(chunked(2).join()) == 'MoELayer(..., schedule="chunked(2)", overlap=False)'


def test_a_window_is_the_blocks_arguments():
    assert python_of(shortcut(2, 1, chunks=2, backward_slot=3, backward_chunks=1)) == (
        "ShortcutBlock(..., slot=1, chunks=2, backward_slot=3, backward_chunks=1)"
    )
    assert python_of(window(2, 0, by="experts", chunks=2)).endswith('backward_chunks=2, by="experts")')


@pytest.mark.parametrize("pair", [
    chunked(2).with_backward(chunked(4, "experts")), agree_ahead(window(3, 1)), agree_ahead(shared_expert()),
    deduplicate(chunked(2)), deduplicate(window(2, 1)),
])  # fmt: skip
def test_what_no_word_names_is_written_out(pair):
    line = python_of(pair)
    inside = line.split("from_text(")[1].split(")")[0]
    forward, backward = inside.split('"')[1], inside.split('"')[3]
    options = dict(
        word.replace('"', "").strip().split("=") for word in inside.split('"' + backward + '"')[1].split(",")[1:]
    )
    again = from_text(forward, backward, **options)
    assert again.digest == pair.digest
    assert ('dedup="on"' in line) == pair.deduplicated
    assert line.startswith("ShortcutBlock(" if pair.num_ops else "MoELayer(")


@pytest.mark.parametrize("pair", [chunked(2), window(2, 1), deduplicate(chunked(2)), serial()])
@pytest.mark.parametrize("relayed", [False, True])
def test_how_copies_are_sent_is_said_in_a_step_that_has_some(pair, relayed):
    given = replace(pair, relayed_copies=relayed)
    assert "relayed" not in python_of(given), "no copies"
    line = python_of(with_copies(given, 2 if relayed else 1, True))
    assert line.startswith("ShortcutBlock(..., schedule=" if pair.num_ops else "MoELayer(..., schedule=")
    inside, after = line.split("schedule=replace(from_text(")[1].split(")", 1)
    assert after.startswith(f", relayed_copies={relayed})") and ("overlap=False" in line) == pair.joined
    assert from_text(*inside.split('"')[1::2]).digest == pair.digest
    assert "relayed" not in python_of(with_copies(pair, 1, True)), "as the rule says"


@pytest.mark.parametrize("pair", [
    chunked(2).with_backward(chunked(4)), deduplicate(chunked(2)),
    with_copies(replace(chunked(2), relayed_copies=True), 2, True),
])  # fmt: skip
def test_a_line_is_python_after_the_imports_that_are_said_with_it(pair, tmp_path):
    line = python_of(pair)
    (said,) = imports_of(line)
    layer = "def MoELayer(*_, schedule, **words): return schedule"
    (tmp_path / "program.py").write_text(f"{said.strip().removeprefix('after: ')}\n{layer}\ngiven = {line}\n")
    given = runpy.run_path(str(tmp_path / "program.py"))["given"]
    without = [action.text for action in pair.forward if action.verb != "Wf"]
    assert [action.text for action in given.forward] == without and given.relayed_copies == pair.relayed_copies


def test_a_word_needs_no_import():
    assert imports_of(python_of(chunked(2))) == imports_of(python_of(window(2, 1))) == []


def test_a_text_that_cannot_run_is_refused():
    with pytest.raises(ConfigError, match=r"schedule\.forward"):
        from_text("P E0 D0 C0 U", serial().backward.text)
    with pytest.raises(ConfigError, match="action"):
        from_text("P D0 X0 C0 U", serial().backward.text)


def test_what_overlaps():
    assert [overlaps(serial(), phase) for phase in ("forward", "backward")] == [False, False]
    assert [overlaps(chunked(1), phase) for phase in ("forward", "backward")] == [False, True], "weight gradients"
    assert [overlaps(chunked(2), phase) for phase in ("forward", "backward")] == [True, True]
    assert not overlaps(chunked(2).join(), "forward")


def test_the_legend_has_every_letter_that_is_drawn():
    pair = deduplicate(shortcut(2, 1))
    text = "\n".join(legend(pair))
    for action in (*pair.forward, *pair.backward):
        assert f"{action.verb} {VERBS[action.verb].meaning}" in text
    assert "S shared" not in text
