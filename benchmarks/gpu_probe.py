"""What the GPU at hand can do, as JSON rows: the answers that later designs need. Nothing of the package is measured.

    python benchmarks/gpu_probe.py [--out FILE] [--sustained-s 60] [--only limits]

Copy bandwidth and bf16 matmul rate; pinned transfers one way and both ways; copy engines, and whether copies on the
device use them; a put kernel with 4 to 32 blocks and the matmul beside it; waits with a limit on the device; symmetric
memory between processes that share this GPU (gpu_probe_symmetric.py); and in the time that is left the sustained matmul
rate with its clocks. A probe that cannot run is a row with the reason.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_process, gpu_timing  # noqa: E402

SOURCE = Path(__file__).with_suffix(".cu")
Row = Callable[..., None]


class Probe:
    """The library of gpu_probe.cu, compiled for this GPU. Raises RuntimeError with the compiler's words."""

    def __init__(self, folder: Path) -> None:
        major, minor = torch.cuda.get_device_capability(0)
        target = folder / "libprobe.so"
        command = [gpu_process.find_tool("nvcc") or "nvcc", "-O2"]
        command += [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}", "-shared"]
        done = subprocess.run([*command, "-Xcompiler", "-fPIC", str(SOURCE), "-o", str(target)],
                              capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"nvcc: {done.stderr[:300]}")
        self.library = ctypes.CDLL(str(target))

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        if status != 0:
            raise RuntimeError(f"{name}: CUDA error {status}")

    def occupy(self, blocks: int, seconds: float) -> None:
        self.call("probe_occupy", ctypes.c_int(blocks), ctypes.c_uint64(int(seconds * 1e9)))

    def put(self, source: torch.Tensor, target: torch.Tensor, blocks: int) -> None:
        pointers = ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(target.data_ptr())
        self.call("probe_put", *pointers, ctypes.c_int64(source.nbytes), ctypes.c_int(blocks))

    def wait(self, flag: torch.Tensor, value: int, seconds: float, result: torch.Tensor) -> None:
        self.call("probe_wait", ctypes.c_void_p(flag.data_ptr()), ctypes.c_uint32(value),
                  ctypes.c_uint64(int(seconds * 1e9)), ctypes.c_void_p(result.data_ptr()))  # fmt: skip


def matmul(size: int = 8192) -> Callable[[], torch.Tensor]:
    """One bf16 product of random numbers: zeros run faster and say nothing."""
    a, b = (torch.randn(size, size, device="cuda").to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def limits(row: Row) -> None:
    row(what="copy on the device, read + written", bytes_per_s=round(gpu_timing.copy_bytes_per_s()))
    row(what="bf16 matmul 8192, short", flop_per_s=round(2 * 8192**3 / gpu_timing.once(matmul()).median_s))


def sustained(row: Row, most_s: float) -> None:
    multiply, flop, count = matmul(), 2 * 8192**3, 1000
    begin_s, rates, seen = time.monotonic(), [], []
    while time.monotonic() - begin_s < most_s:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            multiply()
        end.record()
        seen.append(gpu_process.clocks())  # while they run: a chip without work changes its clocks
        end.synchronize()
        rates.append(count * flop / (begin.elapsed_time(end) * 1e-3))
    if rates:
        row(what="bf16 matmul 8192, sustained", seconds=round(time.monotonic() - begin_s, 1), least=round(min(rates)),
            flop_per_s=round(rates[-1]), first=round(rates[0]), clocks_then=seen[:: len(seen) // 6 or 1])  # fmt: skip


def pinned(row: Row) -> None:
    size = 1 << 30
    host = [torch.empty(size, dtype=torch.int8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(size, dtype=torch.int8, device="cuda") for _ in range(2)]
    to_device, to_host = torch.cuda.Stream(), torch.cuda.Stream()

    def down() -> None:
        device[0].copy_(host[0], non_blocking=True)

    def up() -> None:
        host[1].copy_(device[1], non_blocking=True)

    def both() -> None:
        here = torch.cuda.current_stream()
        for stream, copy in ((to_device, down), (to_host, up)):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                copy()
            here.wait_stream(stream)

    for name, call, moved in (
        ("host to device", down, size),
        ("device to host", up, size),
        ("both ways", both, 2 * size),
    ):
        row(what=f"pinned memory, {name}", bytes_per_s=round(moved / gpu_timing.once(call, repeats=5).median_s))


def copy_engines(row: Row, probe: Probe) -> None:
    """A copy that ends while every multiprocessor is held by another kernel did not need one."""
    row(what="asyncEngineCount", count=probe.library.probe_async_engines(0))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    source = torch.randint(0, 100, (64 << 20,), dtype=torch.int8, device="cuda")
    pinned_host = torch.empty(source.shape, dtype=torch.int8, pin_memory=True)
    copies = {"on the device": torch.empty_like(source), "device to pinned host": pinned_host}
    for name, target in copies.items():
        side, copied = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
        begin, held = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        begin.record()
        side.wait_event(begin)
        probe.occupy(2 * processors, 0.05)  # two blocks of 1024 threads are all that one holds
        held.record()
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)
            copied.record()
        torch.cuda.synchronize()
        row(what=f"copy {name} while all multiprocessors are held", copied_after_ms=begin.elapsed_time(copied),
            released_after_ms=begin.elapsed_time(held),
            uses_copy_engine=begin.elapsed_time(copied) < begin.elapsed_time(held))  # fmt: skip


def put_beside_matmul(row: Row, probe: Probe) -> None:
    """Bandwidth of a copy with few blocks, alone and beside a matmul, and what the matmul loses."""
    source = torch.randint(0, 100, (1 << 30,), dtype=torch.int8, device="cuda")
    target, multiply, side = torch.empty_like(source), matmul(), torch.cuda.Stream()
    alone_s = gpu_timing.once(multiply).median_s
    for blocks in (4, 8, 16, 24, 32):
        put_s = gpu_timing.once(lambda blocks=blocks: probe.put(source, target, blocks)).median_s
        count = max(4, round(put_s / alone_s))  # about as long as the put

        def together(blocks: int = blocks, count: int = count) -> None:
            here = torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                probe.put(source, target, blocks)
            for _ in range(count):
                multiply()
            # The put may be the longer one: not waited for, so that the time is the matmuls'.

        beside_s = gpu_timing.once(together, repeats=5).median_s / count
        torch.cuda.synchronize()
        row(what="put kernel", blocks=blocks, bytes_per_s=round(source.nbytes / put_s),
            matmul_alone_us=round(alone_s * 1e6, 1), matmul_beside_us=round(beside_s * 1e6, 1),
            matmul_slowdown=round(beside_s / alone_s, 3))  # fmt: skip


def bounded_waits(row: Row, probe: Probe) -> None:
    """A kernel that waits for a flag with a limit: does the context live on when the limit is reached?"""
    flag, result = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2))
    flag.fill_(0)  # loads this kernel: that would have to wait for one that is running
    probe.wait(flag, 7, 0.2, result)
    torch.cuda.synchronize()
    ended = result.item()
    usable = bool((torch.ones(1000, device="cuda").sum() == 1000).item())
    row(what="device wait with a limit, flag never set", result=ended, expected=2, context_usable=usable)
    side = torch.cuda.Stream()
    probe.wait(flag, 7, 5.0, result)
    with torch.cuda.stream(side):
        flag.fill_(7)
    begin_s = time.monotonic()
    torch.cuda.synchronize()
    row(what="device wait with a limit, flag set by another stream", result=result.item(), expected=1,
        seconds=round(time.monotonic() - begin_s, 4))  # fmt: skip


def guarded(row: Row, name: str, call: Callable[[], None], end_s: float) -> None:
    if time.monotonic() > end_s:
        row(what=name, result="not run: the time is over")
        return
    try:
        call()
    except Exception as error:  # the probes after it still have answers to give
        row(what=name, result=f"not run: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def main(argv: Sequence[str] | None = None) -> int:
    found = gpu_timing.options(__doc__.splitlines()[0], argv, sustained_s=60.0, only="")
    results = gpu_timing.Results(found.out)

    def row(**values: object) -> None:
        results.row(kind="probe", **values)

    if found.only == "limits":
        limits(row)
        return 0

    def symmetric() -> None:
        from benchmarks import gpu_probe_symmetric

        gpu_probe_symmetric.probe(row, found.end_s)

    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        built: list[Probe] = []
        guarded(row, "limits", lambda: limits(row), found.end_s)
        guarded(row, "pinned memory", lambda: pinned(row), found.end_s)
        guarded(row, "compile gpu_probe.cu", lambda: built.append(Probe(Path(folder))), found.end_s)
        for name, part in (("copy engines", copy_engines), ("put kernel", put_beside_matmul), ("waits", bounded_waits)):
            if built:
                guarded(row, name, lambda part=part: part(row, built[0]), found.end_s)
        guarded(row, "symmetric memory", symmetric, found.end_s)
    # Last, as the others have their answers sooner; as long as there is time.
    left_s = min(found.sustained_s, found.end_s - time.monotonic())
    guarded(row, "bf16 matmul 8192, sustained", lambda: sustained(row, left_s), found.end_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
