"""A checkpoint is converted as a whole or leaves nothing; DeepSpeed's converter is a stand-in."""

from types import SimpleNamespace

import pytest

from qwen2vl_train.training import conversion
from qwen2vl_train.training.conversion import ConversionError, convert


@pytest.fixture
def checkpoint(tmp_path):
    """1,000 bytes."""
    (tmp_path / "step-00000001" / "engine").mkdir(parents=True)
    (tmp_path / "step-00000001" / "engine" / "states.pt").write_bytes(bytes(1000))
    return tmp_path / "step-00000001"


def converter(code):
    """Stands in for `subprocess.run`: writes a file and ends with `code`."""

    def run(command, **options):
        (conversion.Path(command[command.index("--output_folder") + 1]) / "tmp").mkdir(parents=True)
        return SimpleNamespace(returncode=code, stderr="...\nOSError: No space left on device\n")

    return run


@pytest.mark.parametrize(("free", "fits"), [(1999, False), (2000, True)])
def test_room_for_two_copies_is_looked_for_before_anything_is_written(tmp_path, checkpoint, monkeypatch, free, fits):
    """One of the ranks' fragments and one merged, both there at once."""
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(conversion.subprocess, "run", converter(0))
    converted = tmp_path / "converted"
    if fits:
        convert(checkpoint, converted)
        assert (converted / "engine").is_dir()
        return
    with pytest.raises(ConversionError, match="make room"):
        convert(checkpoint, converted)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_conversion_that_fails_leaves_its_room_free(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(conversion.subprocess, "run", converter(1))
    with pytest.raises(ConversionError, match="No space left on device"):
        convert(checkpoint, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
