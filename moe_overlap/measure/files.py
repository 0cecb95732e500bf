"""Files that are whole or not there, and that nobody waits for.

What is written goes to a temporary file beside its target, is synced and renamed. A target that is there already has to
be a regular file: a rename over a device node, a FIFO or a socket would take it away from all who use it. What is read
has to be one as well, and of a bounded size: a FIFO would block for ever.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whose folder is made: a reader, or a run after a crash, sees the old file or the new one,
    never a part. A symbolic link stays one. OSError where that cannot be, and for a target that is no regular file."""
    target = _target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(_beside(target))
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # The rename itself must survive a power cut.
    finally:
        os.close(folder)


def check_writable(path: Path) -> None:
    """OSError (ValueError for a name that cannot be) where `write_atomically` would fail; leaves only the folder."""
    target = _target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    probe = target.with_name(_beside(target))
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    probe.unlink()


def read_regular(path: Path, *, most_bytes: int) -> bytes:
    """The bytes of a regular file, or of what a link leads to. OSError for all else and for a larger file; no wait."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        _require_regular(path, os.fstat(descriptor))
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes} bytes", str(path))
    return data


def _target(path: Path) -> Path:
    """Where a file called `path` is written; OSError where something stands that is no regular file."""
    target = Path(os.path.realpath(path))
    try:
        _require_regular(path, target.stat())
    except FileNotFoundError:
        if not path.name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None
    return target


def _require_regular(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def _beside(target: Path) -> str:
    """A name beside the target that nothing has."""
    return f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
