"""Shards behind URLs: what is cached, indexed and read is of the content that was opened, or there is an error."""

import shutil
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

pytest.importorskip("aiohttp")
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from http_server import DATA
from test_remote import over_http, run

from data_pipelines.errors import ShardError
from data_pipelines.index.build import Counting, load_index
from data_pipelines.index.source import SourceIndex
from data_pipelines.shards.connection import stream_whole
from data_pipelines.shards.names import public_name
from data_pipelines.shards.remote import RemoteFile
from data_pipelines.shards.storage import open_shard
from data_pipelines.shards.tag import content_tag

OTHER = DATA[::-1]
# Differs from DATA where the tag does not look.
MENDED = DATA[:10_000] + bytes(100) + DATA[10_100:]


def read_all(url, remote):
    return open_shard(url, remote).read(0, len(DATA))


def ranges_asked(faults):
    return faults.requests["GET", "range"]


@pytest.mark.parametrize("etag", ["", '"1"'])
def test_shards_told_apart_by_their_query_alone_are_read_each(server, remote, tmp_path, etag):
    address, faults = server
    faults.etag = etag
    for number, data in ((1, DATA), (2, OTHER)):
        (tmp_path / "www" / f"get?id={number}").write_bytes(data)
    for _ in range(2):
        assert read_all(f"{address}/get?id=1", remote) == DATA
        assert read_all(f"{address}/get?id=2", remote) == OTHER


@pytest.mark.parametrize("etag", ["", '"1"'])
def test_shards_told_apart_by_their_query_alone_keep_their_indices(server, remote, tiny, tmp_path, etag):
    address, faults = server
    faults.etag = etag
    files = sorted(tiny.folder.glob("pictures-*.tar"))[:2]
    size = max(path.stat().st_size for path in files)
    for number, path in enumerate(files):  # of one size: zeros at the end of a tar mean nothing
        (tmp_path / "www" / f"get?id={number}").write_bytes(path.read_bytes().ljust(size, b"\0"))
    urls = [f"{address}/get?id={number}" for number in range(2)]
    for _ in range(2):
        source = SourceIndex("s", urls, Counting(tiny.tokenizer, "plain"), remote)
        assert source.num_samples == 16
        assert [source.key(shard, 0) for shard in range(2)] == ["p00", "p08"]
        assert len(set(source.counts().marks)) == 2
    faults.requests.clear()
    assert [load_index(url, remote).key(0) for url in urls] == ["p00", "p08"]
    assert ranges_asked(faults) == (0 if etag else 8)  # their tags, but no blocks: both indices are there


@pytest.mark.parametrize("etag", ["", '"1"'])
def test_another_signature_loses_neither_cache_nor_index(server, remote, tiny, tmp_path, etag):
    address, faults = server
    faults.etag = etag
    shutil.copy(next(tiny.folder.glob("pictures-00000.tar")), tmp_path / "www" / "p.tar")
    indexed = load_index(f"{address}/p.tar?sig=1", remote).columns.meta
    file = open_shard(f"{address}/p.tar?sig=1", remote)
    file.read(0, file.size)
    faults.requests.clear()
    again = load_index(f"{address}/p.tar?sig=2", remote).columns.meta
    file = open_shard(f"{address}/p.tar?sig=2", remote)
    assert file.read(0, file.size) == (tmp_path / "www" / "p.tar").read_bytes()
    assert again == indexed
    assert ranges_asked(faults) <= (4 if etag else 8)  # the tag, of either opening where no version says it is the same


def test_content_replaced_at_equal_size_is_noticed_where_the_server_states_no_version(server, remote, tmp_path):
    address, faults = server
    faults.etag = ""
    assert read_all(f"{address}/a.tar", remote) == DATA
    (tmp_path / "www" / "a.tar").write_bytes(OTHER)
    file = open_shard(f"{address}/a.tar", remote)
    assert file.read(0, len(DATA)) == OTHER
    assert file.tag() == content_tag(len(OTHER), lambda offset, size: OTHER[offset : offset + size])


def test_a_tag_is_that_of_the_bytes_which_are_read(remote):
    memory = fsspec.filesystem("memory")
    for data in (DATA, OTHER):
        memory.pipe("/tags/m.tar", data)
        file = RemoteFile("memory://tags/m.tar", remote)
        assert file.read(0, len(data)) == data
        assert file.tag() == content_tag(len(data), lambda offset, size, data=data: data[offset : offset + size])


@pytest.mark.parametrize("field", ["mtime", "blob_id"])
def test_stores_state_versions_under_names_of_their_own(remote, field):
    class Store(MemoryFileSystem):
        protocol = f"store{field.replace('_', '')}"
        version = "1"

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix(f"{cls.protocol}:/"))

        def info(self, path, **_):
            return {**super().info(path), field: self.version}

    fsspec.register_implementation(Store.protocol, Store, clobber=True)
    url = f"{Store.protocol}://versions/m.tar"
    for Store.version, data in (("1", DATA), ("2", MENDED)):  # the tags of both are the same
        Store().pipe("/versions/m.tar", data)
        assert RemoteFile(url, remote).version == Store.version
        assert read_all(url, remote) == data


def test_a_server_that_gives_neither_ranges_nor_versions_is_refused(server, remote):
    address, faults = server
    faults.etag, faults.ranges = "", False
    file = RemoteFile(f"{address}/a.tar", remote)
    for ask in (file.tag, lambda: file.read(0, 10)):
        with pytest.raises(ShardError, match=r"no version .*reader: webdataset \[no_version\]"):
            ask()
    assert b"".join(file.stream()) == DATA


def test_a_range_other_than_the_one_asked_for_is_no_range(server, remote):
    address, faults = server
    faults.first_bytes = True
    file = RemoteFile(f"{address}/a.tar", remote)
    assert file.read(50_000, 9) == DATA[50_000:50_009]
    assert faults.requests["GET", "whole"] == 1
    faults.first_bytes = False
    assert read_all(f"{address}/a.tar", remote) == DATA


@pytest.mark.parametrize("ranges", [True, False])
def test_content_replaced_behind_an_open_file_is_an_error_and_not_kept(server, remote, tmp_path, ranges):
    address, faults = server
    faults.ranges = ranges
    file = RemoteFile(f"{address}/a.tar", remote)
    path = tmp_path / "www" / "a.tar"
    path.write_bytes(OTHER)
    faults.etag = '"2"'
    for read in (lambda: file.read(50_000, 9), lambda: list(file.stream())):
        with pytest.raises(ShardError, match=r"a.tar was changed .*\[shard_changed\]"):
            read()
    path.write_bytes(DATA)
    faults.etag = '"1"'
    assert read_all(f"{address}/a.tar", remote) == DATA


@pytest.mark.parametrize("size", [60_000, 110_000])
def test_another_size_behind_an_open_file_is_an_error_without_any_version(server, remote, tmp_path, size):
    address, faults = server
    faults.etag = ""
    file = RemoteFile(f"{address}/a.tar", remote)
    assert file.read(0, 9) == DATA[:9]
    (tmp_path / "www" / "a.tar").write_bytes(bytes(size))
    with pytest.raises(ShardError, match="shard_changed"):
        file.read(90_000, 9)


def test_a_stream_that_begins_anew_goes_on_in_the_same_content_only(server, remote, tmp_path):
    address, faults = server
    faults.ranges, faults.cut = False, 2  # the answer to the range, and the whole
    path = tmp_path / "www" / "long.tar"
    path.write_bytes(DATA * 40)  # more than the client takes ahead of need: the cut comes after the first piece
    stream = RemoteFile(f"{address}/long.tar", remote).stream()
    assert DATA.startswith(next(stream))
    path.write_bytes(OTHER * 40)
    faults.etag = '"2"'
    with pytest.raises(ShardError, match="shard_changed"):
        list(stream)


def test_a_weak_tag_of_the_same_content_is_the_same(server, remote):
    address, faults = server
    file = RemoteFile(f"{address}/a.tar", remote)
    faults.etag = 'W/"1"'
    assert file.read(0, len(DATA)) == DATA


@pytest.mark.parametrize("gzips", ["asked", "always"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_compresses_bodies_gives_the_same_bytes(server, remote, tmp_path, gzips, ranges):
    address, faults = server
    text = b"a tar of texts compresses well; " * 3000
    (tmp_path / "www" / "t.tar").write_bytes(text)
    faults.gzips, faults.ranges = gzips, ranges
    file = open_shard(f"{address}/t.tar", replace(remote, retries=0))
    assert file.read(40_000, 30_000) == text[40_000:70_000]
    assert file.read(0, len(text)) == text
    assert b"".join(RemoteFile(f"{address}/t.tar", remote).stream()) == text
    assert b"".join(stream_whole(f"{address}/t.tar", remote)) == text


def test_a_whole_file_in_answer_to_a_range_is_not_asked_for_again(server, remote):
    address, faults = server
    faults.ranges = False
    assert read_all(f"{address}/a.tar", replace(remote, max_requests=1)) == DATA
    assert (ranges_asked(faults), faults.requests["GET", "whole"]) == (1, 1)


def test_redirects_are_followed(server, remote, tiny, tmp_path):
    address, _ = server
    assert read_all(f"{address}/moved/a.tar", remote) == DATA
    assert b"".join(stream_whole(f"{address}/moved/a.tar", remote)) == DATA
    for path in tiny.folder.glob("*.tar"):
        shutil.copy(path, tmp_path / "www")
    urls = [
        [f"{address}/moved/{path.name}" for path in sorted(tiny.folder.glob(f"{name}-*.tar"))]
        for name in ("pictures", "texts")
    ]
    config = over_http(tiny, address, remote)
    sources = {
        name: replace(source, shards=tuple(shards))
        for (name, source), shards in zip(config.sources.items(), urls, strict=True)
    }
    assert run(replace(config, sources=sources), tiny, 2)[0] == run(tiny.config(), tiny, 2)[0]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://user:s3cret@host/a.tar?sig=1", "https://host/a.tar"),
        ("HTTP://t0ken@host:80/a@b.tar", "HTTP://host:80/a@b.tar"),
        ("sftp://user:s3cret@host/a.tar", "sftp://user@host/a.tar"),
        ("abfs://container@account/a.tar", "abfs://container@account/a.tar"),
        ("hf://datasets/me/them@main/a.tar", "hf://datasets/me/them@main/a.tar"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("/data/a@b:c.tar", "/data/a@b:c.tar"),
    ],
)
def test_a_password_is_no_part_of_any_name(url, name):
    assert public_name(url) == name


def test_passwords_reach_no_message_and_the_server(server, remote):
    address, _ = server
    url = f"http://user:s3cret@{urlsplit(address).netloc}/a.tar"
    assert read_all(url, remote) == DATA
    missing = url.replace("a.tar", "b.tar")
    few = replace(remote, retries=0)
    for ask in (lambda: RemoteFile(missing, few), lambda: list(stream_whole(missing, few))):
        with pytest.raises(ShardError) as caught:
            ask()
        assert "s3cret" not in str(caught.value)
