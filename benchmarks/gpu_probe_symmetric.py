"""torch.distributed._symmetric_memory between processes that share one GPU (a part of gpu_probe.py).

For 2, 4 and 8 processes: rendezvous, a put into the neighbour's buffer, signal and wait, barrier with a limit, the time
of a barrier and of a small put with its signal. For 2 processes also: a stream that waits for a word of imported memory
(cuStreamWaitValue32), and, last, a barrier that the other one never reaches: is the context usable after its limit?

Every rank is a process of its own, joined with a limit and ended when it passes it.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import queue
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

WORLD_LIMIT_S, JOIN_LIMIT_S = 40.0, 5.0
WORDS = 1 << 20
SMALL_WORDS = 1024


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def join(rank: int, world: int, port: int) -> tuple[torch.Tensor, Any]:
    """This rank's symmetric buffer of int32 words and its handle."""
    import torch.distributed._symmetric_memory as symm_mem

    torch.cuda.set_device(0)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=timedelta(seconds=WORLD_LIMIT_S))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=WORLD_LIMIT_S))
    buffer = symm_mem.empty(WORDS, dtype=torch.int32, device="cuda:0")
    buffer.fill_(-1)
    return buffer, symm_mem.rendezvous(buffer, group=dist.group.WORLD)


def per_call_us(call: Callable[[], None], count: int = 200) -> float:
    call()
    torch.cuda.synchronize()
    begin_s = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return round((time.perf_counter() - begin_s) / count * 1e6, 2)


def exchange(rank: int, world: int, port: int, out: Any) -> None:
    """Each rank writes to the next one; rank 0 tells what came of it."""
    begin_s = time.perf_counter()
    buffer, handle = join(rank, world, port)
    rendezvous_s = time.perf_counter() - begin_s
    following, before = (rank + 1) % world, (rank - 1) % world
    theirs = handle.get_buffer(following, (WORDS,), torch.int32)
    mine = torch.full((SMALL_WORDS,), rank, dtype=torch.int32, device="cuda")
    theirs[:SMALL_WORDS].copy_(mine)
    handle.put_signal(following, 0, 5000)
    handle.wait_signal(before, 0, 5000)
    arrived = bool((buffer[:SMALL_WORDS] == before).all())
    handle.barrier(0, 5000)
    torch.cuda.synchronize()
    barrier_us = per_call_us(lambda: handle.barrier(0, 5000))

    def put_and_signal() -> None:
        theirs[:SMALL_WORDS].copy_(mine)
        handle.put_signal(following, 0, 5000)
        handle.wait_signal(before, 0, 5000)

    put_us = per_call_us(put_and_signal)
    handle.barrier(0, 5000)
    torch.cuda.synchronize()
    if rank == 0:
        out.put({"rendezvous_s": round(rendezvous_s, 3), "put_arrived": arrived, "barrier_us": barrier_us,
                 "put_signal_wait_us": put_us, "put_bytes": 4 * SMALL_WORDS})  # fmt: skip
    dist.barrier()


def stream_wait(rank: int, world: int, port: int, out: Any) -> None:
    """Rank 0's stream waits for a word in rank 1's memory, which rank 1 sets half a second later."""
    buffer, handle = join(rank, world, port)
    imported = handle.get_buffer(1, (WORDS,), torch.int32)
    buffer.zero_()
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 1:
        time.sleep(0.5)
        buffer[3:4].fill_(9)
        torch.cuda.synchronize()
    else:
        driver = ctypes.CDLL("libcuda.so.1")
        stream, done = torch.cuda.Stream(), torch.cuda.Event()
        address = ctypes.c_uint64(imported.data_ptr() + 4 * 3)
        at_least = ctypes.c_uint(0)
        status = driver.cuStreamWaitValue32_v2(
            ctypes.c_void_p(stream.cuda_stream), address, ctypes.c_uint32(9), at_least
        )
        done.record(stream)
        begin_s, waited = time.monotonic(), done.query()
        while status == 0 and not done.query() and time.monotonic() - begin_s < 10:
            time.sleep(0.001)
        out.put({"status": status, "passed_at_once": waited, "released": done.query(),
                 "seconds": round(time.monotonic() - begin_s, 3)})  # fmt: skip
    dist.barrier()


def lone_barrier(rank: int, world: int, port: int, out: Any) -> None:
    """Rank 0 stands at a barrier that rank 1 never reaches."""
    _, handle = join(rank, world, port)
    if rank == 0:
        row: dict[str, object] = {}
        begin_s = time.monotonic()
        try:
            handle.barrier(0, 500)
            torch.cuda.synchronize()
            row["barrier"] = "returned without an error"
        except Exception as error:
            row["barrier"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        row["seconds"] = round(time.monotonic() - begin_s, 3)
        try:
            row["context_usable"] = bool((torch.ones(8, device="cuda").sum() == 8).item())
        except Exception:
            row["context_usable"] = False
        out.put(row)
    else:
        time.sleep(3)


def enter(body: Callable[..., None], rank: int, size: int, port: int, out: Any) -> None:
    """body on this rank; an error is an answer, too."""
    status = 0
    try:
        body(rank, size, port, out)
    except BaseException as error:
        out.put({"result": f"not run: rank {rank}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        status = 1
    out.close()
    out.join_thread()  # the answer has left this process
    os._exit(status)  # the context may be broken: no clean-up that could hang


def world(body: Callable[..., None], size: int) -> dict[str, Any]:
    """Run body on `size` ranks; rank 0's answer, or why there is none."""
    context = mp.get_context("spawn")
    out, port = context.Queue(), free_port()
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # before the children start
    ranks = [context.Process(target=enter, args=(body, rank, size, port, out), daemon=True) for rank in range(size)]
    for rank in ranks:
        rank.start()
    answer: dict[str, Any] = {}
    end_s = time.monotonic() + WORLD_LIMIT_S
    while not answer:
        states = [rank.exitcode for rank in ranks]
        over = time.monotonic() > end_s or any(states) or None not in states
        try:
            answer = out.get(timeout=0.5)
        except queue.Empty:
            if over:  # and nothing came after that
                answer = {"result": f"not run: no answer in {WORLD_LIMIT_S:.0f} s, exit codes {states}"}
    for rank in ranks:
        rank.join(JOIN_LIMIT_S)
        if rank.is_alive():
            rank.kill()
            rank.join(JOIN_LIMIT_S)
    return answer


def probe(row: Callable[..., None], end_s: float) -> None:
    """One row for each world and question."""
    questions = [("symmetric memory", exchange, size) for size in (2, 4, 8)]
    questions += [("cuStreamWaitValue32 on imported memory", stream_wait, 2)]
    questions += [("symmetric barrier that one rank never reaches", lone_barrier, 2)]
    for what, body, size in questions:
        if time.monotonic() > end_s:
            row(what=what, processes=size, result="not run: the time is over")
        else:
            row(what=what, processes=size, **world(body, size))
