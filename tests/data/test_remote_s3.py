"""Shards in an S3 bucket through s3fs, against a real server on loopback: the same bytes and packs as from the disk.

Skipped where s3fs or the server is not installed: `pip install s3fs 'moto[server]'` (in one command, since both hold
botocore to a version).
"""

import json
import shutil
import time
from dataclasses import dataclass, replace
from itertools import count

import pytest

pytest.importorskip("s3fs", reason="needs pip install s3fs 'moto[server]'")
pytest.importorskip("moto.server", reason="needs pip install s3fs 'moto[server]'")
import s3fs
from moto.server import ThreadedMotoServer
from test_loader import fingerprint
from test_remote import DATA, over_http, run

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import ShardError
from data_pipelines.index import places
from data_pipelines.index.build import Counting
from data_pipelines.index.source import SourceIndex
from data_pipelines.ledger import Ledger
from data_pipelines.loader import PackLoader
from data_pipelines.shards.remote import RemoteFile
from data_pipelines.shards.storage import LocalFile, expand_shards, open_shard
from data_pipelines.streaming import StreamLoader

NUMBERS = count()


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own for each test: listings of it are cached in the process."""

    files: s3fs.S3FileSystem
    url: str

    def put(self, name, data):
        self.files.pipe(f"{self.url}/{name}", data)

    def upload(self, folder):
        """The tars of `folder`."""
        for path in folder.glob("*.tar"):
            self.put(path.name, path.read_bytes())


@pytest.fixture(scope="module")
def server():
    """The server's address."""
    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """A bucket with a.tar, found as a user's would be: by the environment."""
    monkeypatch.setattr(places, "SPARE_CACHE", tmp_path / "index")
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "no_proxy": "*",
    }.items():
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    made = Bucket(files, f"s3://shards-{next(NUMBERS)}")
    files.mkdir(made.url)
    made.put("a.tar", DATA)
    return made


@pytest.fixture
def remote(tmp_path):
    """Small blocks, short pauses."""
    return RemoteConfig(str(tmp_path / "cache"), cache_mb=2, block_kb=4, backoff_s=0.01, timeout_s=20.0)


def test_ranges_are_those_of_the_file(bucket, remote, tmp_path):
    file = open_shard(f"{bucket.url}/a.tar", remote)
    assert file.size == len(DATA)
    for offset, size in ((0, 1), (4095, 2), (50_000, 30_000), (len(DATA) - 7, 7), (0, len(DATA))):
        assert file.read(offset, size) == DATA[offset : offset + size]
    (tmp_path / "local.tar").write_bytes(DATA)
    assert file.tag() == LocalFile(str(tmp_path / "local.tar")).tag()
    with pytest.raises(ShardError, match="cut_shard"):
        file.read(len(DATA) - 1, 2)


def test_a_range_asks_for_its_blocks_only(bucket, remote, tmp_path):
    RemoteFile(f"{bucket.url}/a.tar", remote).read(50_000, 9)
    assert sum(path.stat().st_size for path in tmp_path.rglob("blocks/*/*")) == 4096


def test_a_shard_that_is_read_once_streams_past_the_cache(bucket, remote, tmp_path):
    assert b"".join(RemoteFile(f"{bucket.url}/a.tar", remote).stream()) == DATA
    assert not list(tmp_path.rglob("blocks/*/*"))


def test_patterns_name_the_objects_of_the_bucket(bucket, remote):
    for name in ("web/x-00.tar", "web/x-01.tar", "web/y.txt"):
        bucket.put(name, b"x")
    expected = [f"{bucket.url}/web/x-00.tar", f"{bucket.url}/web/x-01.tar"]
    assert expand_shards("s", [f"{bucket.url}/web/*.tar"], remote) == expected
    assert expand_shards("s", [f"{bucket.url}/web/x-{{00..01}}.tar"], remote) == expected
    with pytest.raises(ShardError, match=r"source 's': no shard matches 's3://shards-\d+/none/\*.tar'"):
        expand_shards("s", [f"{bucket.url}/none/*.tar"], remote)


def test_objects_that_came_later_are_in_the_next_listing(bucket, remote):
    for number in range(2):
        bucket.put(f"x-0{number}.tar", b"x")
        assert len(expand_shards("s", [f"{bucket.url}/x-*.tar"], remote)) == number + 1


def test_what_is_not_there_is_an_error_at_once_with_its_name(bucket, remote):
    start = time.monotonic()
    patient = replace(remote, backoff_s=60.0)
    with pytest.raises(ShardError, match=r"s3://shards-\d+/absent.tar: cannot be opened: FileNotFoundError"):
        open_shard(f"{bucket.url}/absent.tar", patient)
    with pytest.raises(ShardError, match=r"s3://nobodys/a.tar: cannot be opened: NoSuchBucket"):
        open_shard("s3://nobodys/a.tar", patient)
    assert time.monotonic() - start < 25


def test_an_object_replaced_under_its_name_is_read_anew(bucket, remote):
    assert open_shard(f"{bucket.url}/a.tar", remote).read(0, 5) == DATA[:5]
    bucket.put("a.tar", DATA[::-1])
    assert open_shard(f"{bucket.url}/a.tar", remote).read(0, 5) == DATA[:-6:-1]


def test_a_server_that_is_gone_is_given_up_with_the_reason(bucket, remote, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    few = replace(remote, retries=1, timeout_s=19.0)  # another file system than the tests before
    with pytest.raises(ShardError, match=r"s3://shards-\d+/a.tar: cannot be opened: .*127.0.0.1:9.*\(2 attempts\)"):
        open_shard(f"{bucket.url}/a.tar", few)


def test_the_index_is_that_of_the_local_shards(bucket, tiny, remote):
    bucket.upload(tiny.folder)
    counting = Counting(tiny.tokenizer, "plain")
    there, here = (
        SourceIndex("s", expand_shards("s", [f"{place}/pictures-*.tar"], remote), counting, remote)
        for place in (bucket.url, tiny.folder)
    )
    assert there.fingerprint == here.fingerprint
    assert there.num_samples == here.num_samples == 20
    for shard in range(3):
        first, second = there.table(shard), here.table(shard)
        assert first.index.fingerprint == second.index.fingerprint
        assert first.text_tokens.tolist() == second.text_tokens.tolist()
    there.close()


def test_packs_from_a_bucket_are_those_from_the_disk(bucket, tiny, remote):
    bucket.upload(tiny.folder)
    expected, _ = run(tiny.config(), tiny, 4)
    first, state = run(over_http(tiny, bucket.url, remote, workers=2), tiny, 2)
    rest, _ = run(over_http(tiny, bucket.url, remote), tiny, 2, state)
    assert first + rest == expected


def test_an_index_uploaded_with_its_shards_is_used(bucket, tiny, remote, tmp_path):
    run(tiny.config(), tiny, 1)  # builds the side files beside the local shards
    bucket.upload(tiny.folder)
    for path in (tiny.folder / ".index").iterdir():
        bucket.put(f".index/{path.name}", path.read_bytes())
    PackLoader(over_http(tiny, bucket.url, remote), tiny.tokenizer, 4, 0, 1, seed=0).close()
    assert len(list((tmp_path / "index").glob("*.tar.index"))) == 5
    assert not [path for path in tmp_path.rglob("blocks/*/*") if path.stat().st_size > 100]  # tags, no content


def test_a_stream_from_a_bucket_is_the_one_from_the_disk(bucket, tiny, remote):
    bucket.upload(tiny.folder)
    found = []
    for config in (tiny.config(), over_http(tiny, bucket.url, remote, workers=1)):
        loader = StreamLoader(replace(config, reader="webdataset"), tiny.tokenizer, 4, 0, 1, seed=0)
        found.append([fingerprint(batch) for _, step in zip(range(4), loader, strict=False) for batch in step])
        loader.close()
    assert found[0] == found[1]


def test_an_object_deleted_during_a_run_costs_its_samples_and_is_told(bucket, tiny, remote, tmp_path):
    bucket.upload(tiny.folder)
    loader = PackLoader(over_http(tiny, bucket.url, remote), tiny.tokenizer, 4, 0, 1, seed=0)
    bucket.files.rm(f"{bucket.url}/pictures-00001.tar")
    shutil.rmtree(tmp_path / "cache")
    ledger, kept = Ledger(tmp_path / "ledger.jsonl"), []
    for _, step in zip(range(4), loader, strict=False):
        ledger.add(step)
        kept += [dataset for batch in step for dataset in batch.datasets]
    loader.close()
    told = (tmp_path / "ledger.jsonl").read_text()
    assert {json.loads(line)["dataset"] for line in told.splitlines()} == {"pictures"}
    assert 0 in kept  # the other pictures
    assert f"{bucket.url}/pictures-00001.tar" in told
