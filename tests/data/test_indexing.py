"""`qwen2vl-data index`: what it tells of good and broken shards, and its exit code."""

from data_pipelines.cli import main


def test_the_command_counts_samples_tokens_and_what_would_be_left_out(tiny, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["index", f"{tiny.folder}/pictures-*.tar", "--tokenizer", f"{tiny.folder}/tokenizer", "--strict"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "3 shards" in shown
    assert "20 (caption 20)" in shown
    assert main([*words, "--max-patches", "20"]) == 1
    shown = capsys.readouterr().out
    assert "do not fit" in shown
    assert "raise" in shown


def test_a_pattern_without_shards_ends_in_one_line(tmp_path, capsys):
    assert main(["index", f"{tmp_path}/*.tar"]) == 2
    assert "no shard matches" in capsys.readouterr().err
