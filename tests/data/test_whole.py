"""Files that are old or new, never half, and files that grow by whole lines."""

import os
import subprocess
import sys

import pytest

from data_pipelines import whole
from data_pipelines.whole import append_lines, read_lines, write_whole


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


FULL_DISK = """
import resource, sys
from pathlib import Path
from data_pipelines.whole import append_lines

path = Path(sys.argv[1])
append_lines(path, [{"pack": 1}])
resource.setrlimit(resource.RLIMIT_FSIZE, (30, resource.RLIM_INFINITY))  # bytes of a file, as if the disk were full
try:
    append_lines(path, [{"pack": 2}, {"pack": 3}])
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
append_lines(path, [{"pack": 4}])
"""


def test_lines_that_the_disk_takes_in_part_leave_nothing_for_later_ones_to_run_into(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    said = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True).stdout
    assert said == f"[Errno 27] File too large: '{path}'\n"
    assert path.read_text() == '{"pack": 1}\n{"pack": 4}\n'


def test_no_lines_make_no_file(tmp_path):
    append_lines(tmp_path / "a.jsonl", [])
    assert list(read_lines(tmp_path / "a.jsonl")) == []
    assert not list(tmp_path.iterdir())


def test_what_is_no_line_is_left_out_and_counted_unless_it_is_in_the_making(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"pack": 1}\n{"pack": 2, "ke{"pack": 3}\n\0\0\xff\n4\n{"pack": 5}\n{"pack": 6, "k')
    assert list(read_lines(path)) == [{"pack": 1}, {"pack": 5}]
    assert caplog.messages == [f"{path}: 3 damaged line(s) left out"]
    path.write_text('{"pack": 1}\n{"pack": 2, "k')
    assert list(read_lines(path)) == [{"pack": 1}]
    assert len(caplog.messages) == 1
