"""Files that are old or new, never half."""

import os

import pytest

from data_pipelines import whole
from data_pipelines.whole import write_whole


def test_a_file_is_written_with_its_folder_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_whole(path, "ä")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("flush", [True, False])
def test_content_and_name_are_on_disk_where_that_is_asked_for(tmp_path, monkeypatch, flush):
    flushed = []
    monkeypatch.setattr(whole.os, "fsync", lambda number: flushed.append(os.readlink(f"/proc/self/fd/{number}")))
    write_whole(tmp_path / "a.json", "x", flush)
    assert flushed == ([str(tmp_path / f".a.json.{os.getpid()}.part"), str(tmp_path)] if flush else [])
