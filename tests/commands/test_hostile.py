"""Ten kinds of bad value for every option of every command: done, or refused in one line, and never a traceback."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest

from tests.commands.hostile import COMMANDS, Case, cases, options_of, pairs, run, values


def wrong_of(some: Iterable[Case], folder, capsys, monkeypatch, limit_s: float) -> tuple[int, list[str]]:
    """How many cases there were, and those that ended in anything but exit 0, or exit 2 and one line, in time."""
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")  # where the relative paths among the values lead
    wrong, count = [], 0
    for case in some:
        count += 1
        begin = time.perf_counter()
        try:
            status = run(case, folder)
        except BaseException as error:  # what a user would see as a traceback
            wrong.append(f"{case}"[:600] + f" -> {type(error).__name__}: {error}"[:200])
            capsys.readouterr()
            continue
        lines = capsys.readouterr().err.splitlines()
        fine = status in (0, 2) and len(lines) == (status == 2) and all(len(line) < 1300 for line in lines)
        if not fine or time.perf_counter() - begin > limit_s:
            wrong.append(f"{case}"[:600] + f" -> {status}, {time.perf_counter() - begin:.1f} s: {lines}"[:400])
    assert (folder / "fifo").is_fifo() and (folder / "folder").is_dir(), "nothing was renamed over them"
    return count, wrong


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_bad_value_is_a_traceback(command, tmp_path, capsys, monkeypatch):
    some = (case for case in cases(tmp_path) if case.command == command)
    values(tmp_path)
    _, wrong = wrong_of(some, tmp_path, capsys, monkeypatch, limit_s=20)
    assert not wrong, "\n".join([*wrong[:20], f"{len(wrong)} in all"])


@pytest.mark.soak
def test_ten_thousand_bad_values(tmp_path, capsys, monkeypatch):
    """All single ones, and pairs."""
    some = [*cases(tmp_path), *pairs(tmp_path, 6000, seed=11)]
    count, wrong = wrong_of(some, tmp_path, capsys, monkeypatch, limit_s=20)
    assert count > 10_000 and not wrong, "\n".join([*wrong[:20], f"{len(wrong)} in all"])


def test_every_option_is_found_and_every_kind_has_values(tmp_path):
    found = {command: {action.option_strings[-1] for action in options_of(command)} for command in COMMANDS}
    assert found["kernels",] == {"--write"} and found["info",] == {"--verbose"}
    assert {"--out", "--cost-model", "--latency"} <= found["plan",] and "--seed" in found["train",]
    assert "--link" in found["calibrate",] and {"--cases", "--routing"} <= found["bench", "layer"]
    kinds = values(tmp_path)
    assert len(kinds) == 10 and all(len(bad) >= 4 for bad in kinds.values())
