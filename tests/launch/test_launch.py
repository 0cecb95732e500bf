"""Ranks that a command spawns: their exit statuses, and that none of them hangs or is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_overlap.launch.launch import GRACE_S, World, spawn

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0


def add_up(world, argv):
    """Exit status 0 when the ranks can talk to each other and received their arguments."""
    total = world.sum_(torch.tensor([world.rank + 1.0]))
    parts = world.gather(torch.tensor([world.rank]))
    agreed = total.item() == 3.0 and [part.item() for part in parts] == [0, 1] and list(argv) == ["a", "b"]
    return 0 if agreed else 1


def exit_with_its_rank(world, argv):
    return 7 * world.rank


def raise_on_rank_1(world, argv):
    if world.rank == 1:
        raise RuntimeError("on purpose")
    time.sleep(LIMIT_S)
    return 0


def be_killed_while_the_other_waits(world, argv):
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LIMIT_S)
    return 0


def be_killed_in_a_collective(world, argv):
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()
    return 0


def write_pid_and_sleep(world, argv):
    (Path(argv[0]) / f"pid-{world.rank}").write_text(str(os.getpid()))
    time.sleep(LIMIT_S)
    return 0


def start(function, *argv):
    return spawn(function, argv, 2, timeout_s=20, program="test")


def test_ranks_talk_and_end_with_status_0():
    assert start(add_up, "a", "b") == 0


def test_the_first_failure_is_the_status():
    assert start(exit_with_its_rank) == 7


@pytest.mark.parametrize("function", [raise_on_rank_1, be_killed_while_the_other_waits, be_killed_in_a_collective])
def test_a_dead_rank_ends_the_others(function, capfd):
    began_s = time.monotonic()
    assert start(function) == 1
    assert time.monotonic() - began_s < GRACE_S + 100
    if function is be_killed_while_the_other_waits:
        assert "test: rank 1 was ended by signal 9" in capfd.readouterr().err


def test_ranks_do_not_outlive_the_process_that_spawned_them(tmp_path):
    program = (
        "import sys; sys.path.insert(0, 'tests/launch'); from test_launch import start, write_pid_and_sleep\n"
        f"if __name__ == '__main__': start(write_pid_and_sleep, {str(tmp_path)!r})"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/launch")])}
    parent = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, env=environment)
    try:
        files = [tmp_path / f"pid-{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [int(file.read_text()) for file in files]
        assert all(map(is_alive, pids))
    finally:
        parent.kill()
        parent.wait(10)
    wait_until(lambda: not any(map(is_alive, pids)))


def wait_until(condition):
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.05)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_rank_needs_no_group():
    world = World()
    world.barrier()
    tensor = torch.tensor([2.0])
    assert world.sum_(tensor) is tensor and world.gather(tensor) == [tensor]
