"""Tests that need a GPU; `make gpu` runs them (pytest -m gpu tests/gpu).

A test that checks a kernel of one operator in one dtype carries `covers(op, dtype)`, or `covers(op, dtype, "triton")`
for another implementation than "cuda". `--gpu-cases FILE` writes what was collected and what it covers; `--gpu-record
FILE` writes a line for every test as it ends, so that what passed is known even where a later test takes the process
down. benchmarks/gpu_checks.py makes `verified.json` of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_overlap.ops import cuda_kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-cases", type=Path, help="write the collected tests and what they cover, as JSON")
    parser.addoption("--gpu-record", type=Path, help="write a JSON line for every test as it ends")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "covers(op, dtype, implementation='cuda'): checks that kernel of op in dtype")


def covers(item: pytest.Item) -> list[list[str]]:
    """[op, implementation, dtype] of each kernel that a test checks."""
    found = []
    for marker in item.iter_markers("covers"):
        op, dtype, *others = marker.args
        found.append([op, *(others or ["cuda"]), str(dtype).removeprefix("torch.")])
    return found


def pytest_collection_finish(session: pytest.Session) -> None:
    path = session.config.getoption("--gpu-cases", default=None)
    if path is not None:
        cases = [{"id": item.nodeid, "covers": covers(item)} for item in session.items]
        path.write_text(json.dumps(cases), encoding="utf-8")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    path = item.config.getoption("--gpu-record", default=None)
    if path is not None and (call.when == "call" or not report.passed):
        words = str(report.longrepr)[-4000:] if report.failed else ""
        row = {
            "id": item.nodeid,
            "covers": covers(item),
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
        }
        with path.open("a", encoding="utf-8") as file:  # a short line at the end: test processes may share the file
            file.write(json.dumps(row | {"text": words}) + "\n")
    return report


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test of CUDA kernels without them is a failure, not a skip. Layers and wires do without, by the other ones."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    missing = cuda_kernels.missing()
    assert missing is None or all(implementation != "cuda" for _, implementation, _ in covers(request.node)), missing
    yield
    torch.cuda.synchronize()  # an error of a kernel is of the test that started it
