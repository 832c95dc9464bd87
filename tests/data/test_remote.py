"""Shards behind URLs, against a real server: the same bytes, whatever the server does; a cache with a bound."""

import json
import os
import shutil
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("aiohttp")
from http_server import DATA
from test_loader import fingerprint

from data_pipelines.cli import main
from data_pipelines.config import LoaderConfig, RemoteConfig
from data_pipelines.errors import ShardError
from data_pipelines.index import places
from data_pipelines.loader import PackLoader, stall_limit_s
from data_pipelines.report.check_shard import Finding
from data_pipelines.report.data_run import name_sources
from data_pipelines.shards import connection
from data_pipelines.shards.cache import BlockCache
from data_pipelines.shards.names import public_name
from data_pipelines.shards.remote import RemoteFile, fetch_all
from data_pipelines.shards.storage import LocalFile, expand_shards, open_shard

FAULTS = {
    "well": {},
    "no ranges": {"ranges": False},
    "busy": {"busy": 3},
    "cut": {"cut": 3},
    "slow": {"delay_s": 0.02},
    "no ranges, cut": {"ranges": False, "cut": 2},
    "no version": {"etag": ""},
    "no ranges, no version": {"ranges": False, "etag": ""},
}


@pytest.mark.parametrize("name", FAULTS)
def test_bytes_are_those_of_the_file_whatever_the_server_does(server, remote, name):
    address, faults = server
    file = open_shard(f"{address}/a.tar", remote)
    for fault, value in FAULTS[name].items():
        setattr(faults, fault, value)
    assert file.size == len(DATA)
    rng = np.random.default_rng(1)
    for _ in range(20):
        start, end = sorted(int(place) for place in rng.integers(0, len(DATA), 2))
        assert file.read(start, end - start) == DATA[start:end]
    assert file.read(0, len(DATA)) == DATA
    with pytest.raises(ShardError, match="cut_shard"):
        file.read(len(DATA) - 1, 2)


@pytest.mark.parametrize("name", FAULTS)
def test_a_shard_that_is_read_once_streams_past_the_cache(server, remote, name, tmp_path):
    address, faults = server
    file = RemoteFile(f"{address}/a.tar", remote)
    for fault, value in FAULTS[name].items():
        setattr(faults, fault, value)
    assert b"".join(file.stream()) == DATA
    assert not list((tmp_path / "cache").rglob("blocks/*/*"))


def test_every_block_is_asked_for_once(server, remote):
    address, faults = server
    file = RemoteFile(f"{address}/a.tar", remote)
    for offset in range(0, 90_000, 1000):
        assert file.read(offset, 1000) == DATA[offset : offset + 1000]
    # 90,000 bytes lie in 22 blocks of 4,096; reading on in order brings up to 3 more
    assert 22 <= faults.requests["GET", "range"] <= 25
    assert faults.requests["GET", "whole"] == 0
    RemoteFile(f"{address}/a.tar", remote).read(0, 90_000)
    assert faults.requests["GET", "range"] <= 25


def test_a_server_without_ranges_is_asked_for_the_whole_once(server, remote):
    address, faults = server
    faults.ranges = False
    file = RemoteFile(f"{address}/a.tar", remote)
    for offset in range(50_000, 60_000, 500):
        file.read(offset, 500)
    assert (faults.requests["GET", "range"], faults.requests["GET", "whole"]) == (1, 1)


def test_a_server_without_ranges_and_a_shard_over_half_the_cache_is_an_error_with_the_remedy(server, remote, tmp_path):
    address, faults = server
    faults.ranges = False
    (tmp_path / "www" / "big.tar").write_bytes(bytes(1_200_000))
    file = RemoteFile(f"{address}/big.tar", remote)
    with pytest.raises(ShardError, match=r"1200000 bytes\) takes more than half of remote.cache_mb=2: raise it"):
        file.read(1_000_000, 10)


def test_requests_side_by_side_are_bounded(server, remote):
    address, faults = server
    faults.delay_s = 0.05
    few = replace(remote, max_requests=3)
    file = RemoteFile(f"{address}/a.tar", few)
    fetch_all([(file, 0, len(DATA))], 16)  # more threads than turns
    assert 2 <= faults.most_under_way <= 3
    assert faults.requests["GET", "range"] == 25


def read_all(url, remote):
    return RemoteFile(url, remote).read(0, len(DATA)) == DATA


def test_processes_that_want_the_same_blocks_fetch_them_once(server, remote):
    address, faults = server
    faults.delay_s = 0.02
    with get_context("spawn").Pool(3) as pool:
        assert pool.starmap(read_all, [(f"{address}/a.tar", remote)] * 3) == [True] * 3
    assert faults.requests["GET", "range"] == 25


def test_a_forked_worker_and_its_parent_both_go_on_reading(server, remote):
    address, _ = server
    file = RemoteFile(f"{address}/a.tar", remote)
    assert file.read(0, 10) == DATA[:10]
    worker = get_context("fork").Process(
        target=lambda: os._exit(0 if file.read(50_000, 99) == DATA[50_000:50_099] else 1)
    )
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    start = time.monotonic()
    assert file.read(90_000, 99) == DATA[90_000:90_099]
    assert time.monotonic() - start < 10


def test_a_request_without_an_answer_is_given_up_and_repeated(server, remote):
    address, faults = server
    file = RemoteFile(f"{address}/a.tar", replace(remote, timeout_s=0.5))
    faults.stall = 1
    assert file.read(10, 10) == DATA[10:20]
    assert faults.requests["GET", "range"] == 2


def test_what_cannot_get_better_is_an_error_at_once(server, remote):
    address, faults = server
    with pytest.raises(ShardError, match=r"absent.tar: cannot be opened: the server answers 404"):
        RemoteFile(f"{address}/absent.tar?signature=secret", remote)
    assert faults.requests.total() == 2  # HEAD, then GET


class NoCredentialsError(Exception):
    """As botocore's, which need not be installed."""


class HttpError(Exception):
    """As gcsfs's."""

    code = 401


def behind(outer, inner):
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    "error",
    [
        NoCredentialsError("Unable to locate credentials"),
        behind(OSError("plugins wrap it"), NoCredentialsError("Unable to locate credentials")),
        HttpError("Anonymous caller"),
        OSError("Forbidden: bucket/a.tar"),
        PermissionError("Access Denied"),
    ],
)
def test_who_may_not_read_is_told_at_once(remote, error):
    calls = []

    def request():
        calls.append(1)
        raise error

    with pytest.raises(ShardError) as caught:
        connection.attempt(request, remote, "s3://b/a.tar", lambda words: ShardError("s3://b/a.tar", "", words))
    assert len(calls) == 1
    assert ("Give credentials" in str(caught.value)) == ("redentials" in repr(error.__cause__ or error))


def test_a_server_that_stays_busy_is_given_up_with_its_answer(server, remote):
    address, faults = server
    file = RemoteFile(f"{address}/a.tar?signature=secret", replace(remote, retries=2))
    faults.busy = 100
    with pytest.raises(ShardError, match=r"a.tar: 4096 bytes at 0: the server answers 503 .*\(3 attempts\)") as caught:
        file.read(0, 10)
    assert "secret" not in str(caught.value)
    assert faults.requests["GET", "range"] == 3


def test_a_refused_connection_is_named(remote):
    with pytest.raises(ShardError, match=r"cannot be opened: ClientConnectorError.*\(2 attempts\)"):
        RemoteFile("http://127.0.0.1:9/a.tar", replace(remote, retries=1))


def test_a_server_that_is_away_for_long_is_named_while_it_is_waited_for(server, remote, monkeypatch, caplog):
    address, faults = server
    monkeypatch.setattr(connection, "_QUIET_S", 0.0)
    file = open_shard(f"{address}/a.tar?signature=secret", remote)
    faults.busy = 2
    assert file.read(0, 10) == DATA[:10]
    first, second = caplog.messages
    assert "/a.tar: the server answers 503" in first
    assert first.endswith("(6 attempts left)")
    assert second.endswith("(5 attempts left)")
    assert "secret" not in caplog.text


def test_an_unknown_scheme_is_an_error(remote):
    with pytest.raises(ShardError, match=r"nonsense:// cannot be read: Protocol not known"):
        open_shard("nonsense://bucket/a.tar", remote)


def test_other_content_under_the_same_name_is_read_anew(server, remote, tmp_path):
    address, faults = server
    assert RemoteFile(f"{address}/a.tar", remote).read(0, 5) == DATA[:5]
    (tmp_path / "www" / "a.tar").write_bytes(DATA[::-1])
    faults.etag = '"2"'
    assert RemoteFile(f"{address}/a.tar", remote).read(0, 5) == DATA[:-6:-1]


def test_the_tag_is_that_of_a_local_copy_and_asked_for_once(server, remote, tmp_path):
    address, faults = server
    local = LocalFile(str(tmp_path / "www" / "a.tar"))
    assert [RemoteFile(f"{address}/a.tar", remote).tag() for _ in range(3)] == [local.tag()] * 3
    assert faults.requests["GET", "range"] == 4


def test_the_cache_keeps_its_bound_and_what_was_read_last(tmp_path):
    cache = BlockCache(tmp_path, 64 * 4096)  # four blocks of 1 KiB in each of the 64 sets
    for number in range(2000):
        cache.put(f"b{number}", bytes([number % 256]) * 1024)
        cache.read("b0", 0, 1)
    held = list(tmp_path.rglob("blocks/*/*"))
    assert 64 * 3 <= len(held) <= 64 * 4
    assert sum(path.stat().st_size for path in held) <= 64 * 4096
    assert cache.read("b0", 1000, 24) == bytes(24)
    assert cache.read("b1999", 0, 3) == bytes([1999 % 256]) * 3
    assert cache.read("b1999", 1000, 25) is None  # cut: as if absent


def test_blocks_of_another_user_are_read(tmp_path, monkeypatch):
    cache = BlockCache(tmp_path, 64 * 4096)
    cache.put("b", b"abc")

    def refuse(*_):
        raise PermissionError("only the owner may touch it")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.read("b", 1, 2) == b"bc"


def test_a_cache_that_cannot_be_written_costs_no_read(server, remote, tmp_path):
    address, _ = server
    (tmp_path / "cache").write_text("a file where the folder should be")
    file = RemoteFile(f"{address}/a.tar", remote)
    assert file.read(50_000, 9) == DATA[50_000:50_009]


def test_a_cache_too_small_for_its_blocks_is_refused():
    with pytest.raises(ValueError, match="set cache_mb to 512 or more, or lower block_kb"):
        RemoteConfig(cache_mb=511)


def test_patterns_of_urls_name_shards(server, remote, tmp_path):
    address, _ = server
    for name in ("x-00.tar", "x-01.tar"):
        (tmp_path / "www" / name).write_bytes(b"")
    assert expand_shards("s", [f"{address}/x-{{00..01}}.tar"], remote) == [f"{address}/x-0{n}.tar" for n in (0, 1)]
    assert expand_shards("s", [f"{address}/x-*.tar"], remote) == [f"{address}/x-0{n}.tar" for n in (0, 1)]
    with pytest.raises(ShardError, match=r"source 's': no shard matches 'http.*/y-\*.tar'"):
        expand_shards("s", [f"{address}/y-*.tar"], remote)
    local = str(tmp_path / "www" / "a.tar")
    assert expand_shards("s", [f"file://{local}"]) == [local]


def test_a_signature_is_no_part_of_any_name():
    url = "https://host/web-00000.tar?signature=secret"
    assert name_sources([url]) == {"web": [url]}
    assert Finding.of(url, "", "bad_header", "").shard == "https://host/web-00000.tar"
    assert public_name("s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert public_name("/data/what?.tar") == "/data/what?.tar"  # a file's name, not a query


def over_http(tiny, address, remote, workers=0):
    config = tiny.config(workers=workers)
    sources = {name: replace(source, shards=(f"{address}/{name}-*.tar",)) for name, source in config.sources.items()}
    return replace(config, sources=sources, remote=remote)


def run(config, tiny, steps, state=None):
    loader = PackLoader(config, tiny.tokenizer, 4, 0, 1, seed=0)
    if state is not None:
        loader.load_state_dict(json.loads(json.dumps(state)))
    found = [[fingerprint(batch) for batch in step] for _, step in zip(range(steps), loader, strict=False)]
    loader.close()
    return found, loader.state_dict()


@pytest.mark.parametrize("name", ["well", "no ranges", "busy", "cut"])
def test_packs_from_urls_are_those_from_the_disk(tiny, server, remote, tmp_path, name):
    address, faults = server
    for path in tiny.folder.glob("*.tar"):
        shutil.copy(path, tmp_path / "www")
    for fault, value in FAULTS[name].items():
        setattr(faults, fault, value)
    expected, _ = run(tiny.config(), tiny, 4)
    first, state = run(over_http(tiny, address, remote, workers=2), tiny, 2)
    rest, _ = run(tiny.config(), tiny, 2, state)  # goes on from the disk: the data set was moved
    assert first + rest == expected


def test_an_index_uploaded_with_its_shards_is_used(tiny, server, remote, tmp_path):
    address, faults = server
    run(tiny.config(), tiny, 1)  # builds the side files beside the local shards
    shutil.copytree(tiny.folder, tmp_path / "www", dirs_exist_ok=True)
    loader = PackLoader(over_http(tiny, address, remote), tiny.tokenizer, 4, 0, 1, seed=0)
    loader.close()
    # five shards: four small ranges for the tag of each, and no block of their content
    assert faults.requests["GET", "range"] == 5 * 4
    assert len(list((tmp_path / "index").glob("*.tar.index"))) == 5


@pytest.mark.parametrize("command", ["index", "check"])
def test_the_commands_read_as_their_remote_options_say(tiny, server, tmp_path, command):
    address, _ = server
    shutil.copy(tiny.folder / "pictures-00000.tar", tmp_path / "www")
    words = [command, f"{address}/pictures-*.tar", "--processes", "1"]
    options = ["--remote-cache-dir", f"{tmp_path}/mine", "--remote-cache-mb", "2", "--remote-block-kb", "4"]
    assert main([*words, *options]) == 0
    assert any((tmp_path / "mine").rglob("*"))
    assert main([*words, "--remote-cache-mb", "1"]) == 2


def test_remote_shards_on_the_roll_open_with_two_requests_each_and_two_for_those_tried(tiny, server, remote, tmp_path):
    address, faults = server
    for path in tiny.folder.glob("*.tar"):
        shutil.copy(path, tmp_path / "www")
    config = over_http(tiny, address, remote)
    expected = PackLoader(config, tiny.tokenizer, 4, 0, 1, seed=0).state_dict()
    faults.requests.clear()
    again = PackLoader(config, tiny.tokenizer, 4, 0, 1, seed=0)
    heads = faults.requests["HEAD", "whole"]
    assert again.state_dict() == expected
    # of five shards: what is to be built, and what is in them; one for each pattern's folder; and, of up to 16 shards
    # of a source, the two side files that tell whether its samples fit a pack
    assert heads == faults.requests["HEAD", "whole"] == 5 * 2 + 2 + 5 * 2
    for path in (tmp_path / "www").glob("texts-*.tar"):
        path.write_bytes(next(tiny.folder.glob("texts-00000.tar")).read_bytes())
    faults.etag = '"2"'
    changed = PackLoader(config, tiny.tokenizer, 4, 0, 1, seed=0)
    assert [source.num_samples for source in changed._sources] == [20, 16]


def test_a_server_that_dies_costs_the_samples_it_had(tiny, server, remote, tmp_path):
    address, faults = server
    for path in tiny.folder.glob("*.tar"):
        shutil.copy(path, tmp_path / "www")
    config = over_http(tiny, address, replace(remote, retries=1))
    loader = PackLoader(config, tiny.tokenizer, 4, 0, 1, seed=0)
    shutil.rmtree(tmp_path / "cache")
    faults.busy = 10**6
    events = [event for batch in next(iter(loader)) for event in batch.events]
    loader.close()
    assert {event.reason for event in events} == {"read_failed"}
    assert len(events) > 8


def test_shards_that_vanish_cost_their_samples(tiny, server, remote, tmp_path):
    address, _ = server
    for path in tiny.folder.glob("*.tar"):
        shutil.copy(path, tmp_path / "www")
    loader = PackLoader(over_http(tiny, address, remote), tiny.tokenizer, 4, 0, 1, seed=0)
    shutil.rmtree(tmp_path / "cache")
    for path in (tmp_path / "www").glob("texts-*.tar"):
        path.unlink()
    batches = next(iter(loader))
    loader.close()
    lost = [(event.dataset, event.reason) for batch in batches for event in batch.events]
    assert set(lost) == {("texts", "unreadable_shard")}
    assert any(batch.keys for batch in batches)


@pytest.mark.parametrize("retries", [0, 6, 20])
def test_a_process_counts_as_stuck_after_all_retries_of_a_server(tiny, retries):
    remote = RemoteConfig(retries=retries, timeout_s=10.0)
    config = replace(tiny.config(), remote=remote, loader=LoaderConfig(sample_timeout_s=100.0))
    assert stall_limit_s(config, ["/data/a.tar"]) == 200
    # pauses between the tries are 30 s at most
    assert stall_limit_s(config, ["/data/a.tar", "https://host/a.tar"]) == max(200, (retries + 1) * 40)


def test_urls_with_one_path_stay_as_listed_whatever_their_signatures():
    def listed(*signatures):
        return [f"https://host/get?sig={signature}&id={number}" for number, signature in enumerate(signatures)]

    for shards in (listed("a", "b", "c"), listed("f", "c", "d")):
        assert expand_shards("s", [*shards, "https://host/a.tar?sig=1"]) == ["https://host/a.tar?sig=1", *shards]


def test_sources_in_other_stores_are_read_through_their_plugin(tiny, remote, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(places, "SPARE_CACHE", tmp_path / "index")
    # "file" stands for a store that only its plugin knows: local:// is fsspec's other name for it
    path = Path(shutil.copy(next(tiny.folder.glob("texts-00000.tar")), tmp_path))
    file = open_shard(f"local://{path}", remote)
    assert isinstance(file, RemoteFile)
    assert file.read(512, 700) == path.read_bytes()[512:1212]
    assert file.tag() == LocalFile(str(path)).tag()
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/m.tar", DATA)
    assert b"".join(open_shard("memory://bucket/m.tar", remote).stream()) == DATA
    assert expand_shards("s", ["memory://bucket/*.tar"], remote) == ["memory:///bucket/m.tar"]
