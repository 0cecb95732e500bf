"""Worlds for tests: virtual ranks in this process, and gloo ranks in processes of their own.

`gloo_pool(world).run(function, *args)` calls a module-level function once per rank, inside an initialised gloo world,
and returns the results in rank order. The ranks are reused over the session and cost 0.1 to 0.5 s to start, because a
fork server has torch loaded; the store is hosted here, so it outlives any rank. Every call has a limit, after which
the stacks of all ranks are shown and the ranks are killed. Ranks never outlive this process.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection, forkserver, get_context, parent_process
from types import TracebackType
from typing import Any

import torch.distributed as dist

from moe_overlap.transport import VirtualWorld
from moe_overlap.transport.connections import end_all

LIMIT_S = 60.0
MOST_THREADS = 48
_PR_SET_PDEATHSIG = 1


class RankError(AssertionError):
    """A rank raised, died or did not come back in time; the text has every rank's traceback or stack."""


class Ended:
    """What became of a rank: `value`, or `error` (class name) with `text`, or the `exitcode` of a dead process.
    threads: of the rank when its call had returned."""

    def __init__(
        self, *, value: Any = None, error: str = "", text: str = "", exitcode: int | None = None, threads: int = 0
    ) -> None:
        self.value, self.error, self.text, self.exitcode, self.threads = value, error, text, exitcode, threads

    def __repr__(self) -> str:
        return self.text or f"Ended(value={self.value!r}, exitcode={self.exitcode})"


def virtual_world(world_size: int, seed: int = 0) -> VirtualWorld:
    """`virtual_world(W).run(fn)`: fn(me) once per rank, in this process, in an order drawn by the seed."""
    return VirtualWorld(world_size, seed)


class Ranks:
    """`world_size` processes that belong to one gloo world. A context manager: leaving it kills what is left."""

    def __init__(self, world_size: int, *, init: bool = True) -> None:
        self.world_size = world_size
        self._init = init
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._stacks: list[str] = []
        self._marked: set[int] = set()
        self._store: dist.TCPStore | None = None

    def __enter__(self) -> Ranks:
        start_fork_server()
        context = get_context("forkserver")
        self._store = dist.TCPStore(
            "127.0.0.1", 0, self.world_size + 1, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            descriptor, path = tempfile.mkstemp(prefix="moe_overlap-stack-")
            os.close(descriptor)
            process = context.Process(
                target=_rank_main,
                args=(rank, self.world_size, self._store.port, theirs, path, self._init),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
            self._stacks.append(path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, function: Callable[..., Any], *args: Any, ranks: Sequence[int] | None = None) -> None:
        """Send the call to the ranks and return."""
        self._marked.clear()
        for rank in range(self.world_size) if ranks is None else ranks:
            self._pipes[rank].send((function.__module__, function.__qualname__, args))

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        os.kill(self._processes[rank].pid, number)

    def pid(self, rank: int) -> int:
        return int(self._processes[rank].pid)

    def wait_for_marks(self, *, limit_s: float = LIMIT_S, ranks: Sequence[int] | None = None) -> None:
        """Until each of `ranks` (all) has called `mark()` since the last `start`."""
        deadline = time.monotonic() + limit_s
        while waiting := [
            rank for rank in (range(self.world_size) if ranks is None else ranks) if rank not in self._marked
        ]:
            ready = connection.wait([self._pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(self._late(waiting, {}, limit_s))
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                one = self._receive(rank)
                if one is not None:
                    raise RankError(f"rank {rank} ended before its mark: {one!r}")

    def wait(
        self, *, limit_s: float = LIMIT_S, ranks: Sequence[int] | None = None, fail_fast: bool = False
    ) -> list[Ended]:
        """What became of each rank's call. Raises RankError with all stacks when a rank is not back in time."""
        wanted = list(range(self.world_size) if ranks is None else ranks)
        ended: dict[int, Ended] = {}
        deadline = time.monotonic() + limit_s
        while len(ended) < len(wanted):
            waiting = [rank for rank in wanted if rank not in ended]
            if fail_fast and any(one.error or one.exitcode is not None for one in ended.values()):
                deadline = min(deadline, time.monotonic() + 5.0)
                fail_fast = False
            left = deadline - time.monotonic()
            if left <= 0:
                raise RankError(self._late(waiting, ended, limit_s))
            for pipe in connection.wait([self._pipes[rank] for rank in waiting], left):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                one = self._receive(rank)
                if one is not None:
                    ended[rank] = one
        return [ended[rank] for rank in wanted]

    def _receive(self, rank: int) -> Ended | None:
        """What a rank sent; None for a mark."""
        try:
            reply = self._pipes[rank].recv()
            if reply == _MARK:
                self._marked.add(rank)
                return None
            return Ended(**reply)
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(5)
            code = self._processes[rank].exitcode
            return Ended(exitcode=-255 if code is None else code, text=f"rank {rank} died, exit code {code}")

    def _late(self, waiting: list[int], ended: dict[int, Ended], limit_s: float) -> str:
        lines = [f"ranks {waiting} did not return within {limit_s} s"]
        lines += [f"--- rank {rank}: {one!r}" for rank, one in ended.items() if one.error or one.exitcode is not None]
        for rank in waiting:
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        for rank in waiting:
            with open(self._stacks[rank], encoding="utf-8", errors="replace") as file:
                lines.append(f"--- stack of rank {rank}:\n{file.read()[-6000:]}")
        return "\n".join(lines)

    def stop(self) -> None:
        """Kill what is left and wait for it."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join(5)
        for pipe in self._pipes:
            pipe.close()
        for path in self._stacks:
            if os.path.exists(path):
                os.unlink(path)
        self._processes, self._pipes, self._stacks, self._store = [], [], [], None


class GlooPool:
    """Ranks that live as long as their calls succeed; after a failure the next call starts fresh ones."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: Ranks | None = None
        self._threads = 0

    def run(self, function: Callable[..., Any], *args: Any, limit_s: float = LIMIT_S) -> list[Any]:
        """function(*args) on every rank; the results in rank order. Raises RankError when a rank raises or is late."""
        if self._ranks is None:
            self._ranks = Ranks(self.world_size).__enter__()
        try:
            self._ranks.start(function, *args)
            ended = self._ranks.wait(limit_s=limit_s, fail_fast=True)
            failed = [
                f"--- rank {rank}: {one!r}" for rank, one in enumerate(ended) if one.error or one.exitcode is not None
            ]
            if failed:
                raise RankError("\n".join(failed))
        except BaseException:
            self.close()
            raise
        self._threads = max(one.threads for one in ended)
        return [one.value for one in ended]

    def renew(self) -> None:
        """Between two tests: the next call starts fresh ranks where these are full of what tests left. A group that a
        test has made and not destroyed keeps three threads, one of which looks for work a hundred times a second."""
        if self._threads > MOST_THREADS:
            self.close()

    def close(self) -> None:
        self._threads = 0
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.stop()


def mark() -> None:
    """Called by a rank: tell the parent, which may be in `wait_for_marks`, that this point is reached."""
    assert _pipe is not None
    _pipe.send(_MARK)


def start_fork_server() -> None:
    """The process that ranks are forked from, those of `launch.spawn` too: with the package loaded, which takes longer
    than most of what they do."""
    get_context("forkserver").set_forkserver_preload(["numpy", "pytest", "moe_overlap.layer.layer"])
    forkserver.ensure_running()


_MARK = "mark"
_pipe: connection.Connection | None = None
_POOLS: dict[int, GlooPool] = {}


def renew_pools() -> None:
    """After each test (tests/conftest.py)."""
    for pool in _POOLS.values():
        pool.renew()


def gloo_pool(world_size: int) -> GlooPool:
    """The session's pool of that size."""
    if world_size not in _POOLS:
        _POOLS[world_size] = GlooPool(world_size)
        atexit.register(_POOLS[world_size].close)
    return _POOLS[world_size]


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _rank_main(rank: int, world_size: int, port: int, pipe: connection.Connection, stack_path: str, init: bool) -> None:
    """Life of a rank: join the world, then serve calls until the pipe closes."""
    global _pipe
    _pipe = pipe
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    stack_file = open(stack_path, "w", encoding="utf-8")  # open as long as the process
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size + 1, is_master=False, timeout=timedelta(seconds=60))
    if init:
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=LIMIT_S)
        )
    while True:
        try:
            module, name, args = pipe.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)
        try:
            end_all()  # a test that failed on purpose has poisoned the connections of the group
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            reply = {"value": function(*args), "threads": len(os.listdir("/proc/self/task"))}
        except BaseException as error:
            reply = {"error": type(error).__name__, "text": traceback.format_exc()}
        sys.stdout.flush()
        try:
            pipe.send(reply)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)
        except Exception as error:  # a result that cannot be sent
            pipe.send({"error": type(error).__name__, "text": f"the result of {name} cannot be sent: {error}"})
