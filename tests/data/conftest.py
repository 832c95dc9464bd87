"""Fixtures of the data tests: tiny shards with their tokenizer."""

import pytest
from tiny_shards import TinyData, make_tiny_shards


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """20 pictures in 3 shards, 15 texts in 2, and a tokenizer of their words."""
    return make_tiny_shards(tmp_path_factory.mktemp("tiny"))
