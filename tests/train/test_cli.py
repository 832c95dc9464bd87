"""What `qwen2vl` says of a mistake, and from which ranks."""

import errno
import json
import os

import pytest

from qwen2vl_train import cli
from qwen2vl_train.report import page


@pytest.mark.parametrize(("rank", "local_rank", "says"), [("8", "0", True), ("9", "1", False)])
def test_a_configuration_that_is_wrong_on_one_node_is_said_there_by_one_rank_and_left_for_torchrun_by_all(
    tmp_path, monkeypatch, capsys, rank, local_rank, says
):
    """Each node reads its own YAML files; those of rank 0 may be right."""
    file = tmp_path / "error.json"
    places = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "16", "TORCHELASTIC_ERROR_FILE": str(file)}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "experiment=demo", "seeed=3"]) == 2
    wanted = f"error (rank {rank}): "
    assert (wanted in capsys.readouterr().err) == says
    assert json.loads(file.read_text())["message"]["message"].startswith(f"{wanted}seeed = 3: unknown key")


def test_a_report_into_a_folder_that_takes_no_file_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"stages": {"vision": {}}}')

    def refuse(path, content):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(page, "write_whole", refuse)
    assert cli.main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"the report of {tmp_path} cannot be written ([Errno 30] Read-only file system" in line
