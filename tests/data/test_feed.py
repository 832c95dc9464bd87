"""A process that makes items ahead: bounded, in order, replaced behind the last item received."""

import multiprocessing
import os
import signal
import time

import pytest

from data_pipelines.errors import ShardError
from data_pipelines.pack.feed import Feed


@pytest.fixture
def counted():
    """What gives 0, 1, 2, ... as 1,000 bytes each, the number of those made, and a feed of them."""
    made = multiprocessing.get_context("fork").Value("q", 0)
    received = []

    def items():
        number = len(received)
        while True:
            made.value = number + 1
            yield number, b"x" * 1000
            number += 1

    feed = Feed(items, "test-feed", "counts", pipe_bytes=4096)
    yield feed, made, received
    feed.close()


def settled(made):
    """The number made, once it has stopped rising."""
    while True:
        before = made.value
        time.sleep(0.3)
        if made.value == before > 0:
            return before


def test_items_come_in_order_and_few_are_made_ahead(counted):
    feed, made, _ = counted
    assert settled(made) <= 6  # 4,096 bytes hold four at most, one waits to be written
    for number in range(100):
        (found, _), deaths = feed.next()
        assert (found, deaths) == (number, ())
    assert settled(made) <= 106


def test_a_killed_process_goes_on_behind_the_last_item_received(counted):
    feed, _, received = counted
    exits = []
    for number in range(60):
        if number % 20 == 10:
            os.kill(feed.pid, signal.SIGKILL)
        (found, _), deaths = feed.next()
        received.append(found)
        exits += deaths
    assert received == list(range(60))
    assert exits == [-signal.SIGKILL] * 3


def test_an_item_larger_than_the_pipe_arrives_whole():
    feed = Feed(lambda: iter([b"x" * (3 << 20), b"y"]), "test-feed", "counts", pipe_bytes=4096)
    assert [len(feed.next()[0]) for _ in range(2)] == [3 << 20, 1]
    feed.close()


def test_items_made_before_an_error_are_given_before_it():
    def items():
        yield 1
        yield 2
        raise ShardError("web", "empty_source", "nothing")

    feed = Feed(items, "test-feed", "counts")
    assert [feed.next()[0] for _ in range(2)] == [1, 2]
    with pytest.raises(ShardError, match=r"web: nothing \[empty_source\]"):
        feed.next()
    feed.close()


def test_closing_ends_the_process_whatever_it_is_at():
    def items():
        time.sleep(600)
        yield 1

    feed = Feed(items, "test-feed", "sleeps")
    start, pid = time.monotonic(), feed.pid
    feed.close()
    feed.close()
    assert time.monotonic() - start < 10
    assert not os.path.exists(f"/proc/{pid}")
