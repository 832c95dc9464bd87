"""What is made ahead is handed out without waiting for what comes behind it, in order, and made up for later."""

import time
from itertools import count

import pytest
from test_workers import Reader, pack

from data_pipelines.pack.feed import Feed
from data_pipelines.pack.prefetch import batches_of
from data_pipelines.pack.slots import slot_bytes
from data_pipelines.pack.workers import WorkerPool

AHEAD = 4


@pytest.fixture
def stalling(tmp_path):
    """Batches of packs whose source stands still before pack 5 until the file `go` is there; their pool and feed."""
    go = tmp_path / "go"

    def packs(watch):
        for number in count():
            while number == 5 and not go.exists():
                time.sleep(0.02)
            yield pack(number)

    feed = Feed(packs, "test-feed", "plans", 60.0, 1 << 20)
    name = lambda pack, place: ("d", "k")  # noqa: E731
    pool = WorkerPool(lambda watch: Reader(watch, {}), name, 2, AHEAD, slot_bytes(64, 16), 30, 60)

    def taken():
        while True:
            item = feed.take()
            yield None if item is None else item[0]

    yield batches_of(taken(), pool, feed), pool, feed, go
    pool.close()
    feed.close()


def test_packs_made_before_a_stall_are_handed_out_during_it(stalling):
    batches, _, _, go = stalling
    assert [next(batches).number for _ in range(5)] == list(range(5))
    assert not go.exists()


def test_what_a_stall_used_up_is_made_ahead_again(stalling):
    batches, pool, feed, go = stalling
    for _ in range(5):
        next(batches)
    go.touch()
    assert next(batches).number == 5
    deadline = time.monotonic() + 30
    while not feed.pipe.poll() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # several are made, not only the one that is seen in the pipe
    assert [next(batches).number for _ in range(2)] == [6, 7]
    assert len(pool._tickets) == AHEAD - 1
    assert [next(batches).number for _ in range(20)] == list(range(8, 28))


def test_batches_end_when_the_pool_is_closed(stalling):
    batches, pool, _, _ = stalling
    next(batches)
    pool.close()
    assert next(batches, None) is None
