"""Ranks that a command starts in this process are forked with the package loaded, as those of `tests.ranks` are."""

from __future__ import annotations

import pytest

from tests.ranks import start_fork_server


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    start_fork_server()
