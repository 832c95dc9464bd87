"""`qwen2vl-data index`: what it tells of good and broken shards, and its exit code."""

import json
import shutil

from data_pipelines.cli import main
from data_pipelines.index import build
from data_pipelines.shards.writer import ShardWriter


def test_the_command_counts_samples_tokens_and_what_would_be_left_out(tiny, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["index", f"{tiny.folder}/pictures-*.tar", "--tokenizer", f"{tiny.folder}/tokenizer", "--strict"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "3 shards" in shown
    assert "20 (caption 20)" in shown
    assert main([*words, "--max-tokens", "12"]) == 1
    shown = capsys.readouterr().out
    assert "do not fit" in shown
    assert "it needs max_tokens=" in " ".join(shown.split())


def test_a_pattern_without_shards_ends_in_one_line(tmp_path, capsys):
    assert main(["index", f"{tmp_path}/*.tar"]) == 2
    assert "no shard matches" in capsys.readouterr().err
    assert main(["index", str(tmp_path)]) == 2
    assert f"it is a folder; use '{tmp_path}/*.tar'" in capsys.readouterr().err


def write_mixed(folder):
    """Four texts, two records of another form."""
    with ShardWriter(folder, "s") as writer:
        for number in range(4):
            writer.write(f"a/{number}", {"text": "a dog"}, {})
        for number in range(2):
            writer.write(f"b/{number}", {"messages": "none"}, {})
    return str(folder / "s-00000.tar")


def test_each_problem_is_listed_by_shard_key_reason_and_message(tmp_path, capsys):
    shard = write_mixed(tmp_path)
    assert main(["index", shard, "--list"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [[shard, "b/0", "bad_field"], [shard, "b/1", "bad_field"]]
    assert all(line[3].startswith("messages = 'none'") for line in lines)
    assert main(["index", shard, "--json", "--strict"]) == 1
    *found, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(entry["key"], entry["reason"], entry["lost"]) for entry in found] == [
        ("b/0", "bad_field", True),
        ("b/1", "bad_field", True),
    ]
    assert (summary["samples"], summary["problems"], summary["unreadable"]) == (4, {"bad_field": 2}, 0)


def test_what_an_index_only_counts_is_said_in_the_list(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "MAX_LISTED_PROBLEMS", 1)
    shard = write_mixed(tmp_path)
    assert main(["index", shard, "--list"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split("\t")[:3] == [shard, "b/0", "bad_field"]
    assert second.split("\t")[:3] == [shard, "", "bad_field"]
    assert "and 1 more" in second


def test_an_unreadable_shard_ends_in_code_one_and_the_others_are_told(tiny, tmp_path, capsys):
    for path in tiny.folder.glob("texts-*.tar"):
        shutil.copy(path, tmp_path)
    (tmp_path / "page.tar").write_bytes(b"<html>404</html>" * 100)
    words = ["index", "--tokenizer", f"{tiny.folder}/tokenizer", "--remote-retries", "0", f"{tmp_path}/texts-*.tar"]
    assert main(words) == 0
    assert main([*words, f"{tmp_path}/page.tar"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "15 (text 15)" in shown
    assert "fetch it again" in shown
    assert main([*words, "http://127.0.0.1:1/x.tar"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "15 (text 15)" in shown
    assert "unreadable_shard" in shown
