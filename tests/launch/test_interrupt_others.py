"""Ctrl-C of commands that save nothing: one line, exit status 130, no traceback, and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0
SIZES = "--tokens 64 --hidden 64 --ffn 64 --repeats 100000".split()
COMMANDS = {
    "bench ops": [*SIZES, "--experts", "4", "--compile", "off"],
    "bench layer": [*SIZES, "--experts", "4", "--ranks", "2", "--cases", "top2", "--schedules", "serial"],
}


def interruptible():
    """A process that is started in the background ignores SIGINT, and those that it starts do too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(words, out, all_processes):
    """(exit status, stderr) of a command that is interrupted when it has said its first line on stderr. all_processes:
    as a terminal does it."""
    command = [sys.executable, "-m", "moe_overlap", *words, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, cwd=out, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True, start_new_session=True, preexec_fn=interruptible) as process:  # fmt: skip
        late = threading.Timer(LIMIT_S, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        assert process.stderr is not None
        first = process.stderr.readline()
        if all_processes:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        process.wait()
        late.cancel()
    return process.returncode, first + rest


@pytest.mark.parametrize("all_processes", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_one_line_and_130(command, all_processes, tmp_path):
    status, said = interrupted([*command.split(), *COMMANDS[command]], tmp_path, all_processes)
    assert status == 130, said
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if "interrupted" in line] == [f"moe-overlap {command}: interrupted"], (
        said
    )
