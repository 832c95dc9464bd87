"""Members as stored, in the order of the shards: what webdataset reads, from mapped files, URLs and lines."""

import json
import os
import shutil
from pathlib import Path

import pytest
import webdataset

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import MediaError, ShardError
from data_pipelines.index import places, raw
from data_pipelines.index.build import load_index
from data_pipelines.index.raw import raw_samples


@pytest.fixture
def shards(tiny, tmp_path):
    """A copy of the pictures' shards: two of 8 samples, one of 4."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in tiny.folder.glob("pictures-*.tar"):
        shutil.copy(shard, folder)
    return folder


def test_keys_and_bytes_are_those_that_webdataset_reads(shards):
    paths = sorted(map(str, shards.glob("*.tar")))
    theirs = [
        (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
        for sample in webdataset.WebDataset(paths, shardshuffle=False)
    ]
    ours = [
        (key, {name: bytes(view) for name, view in members.items()})
        for key, members in raw_samples([f"{shards}/*.tar"])
    ]
    assert len(ours) == 20
    assert ours == theirs


def test_nothing_is_copied_and_a_view_outlives_its_file(shards):
    views = dict(raw_samples([f"{shards}/*.tar"]))
    before = {key: bytes(members["0.png"]) for key, members in views.items()}
    shutil.rmtree(shards)
    assert all(view.readonly and type(view.obj).__name__ == "mmap" for m in views.values() for view in m.values())
    assert {key: bytes(members["0.png"]) for key, members in views.items()} == before


def test_behind_urls_the_same(shards, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    from http_server import serve

    monkeypatch.setattr(places, "SPARE_CACHE", tmp_path / "index")
    monkeypatch.setenv("no_proxy", "*")
    names = sorted(path.name for path in shards.glob("*.tar"))
    local = list(raw_samples([f"{shards}/*.tar"]))
    with serve(shards) as (address, _):
        remote = RemoteConfig(str(tmp_path / "cache"), cache_mb=2, block_kb=4)
        assert list(raw_samples([f"{address}/{name}" for name in names], remote)) == local


def test_of_lines_each_line_is_a_sample(tmp_path):
    lines = [json.dumps({"text": f"words of line {number}"}) for number in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    found = [(key, bytes(members["json"]).decode()) for key, members in raw_samples([str(tmp_path / "t.jsonl")])]
    assert found == [(f"t/00000{number}", line) for number, line in enumerate(lines)]


def test_a_shard_replaced_under_the_reader_is_told_apart_by_the_headers(shards, monkeypatch):
    shard = str(sorted(shards.glob("*.tar"))[0])
    index = load_index(shard)
    # Another shard of the same size in its place, after its index was opened: the key of the fourth sample differs.
    data = bytearray(Path(shard).read_bytes())
    data[data.index(b"p03.json")] = ord("q")
    (shards / "new").write_bytes(data)
    os.replace(shards / "new", shard)
    monkeypatch.setattr(raw, "load_index", lambda shard, remote: index)
    samples = raw_samples([shard])
    assert [next(samples)[0] for _ in range(3)] == ["p00", "p01", "p02"]
    with pytest.raises(MediaError, match=r"json: .*was changed after it was indexed"):
        next(samples)


def test_another_size_and_a_missing_shard_are_errors_not_signals(shards, monkeypatch):
    shard = str(sorted(shards.glob("*.tar"))[0])
    index = load_index(shard)
    monkeypatch.setattr(raw, "load_index", lambda shard, remote: index)
    os.truncate(shard, os.path.getsize(shard) - 512)
    with pytest.raises(ShardError, match="was changed after it was indexed"):
        next(raw_samples([shard]))
    os.truncate(shard, 0)
    with pytest.raises(ShardError, match="cannot be mapped"):
        next(raw_samples([shard]))
    with pytest.raises(ShardError, match="no shard matches"):
        next(raw_samples([f"{shards}/absent-*.tar"]))
