"""Ctrl-C: one line, exit status 130, no traceback; `train` leaves a checkpoint from which it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_overlap.launch.stopping import STOP, interruptible, stopping

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SIZES = "--batch 4 --seq 32 --layers 2 --hidden 32 --ffn 48 --experts 4 --vocab 300 --threads 1 --steps 1000000".split()


def interruptible_by_a_signal():
    """A process that is started in the background ignores SIGINT, and those that it starts do too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted_after_a_step(out, *words, event="step", all_processes=False, launcher=()):
    """(exit status, stderr) of a training run that is interrupted once it has logged an event. all_processes: as a
    terminal does it."""
    log = out / "train.jsonl"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    command = [sys.executable, *launcher, "-m", "moe_overlap", "train", *SIZES, "--out", str(out), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, cwd=out, stderr=subprocess.PIPE, text=True,
                          start_new_session=True, preexec_fn=interruptible_by_a_signal) as process:  # fmt: skip
        until_s = time.monotonic() + LIMIT_S
        while time.monotonic() < until_s and process.poll() is None:
            if log.exists() and f'"{event}", ' in "".join(log.read_text().splitlines(keepends=True)[before:]):
                break
            time.sleep(0.05)
        if all_processes:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number} of a text that is long enough\n" for number in range(3000)))
    return path


@pytest.mark.parametrize("all_processes", [False, True])
def test_an_interrupted_run_goes_on_from_its_folder(tmp_path, text, all_processes):
    status, said = interrupted_after_a_step(tmp_path, "--text", str(text), "--ranks", "2", all_processes=all_processes)
    assert status == 130 and "Traceback" not in said
    lines = [line for line in said.splitlines() if "interrupted" in line]
    assert len(lines) == 1 and f"--resume {tmp_path}" in lines[0]
    status, said = interrupted_after_a_step(tmp_path, "--text", str(text), "--ranks", "1", "--resume", str(tmp_path))
    assert status == 130 and "Traceback" not in said
    assert "on 1 rank(s); it was saved on 2" in said.splitlines()[0]
    events = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == list(range(len(steps))), "the second run begins where the first one ended"


def test_under_torchrun_the_ranks_save_and_say_one_line(tmp_path, text):
    """torchrun itself ends with 1 and a traceback, of its own."""
    status, said = interrupted_after_a_step(tmp_path, "--text", str(text), all_processes=True, launcher=TORCHRUN)
    assert status == 1 and said.count("Traceback") == 1 and "SignalException" in said.splitlines()[-1]
    assert str(ROOT / "moe_overlap") not in said, "no frame of ours"
    lines = [line for line in said.splitlines() if "interrupted" in line]
    assert len(lines) == 1 and f"--resume {tmp_path}" in lines[0]
    events = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "interrupted"
    assert (tmp_path / "checkpoints" / f"step-{events[-1]['step']:06d}").is_dir()


TRAINS_A_TOKENIZER = """
import sys, time
from moe_overlap.commands import cli
from moe_overlap.commands.train import text

def as_compiled_code(*_):
    print("training", file=sys.stderr, flush=True)
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s:
        try:
            time.sleep(1)
        except KeyboardInterrupt:
            print("heard by nobody", file=sys.stderr, flush=True)

text._train_and_encode = as_compiled_code
sys.exit(cli.main(sys.argv[1:]))
"""


def test_while_a_tokenizer_is_trained(tmp_path, text):
    command = [sys.executable, "-c", TRAINS_A_TOKENIZER, "train", "--text", str(text), "--out", str(tmp_path / "out")]
    command += "--ranks 1 --batch 1 --seq 32".split()
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
                          preexec_fn=interruptible_by_a_signal) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline() == "training\n"
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, rest) == (130, "moe-overlap train: interrupted\n")


@pytest.mark.parametrize("taken_by", ["any thread", "the thread at work"])
def test_work_that_hears_nothing_is_left_behind(taken_by):
    """A signal for the process may be taken by any of its threads: then it ends no wait of the main thread's."""
    release, over = threading.Event(), threading.Event()

    def work():
        try:
            if taken_by == "any thread":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            release.wait(LIMIT_S)
        except KeyboardInterrupt:  # as of a call that ends by itself
            return
        finally:
            over.set()

    with pytest.raises(KeyboardInterrupt):
        interruptible(work)
    assert not over.is_set()
    release.set()
    assert over.wait(LIMIT_S)


def test_work_gives_what_it_returns_and_raises_what_it_raises():
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_a_run_that_compares_is_broken_off_and_says_so(tmp_path, text):
    words = ("--text", str(text), "--ranks", "2", "--compare-overlap")
    status, said = interrupted_after_a_step(tmp_path, *words, all_processes=True)
    assert status == 130 and "Traceback" not in said
    assert sum("interrupted" in line for line in said.splitlines()) == 1


def test_a_parent_may_ask_after_a_terminal_did():
    with stopping() as stop:
        for number in (signal.SIGINT, STOP, STOP):
            signal.raise_signal(number)
            assert stop.asked


def test_the_first_interrupt_asks_and_the_second_one_breaks_off():
    before = signal.getsignal(signal.SIGINT)
    with stopping() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
