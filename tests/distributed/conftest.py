"""Fixtures of the distributed tests."""

import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, where the machine lets this process mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small disk here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
