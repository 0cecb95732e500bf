"""The text that the small jobs learn."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """About 100 kB of real text: some of the standard library's own sources."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("argparse.py", "json/decoder.py", "heapq.py"):
        source = Path(os.__file__).parent / name
        (folder / source.name).write_bytes(source.read_bytes())
    return folder
