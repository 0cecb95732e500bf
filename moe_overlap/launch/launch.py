"""One world of ranks: this process alone, ranks that this process spawns, or those of torchrun.

`spawn` runs a function in new processes of this machine; when one of them ends badly, all end, and none outlives the
process that spawned it. The key-value store lives in the parent: no race for a port, and it survives any rank.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, process
from typing import cast

import torch
import torch.distributed as dist

from moe_overlap import config
from moe_overlap.errors import ConfigError
from moe_overlap.launch.saying import EXIT_BAD_INPUT, EXIT_INTERRUPTED, complaint, one_line, print_anything
from moe_overlap.launch.stopping import STOP

LOOPBACK = "127.0.0.1"
MOST_RANKS = 1024
GRACE_S = 5.0
SAVE_S = 60.0  # for ranks that were interrupted to end their step and save
START_LIMIT_S = 120.0
SHOW_CURSOR = "\x1b[?25h"  # for a terminal


@dataclass(frozen=True, kw_only=True)
class World:
    """This rank's place. `group` is None for one rank: then nothing communicates."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; the order of the additions depends on the shape only."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of every rank, in rank order; all have the same shape and dtype."""
        if self.group is None:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.group)
        return parts

    def gather_text(self, text: str) -> list[str]:
        """The text of every rank, in rank order; lengths may differ."""
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        lengths = [int(length) for length in self.gather(torch.tensor([data.numel()]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = self.gather(padded)
        return [bytes(part[:length].numpy()).decode().strip() for part, length in zip(parts, lengths, strict=True)]


def torchrun_world_size() -> int | None:
    """World size when torchrun started this process, else None."""
    if not dist.is_torchelastic_launched():
        return None
    size = config.torchrun("WORLD_SIZE")
    if size is None:
        raise ConfigError("WORLD_SIZE", "no number", "the number of ranks, as torchrun gives it")
    return size


def _backend(cuda: bool) -> str:
    """gloo, and NCCL beside it where rows are on CUDA devices."""
    return "cpu:gloo,cuda:nccl" if cuda else "gloo"


def join_torchrun(timeout_s: float, *, cuda: bool = False) -> World:
    """Join the world that torchrun made. The caller destroys the process group when done."""
    dist.init_process_group(_backend(cuda), timeout=timedelta(seconds=timeout_s))
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=dist.get_node_local_rank(0),
        group=dist.group.WORLD,
    )


RankMain = Callable[[World, Sequence[str]], int]


def run(main: RankMain, argv: Sequence[str], ranks: int, *, timeout_s: float, program: str, cuda: bool = False,
        saves: bool = False) -> int:  # fmt: skip
    """Run `main(world, argv)` on torchrun's ranks where torchrun started this process, else here for one rank, else in
    new processes; the exit status. `cuda`: the group has NCCL too. `saves`: `main` ends by itself when interrupted."""
    if torchrun_world_size() is not None:
        world = join_torchrun(timeout_s, cuda=cuda)
        try:
            return main(world, argv)
        finally:
            dist.destroy_process_group()
    if ranks == 1:
        return main(World(), argv)
    if ranks > MOST_RANKS:
        raise ConfigError("--ranks", ranks, f"at most {MOST_RANKS} on one machine (torchrun starts them on several)")
    return spawn(main, argv, ranks, timeout_s=timeout_s, program=program, cuda=cuda, saves=saves)


def spawn(
    main: RankMain, argv: Sequence[str], ranks: int, *, timeout_s: float, program: str, cuda: bool = False,
    saves: bool = False,
) -> int:  # fmt: skip
    """Run `main(world, argv)` in `ranks` new processes on this machine; the first non-zero exit status, else 0.

    When one rank ends badly the others get a few seconds to say so themselves and are then ended. No process outlives
    this call, nor this process. `saves`: ranks that are interrupted get SAVE_S to end by themselves, with the status
    EXIT_INTERRUPTED; else, and when interrupted again, they are ended. `program` begins the line on
    stderr that tells of a rank ended by a signal.
    """
    store = dist.TCPStore(LOOPBACK, 0, ranks + 1, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    children = [
        context.Process(
            target=_child,
            args=(main, tuple(argv), rank, ranks, store.port, timeout_s, cuda, program),
            name=f"rank {rank}",
            daemon=True,
        )
        for rank in range(ranks)
    ]
    try:
        for child in children:
            child.start()
        try:
            return _watch(children, program)
        except KeyboardInterrupt:
            if not saves or not _end_by_themselves(children):
                raise
            return EXIT_INTERRUPTED
    finally:
        _end(children)
        if sys.stderr.isatty():  # a rank that was ended may have had a progress bar there
            sys.stderr.write(SHOW_CURSOR)
            sys.stderr.flush()


def _watch(children: Sequence[process.BaseProcess], program: str) -> int:
    """Wait for all children, or for the first failure and then GRACE_S more."""
    running = {child.sentinel: child for child in children}
    failed: process.BaseProcess | None = None
    while running:
        ended = connection.wait(list(running), timeout=GRACE_S if failed else None)
        if failed and not ended:
            break
        for sentinel in ended:
            child = running.pop(cast(int, sentinel))
            child.join()
            if child.exitcode and failed is None:
                failed = child
    if failed is None:
        return 0
    code = failed.exitcode or 1
    if code < 0:
        print(f"{program}: {failed.name} was ended by signal {-code}", file=sys.stderr, flush=True)
        return 1
    return code


def _end_by_themselves(children: Sequence[process.BaseProcess]) -> bool:
    """Ask the ranks to stop and wait; whether all said that they did. By a signal of its own: a terminal has sent
    SIGINT to all of them already, and a second one breaks them off. Ranks that do not listen, before their loop and
    after it, end of it."""
    for child in children:
        if child.pid is not None and child.is_alive():
            os.kill(child.pid, STOP)
    until_s = time.monotonic() + SAVE_S
    for child in children:
        child.join(max(0.0, until_s - time.monotonic()))
    return all(child.exitcode == EXIT_INTERRUPTED for child in children)


def _end(children: Sequence[process.BaseProcess]) -> None:
    for end in ("terminate", "kill"):
        alive = [child for child in children if child.pid is not None and child.is_alive()]
        for child in alive:
            getattr(child, end)()
        for child in alive:
            child.join(GRACE_S)


def _child(
    main: RankMain, argv: Sequence[str], rank: int, ranks: int, port: int, timeout_s: float, cuda: bool, program: str
) -> None:
    # Ctrl-C reaches all; the parent says so and ends its ranks, unless `main` listens to it (`stopping`).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print_anything()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    config.listen_on_loopback()
    store = dist.TCPStore(LOOPBACK, port, is_master=False, timeout=timedelta(seconds=START_LIMIT_S))
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group(_backend(cuda), store=store, rank=rank, world_size=ranks, timeout=limit)
    status = 1
    try:
        status = main(World(rank=rank, size=ranks, local_rank=rank, group=dist.group.WORLD), argv)
    except KeyboardInterrupt:
        status = 1  # broken off: the parent says so
    except Exception as error:
        text = complaint(error)
        if text is None:
            raise
        print(f"{program}: error: rank {rank}: {one_line(text)}", file=sys.stderr, flush=True)
        status = EXIT_BAD_INPUT
    finally:
        if status == 0:
            dist.destroy_process_group()
    raise SystemExit(status)


def _die_with_parent() -> None:
    """End this process when the one that spawned it is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
