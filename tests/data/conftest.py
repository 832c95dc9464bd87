"""Fixtures of the data tests: tiny shards with their tokenizer; a tokenizer for texts of all kinds; a web server."""

from pathlib import Path

import pytest
from http_server import DATA, serve
from tiny_shards import TinyData, make_tiny_shards

from data_pipelines.config import RemoteConfig
from data_pipelines.index import places
from data_pipelines.sources.bpe import train_bpe
from data_pipelines.tokenizer import TextTokenizer

TEXTS = (
    "system user assistant You are a helpful assistant. Describe the image. Generate the caption in English: a red dog",
    "Where is the cat? The cat is on the left of the blue square. Picture 1: Video 2: (123,456),(789,999)",
    "你好，世界。 def main():\n    return 0\n\n What is written here? Answer: It's 42.",
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """20 pictures in 3 shards, 15 texts in 2, and a tokenizer of their words."""
    return make_tiny_shards(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder of 512 entries."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(list(TEXTS) * 4, path, vocab_size=512)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> TextTokenizer:
    return TextTokenizer(tokenizer_path)


@pytest.fixture
def remote(tmp_path):
    """Small blocks, short pauses."""
    return RemoteConfig(str(tmp_path / "cache"), cache_mb=2, block_kb=4, backoff_s=0.01, timeout_s=20.0)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(address, faults) of a server of tmp_path/www, where a.tar holds DATA."""
    monkeypatch.setattr(places, "SPARE_CACHE", tmp_path / "index")
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.tar").write_bytes(DATA)
    with serve(tmp_path / "www") as (address, faults):
        yield address, faults
