"""Shards behind URLs: what is cached, indexed and read is of the content that was opened, or there is an error."""

from dataclasses import replace
from urllib.parse import urlsplit

import pytest

pytest.importorskip("aiohttp")
from http_server import DATA

from data_pipelines.errors import ShardError
from data_pipelines.shards.connection import stream_whole
from data_pipelines.shards.names import public_name
from data_pipelines.shards.remote import RemoteFile
from data_pipelines.shards.storage import open_shard


def read_all(url, remote):
    return open_shard(url, remote).read(0, len(DATA))


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
