"""What a command is to write is looked at before the work; a file that cannot be had, and Ctrl-C, are one line."""

from __future__ import annotations

import errno
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_overlap.commands import calibrate, cli, verify
from moe_overlap.commands.bench import layer as bench_layer
from moe_overlap.commands.bench import overlap as bench_overlap
from moe_overlap.commands.plan import command as plan
from moe_overlap.commands.train import command as train
from tests.commands.train.jobs import SIZES

ROOT = Path(__file__).resolve().parents[2]


def fifo_at(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("words", "special"),
    [
        ("train --out {0}/out", "out/train.jsonl"),
        ("train --out {0}/out --save-routing {0}/routing", "routing"),
        ("bench layer --out {0}/out", "out/results.jsonl"),
        ("bench layer --out {0}/out", "out/trace.json"),
        ("bench overlap --out {0}/out", "out/speedup.png"),
        ("bench overlap --out {0}/out", "out/emulated/waits.jsonl"),
        ("plan --out {0}/out", "out/plan.png"),
        ("calibrate --out {0}/model.json", "model.json"),
        ("kernels --write {0}/table.json", "table.json"),
        ("verify --json {0}/report.json", "report.json"),
    ],
)
def test_a_special_file_in_the_way_is_refused_before_the_work(words, special, tmp_path, capsys, monkeypatch):
    runs = []
    for module, name in (
        (train, "run"),
        (bench_layer, "run"),
        (bench_overlap, "run"),
        (calibrate, "run"),
        (plan, "asked"),
        (train, "_corpus"),
        (verify, "check"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: runs.append(1))
    path = fifo_at(tmp_path / special)
    assert cli.main(words.format(tmp_path).split()) == 2 and not runs
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and "egular file" in said
    assert path.is_fifo() and not list(tmp_path.rglob("*.tmp"))


def test_a_folder_in_the_way_of_the_routing_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "routing").mkdir()
    words = ["train", "--out", str(tmp_path / "out"), "--save-routing", str(tmp_path / "routing")]
    assert cli.main(words) == 2
    assert "--save-routing" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["plan --cost-model", "train --text", "bench layer --routing"])
def test_a_fifo_to_read_from_is_refused_without_waiting(option, tmp_path, capsys):
    path = fifo_at(tmp_path / "fifo")
    assert cli.main([*option.split(), str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and option.split()[-1] in said and str(path) in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/train.jsonl"), "No space left on device: out/train.js"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x"), "Permission denied: x"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
    ],
)
@pytest.mark.parametrize("command", ["info", "train"])
def test_what_the_machine_cannot_give_is_one_line(error, words, command, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(train, "_corpus", fail)
    monkeypatch.setattr("moe_overlap.commands.info.lines", fail)
    assert cli.main([command, *(["--out", str(tmp_path)] if command == "train" else [])]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said and f"moe-overlap {command}" in said


def test_our_own_errors_keep_their_traceback(monkeypatch):
    def fail(**_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("moe_overlap.commands.info.lines", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["info"])


def failing_rank(world, argv):
    if world.rank == 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    time.sleep(60)
    return 0


SPAWN = """
from moe_overlap.launch.launch import spawn
from tests.commands.test_outputs import failing_rank
raise SystemExit(spawn(failing_rank, [], 2, timeout_s=20, program="test"))
"""


def test_a_rank_that_cannot_write_says_so_in_one_line():
    """In a process of its own: ranks write where the first one that started the fork server did."""
    done = subprocess.run([sys.executable, "-c", SPAWN], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["test: error: rank 1: No space left on device: somewhere"]


def test_nobody_reads_on():
    """As behind `head`: no word, and the status of a program that a closed pipe ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "moe_overlap", "plan", "--ranks", "8", "--experts", "8", "--tokens", "64"]
    try:
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (cli.EXIT_NO_READER, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_that_nobody_takes_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "moe_overlap", "kernels"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "moe-overlap kernels: error: No space left on device"
    ], done.stderr


def _read(terminal: int, deadline: float) -> bytes:
    """What comes next on a terminal; nothing at its end. Fails where nothing comes until the deadline."""
    ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
    assert ready, "the command says nothing any more"
    try:
        return os.read(terminal, 4096)
    except OSError:  # the end: Linux says EIO
        return b""


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_is_one_line_and_130_and_the_cursor_is_back(ranks, tmp_path):
    """In a terminal, where the progress bar hides the cursor; the signal goes to all processes, as from keys."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} words of a text, " for n in range(3000)))
    words = ["train", *SIZES, "--text", str(text), "--out", str(tmp_path / "out"), "--steps", "100000"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_overlap", *words, "--ranks", str(ranks)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        # What a shell runs in the background inherits that the signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        deadline = time.monotonic() + 180
        while b"tokens/s" not in said:
            said += _read(ours, deadline)
        assert b"\x1b[?25l" in said, said
        os.killpg(process.pid, signal.SIGINT)
        deadline = time.monotonic() + 120
        while part := _read(ours, deadline):
            said += part
        assert process.wait(30) == 130, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(ours)
    assert b"Traceback" not in said and b"moe-overlap train: interrupted" in said, said[-2000:]
    assert said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l"), "the cursor is shown again"
