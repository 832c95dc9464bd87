"""Shards whose server gives no ranges: fetched whole, once, before the first sample, and kept as one file."""

import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("aiohttp")
from http_server import DATA
from test_remote import over_http

from data_pipelines.loader import new_planner, open_sources
from data_pipelines.pack.read import PackReader
from data_pipelines.pack.workers import PREPARING
from data_pipelines.shards.cache import BlockCache
from data_pipelines.shards.remote import RemoteFile, fetch_all


@pytest.fixture
def whole(server):
    """(address, requests) of a server without ranges."""
    address, faults = server
    faults.ranges = False
    return address, faults.requests


def test_a_shard_without_ranges_is_fetched_ahead_with_signs_of_life(whole, remote):
    address, requests = whole
    signs = []
    file = RemoteFile(f"{address}/a.tar", remote)
    fetch_all([(file, 50_000, 10)], 4, lambda: signs.append(requests["GET", "whole"]))  # one block is missing
    assert requests["GET", "whole"] == 1
    assert len([sign for sign in signs if sign == 1]) >= 25  # one a block of 4 KiB that came
    fetch_all([(file, 0, len(DATA))], 4)
    assert file.read(0, len(DATA)) == RemoteFile(f"{address}/a.tar", remote).read(0, len(DATA)) == DATA
    assert requests["GET", "whole"] == 1


def test_who_waits_for_anothers_download_gives_signs_of_life(whole, remote):
    address, requests = whole
    file = RemoteFile(f"{address}/a.tar", remote)
    file.read(0, 9)
    alive = threading.Event()
    with file._cache.turn(file._key, remote.max_requests, 10.0):
        waiter = threading.Thread(target=file.fetch_whole, kwargs={"progress": alive.set})
        waiter.start()
        assert alive.wait(30)
    waiter.join(30)
    assert requests["GET", "whole"] == 1


def test_samples_do_not_pay_for_the_download_of_their_shard(whole, remote, tiny, tmp_path):
    address, requests = whole
    for path in tiny.folder.glob("*.tar"):
        shutil.copy(path, tmp_path / "www")
    config = over_http(tiny, address, remote)
    sources = open_sources(config, tiny.tokenizer)
    shutil.rmtree(tmp_path / "cache")
    requests.clear()
    downloads = []  # (what the reader is at, downloads so far)
    reader = PackReader(
        sources, config, tiny.tokenizer, lambda item: downloads.append((item, requests["GET", "whole"]))
    )
    pack = new_planner(config, sources, seed=0).next_pack()
    shards = {(item.source, item.shard) for item in pack.items}
    batch = reader[pack]
    reader.close()
    assert batch.events == ()
    assert requests["GET", "whole"] == len(shards)
    first = next(number for number, (item, _) in enumerate(downloads) if item >= 0)
    assert downloads[first] == (0, len(shards))
    assert {item for item, _ in downloads[:first]} == {PREPARING}


def test_a_shard_of_half_the_cache_is_fetched_once(whole, remote, tmp_path):
    address, requests = whole
    data = np.random.default_rng(1).integers(0, 256, 512 << 10, dtype=np.uint8).tobytes()  # 128 of 256 blocks
    (tmp_path / "www" / "b.tar").write_bytes(data)
    file = RemoteFile(f"{address}/b.tar", replace(remote, cache_mb=1))
    for _ in range(2):
        assert b"".join(file.read(offset, 4096) for offset in range(0, len(data), 4096)) == data
    assert requests["GET", "whole"] == 1


def test_whole_shards_keep_to_their_half_and_the_one_read_last(whole, remote, tmp_path):
    address, requests = whole
    for name in "bcd":
        (tmp_path / "www" / f"{name}.tar").write_bytes(name.encode() * 400_000)
    for name in "bcbdb":
        assert RemoteFile(f"{address}/{name}.tar", remote).read(0, 9) == name.encode() * 9
    assert requests["GET", "whole"] == 3  # c made room for d
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) <= 1 << 20


def test_pieces_that_are_not_the_size_told_are_not_kept(tmp_path):
    cache = BlockCache(tmp_path, 1 << 20, sets=1)
    assert list(cache.keep("a", 6, [b"abc", b"def"])) == [b"abc", b"def"]
    assert cache.read("a", 2, 2) == b"cd"
    list(cache.keep("b", 7, [b"abc", b"def"]))
    next(cache.keep("c", 6, [b"abc", b"def"]))  # whoever wanted it stops
    assert not cache.has("b")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a"]
