"""What `qwen2vl` says of a mistake, and from which ranks."""

import json

import pytest

from qwen2vl_train import cli


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
