"""Tests that need a GPU; `make gpu` runs them (pytest -m gpu tests/gpu).

A test that checks a kernel of one operator in one dtype carries `covers(op, dtype)`, or `covers(op, dtype, "triton")`
for another implementation than "cuda". With `--gpu-record FILE` the session writes what it covered and whether
everything passed; benchmarks/gpu_run.py makes `verified.json` of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_overlap.ops import cuda_kernels

_covered: set[tuple[str, str, str]] = set()
"""(op, implementation, dtype)"""
_bad: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-record", type=Path, help="write what was covered, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "covers(op, dtype, implementation='cuda'): checks that kernel of op in dtype")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    report.covers = []
    for marker in item.iter_markers("covers"):
        op, dtype, *others = marker.args
        report.covers.append([op, *(others or ["cuda"]), str(dtype).removeprefix("torch.")])
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With pytest-xdist the tests run in processes of their own, and all their reports come by here in the first."""
    if report.failed:
        _bad.append(f"{report.nodeid} ({report.when})")
    elif report.when == "call" and report.passed:
        _covered.update(map(tuple, getattr(report, "covers", ())))  # tests of other folders have none


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--gpu-record", default=None)
    if path is not None and not hasattr(session.config, "workerinput"):
        path.write_text(json.dumps({"covered": sorted(_covered), "failed": _bad}), encoding="utf-8")


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """The kernels must be there: a GPU without them is a failure, not a skip."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    missing = cuda_kernels.missing()
    assert missing is None, missing
    yield
    torch.cuda.synchronize()  # an error of a kernel is of the test that started it
