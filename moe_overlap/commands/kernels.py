"""`moe-overlap kernels`: what the compiler gave each CUDA kernel, without a GPU.

Registers, spills, stack and static shared memory as ptxas reported them while this package was built, and the
theoretical occupancy that follows: warps that fit on a multiprocessor over the warps it can hold, for blocks of the
size a kernel is bounded to and without dynamic shared memory. Without a build with nvcc it is the committed table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_overlap.measure.files import write_atomically
from moe_overlap.native import build_info, native

BUILT = native.PACKAGE_DIR / "_kernels.json"
COMMITTED = native.PACKAGE_DIR / "kernel_resources.json"

WARP = 32


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, table of compute capabilities)."""

    warps: int
    blocks: int
    registers: int
    shared_bytes: int


CHIPS = {
    "sm_80": Chip(warps=64, blocks=32, registers=65536, shared_bytes=164 << 10),
    "sm_90": Chip(warps=64, blocks=32, registers=65536, shared_bytes=228 << 10),
    "sm_100": Chip(warps=64, blocks=32, registers=65536, shared_bytes=228 << 10),
}
# Registers are handed out to a warp 256 at a time, on one of the four parts of a multiprocessor; shared memory in units
# of 128 bytes, and each block needs 1 KiB for the system.
_REGISTER_UNIT, _PARTS, _SHARED_UNIT, _SYSTEM_BYTES = 256, 4, 128, 1024


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture. threads: the most of a block (None: not bounded). All else as ptxas says."""

    source: str
    kernel: str
    arch: str
    threads: int | None
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int

    def occupancy(self) -> float | None:
        """Between 0 and 1; None for a kernel without a bound or a chip we have no limits of."""
        chip = CHIPS.get(self.arch)
        if chip is None or self.threads is None:
            return None
        warps = -(-self.threads // WARP)
        per_warp = -(-self.registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
        by_registers = chip.registers // _PARTS // per_warp * _PARTS // warps if per_warp else chip.blocks
        shared = -(-self.shared_bytes // _SHARED_UNIT) * _SHARED_UNIT + _SYSTEM_BYTES
        return min(chip.blocks, chip.warps // warps, by_registers, chip.shared_bytes // shared) * warps / chip.warps


@dataclass(frozen=True)
class Report:
    """The kernels and the version of the compiler they were built with."""

    nvcc: str
    kernels: tuple[Resources, ...]


def read(path: Path) -> Report | None:
    """A saved report, or None where there is none."""
    if not path.is_file():
        return None
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Report(str(raw["nvcc"]), tuple(Resources(**row) for row in raw["kernels"]))


def write(report: Report, path: Path) -> None:
    """Save in the form of the committed table: one line for each kernel and architecture, so that a diff shows it."""
    rows = ",\n".join(f"    {json.dumps(asdict(row))}" for row in report.kernels)
    write_atomically(path, f'{{\n  "nvcc": "{report.nvcc}",\n  "kernels": [\n{rows}\n  ]\n}}\n'.encode())


def lines(report: Report) -> list[str]:
    """The table, one kernel and architecture a line."""
    width = max((len(row.kernel) for row in report.kernels), default=6)
    head = f"{'kernel':{width}}  {'arch':6}  block  regs  spills B  stack B  shared B  occupancy"
    text = [head]
    source = ""
    for row in report.kernels:
        if row.source != source:
            source = row.source
            text.append(f"{source}:")
        full = row.occupancy()
        text.append(
            f"{row.kernel:{width}}  {row.arch:6}  {row.threads or '-':>5}  {row.registers:4}  "
            f"{row.spill_store_bytes + row.spill_load_bytes:8}  {row.stack_bytes:7}  {row.shared_bytes:8}  "
            + (f"{full:8.0%}" if full is not None else "       -")
        )
    return text


def main(argv: Sequence[str]) -> int:
    """The command. Exit status 1 where there is nothing to print."""
    from moe_overlap.commands.parser import OneLineParser, check_output

    parser = OneLineParser(prog="moe-overlap kernels", description=__doc__)
    parser.add_argument("--write", metavar="FILE", help="save the report of this build as a table")
    options = parser.parse_args(argv)
    if options.write is not None:
        check_output("--write", options.write)
    report = read(BUILT)
    if report is None:
        none = f"no CUDA kernels in this install: {build_info.why_not_built('cuda')}"
        if options.write is not None:
            parser.error(f"--write: {none}")
        print(none)
        report = read(COMMITTED)
        if report is None:
            return 1
        print(f"the committed table, from nvcc {report.nvcc}:")
    else:
        print(f"built here with nvcc {report.nvcc}:")
    if options.write is not None:
        write(report, Path(options.write))
    print("\n".join(lines(report)))
    return 0
