"""What every test has: a time limit, a cache of its own, and poisoned memory for those who ask."""

from __future__ import annotations

import faulthandler
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for `from tests import ...`, however pytest was started

TIME_LIMIT_S = 1000.0  # many times what a test takes: for hangs, not for slow machines
CACHE_DIR = "MOE_OVERLAP_CACHE_DIR"
_terminal: int | None = None
_caches = ""
_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    global _terminal, _caches
    # For the processes that tests start as well: none of them finds or writes the user's calibrations.
    _caches = os.environ[CACHE_DIR] = tempfile.mkdtemp(prefix="moe_overlap-cache-")
    config.addinivalue_line("markers", f"time_limit(seconds): instead of the {TIME_LIMIT_S:.0f} s every test has")
    # Output is not captured yet: what is written here later reaches the terminal even when the process is ended.
    _terminal = os.dup(sys.__stderr__.fileno())


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_caches, ignore_errors=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of this test's calibrations; made by the first that is kept."""
    folder = Path(_caches, str(next(_numbers)))
    monkeypatch.setenv(CACHE_DIR, str(folder))
    return folder


@pytest.fixture(autouse=True)
def time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that hangs ends the run with the stacks of all threads instead of hanging it."""
    marker = request.node.get_closest_marker("time_limit")
    seconds = float(marker.args[0]) if marker else TIME_LIMIT_S
    assert _terminal is not None
    faulthandler.dump_traceback_later(seconds, exit=True, file=_terminal)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def fresh_ranks() -> Iterator[None]:
    """The next test does not run beside what too many tests before it have left in the ranks that are used again."""
    yield
    if (ranks := sys.modules.get("tests.ranks")) is not None:
        ranks.renew_pools()


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN (integers: their largest value), in torch.empty and in our pool."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
