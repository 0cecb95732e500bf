"""Files that are whole or not there, and special files, which are neither written over nor waited for."""

from __future__ import annotations

import os
import stat

import pytest

from moe_overlap.measure import files
from moe_overlap.measure.files import check_writable, read_regular, write_atomically


def special(tmp_path, kind):
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "link to a fifo":
        os.mkfifo(tmp_path / "target")
        path.symlink_to(tmp_path / "target")
    else:
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "below"
    return path


KINDS = ["fifo", "folder", "loop", "link to a fifo", "below a file"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", [lambda path: write_atomically(path, b"new"), check_writable])
def test_what_is_no_file_is_not_written_over(tmp_path, kind, use):
    path = special(tmp_path, kind)
    before = {one.name: stat.S_IFMT(one.lstat().st_mode) for one in tmp_path.iterdir()}
    with pytest.raises(OSError):
        use(path)
    assert {one.name: stat.S_IFMT(one.lstat().st_mode) for one in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_not_read_nor_waited_for(tmp_path, kind):
    with pytest.raises(OSError):
        read_regular(special(tmp_path, kind), most_bytes=10)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert read_regular(path, most_bytes=10) == b"0123456789"
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_regular(path, most_bytes=9)


def test_the_old_file_stays_whole_where_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file"
    write_atomically(path, b"old")
    mode = path.stat().st_mode

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [one.name for one in path.parent.iterdir()] == ["file"]
    assert mode & 0o777 == 0o666 & ~_umask()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", b"data")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"data"


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
