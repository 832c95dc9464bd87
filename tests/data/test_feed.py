"""A process that makes items ahead: bounded, in order, replaced behind the last item where it dies or hangs."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from data_pipelines.errors import ShardError
from data_pipelines.pack.feed import Feed

ITEM_BYTES = 100_000  # more than a pipe holds


@pytest.fixture
def make_feed():
    """Makes feeds, and closes them."""
    feeds = []

    def make(items, stall_s=30.0, ahead_bytes=0):
        feeds.append(Feed(items, "test-feed", "counts", stall_s, ahead_bytes))
        return feeds[-1]

    yield make
    for feed in feeds:
        feed.close()


def next_of(feed):
    """The next item, waited for, and how processes before it ended."""
    while (taken := feed.take()) is None:
        feed.wait()
    return taken


@pytest.fixture
def counted(make_feed):
    """A feed of 0, 1, 2, ... with some bytes each, how many were made, and those received."""
    made = multiprocessing.get_context("fork").Value("q", 0)
    received = []

    def items(watch):
        number = len(received)
        while True:
            made.value = number + 1
            yield number, b"x" * ITEM_BYTES
            number += 1

    return make_feed(items, ahead_bytes=4 * ITEM_BYTES + 4096), made, received


def settled(made):
    """The number made, once it has stopped rising."""
    while True:
        before = made.value
        time.sleep(0.3)
        if made.value == before > 0:
            return before


def test_items_come_in_order_and_few_are_made_ahead(counted):
    feed, made, _ = counted
    assert settled(made) == 5  # four fill the bytes, one waits for room
    for number in range(100):
        (found, _), ends = next_of(feed)
        assert (found, ends) == (number, ())
    assert settled(made) == 105


def test_what_is_made_ahead_is_taken_without_waiting(counted):
    feed, made, _ = counted
    for first in (0, 4):
        settled(made)
        assert [feed.take()[0][0] for _ in range(4)] == list(range(first, first + 4))


def test_a_killed_process_goes_on_behind_the_last_item_received(counted):
    feed, _, received = counted
    ends = []
    for number in range(60):
        if number % 20 == 10:
            os.kill(feed.pid, signal.SIGKILL)
        (found, _), told = next_of(feed)
        received.append(found)
        ends += told
    assert received == list(range(60))
    assert ends == ["died (exit -9)"] * 3


def test_an_item_larger_than_the_pipe_arrives_whole(make_feed):
    feed = make_feed(lambda watch: iter([b"x" * (3 << 20), b"y"]))
    assert [len(next_of(feed)[0]) for _ in range(2)] == [3 << 20, 1]


def test_items_made_before_an_error_are_given_before_it(make_feed):
    def items(watch):
        yield 1
        yield 2
        raise ShardError("web", "empty_source", "nothing")

    feed = make_feed(items)
    assert [next_of(feed)[0] for _ in range(2)] == [1, 2]
    with pytest.raises(ShardError, match=r"web: nothing \[empty_source\]"):
        next_of(feed)


def test_a_process_that_stands_still_is_replaced(make_feed, tmp_path):
    def items(watch):
        watch("/mnt/a.tar")
        if not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        yield 1

    assert next_of(make_feed(items, stall_s=0.5)) == (1, ("stood still for 0.5 s at /mnt/a.tar",))


def test_a_process_stopped_while_its_item_is_in_the_pipe_is_replaced(make_feed):
    feed = make_feed(lambda watch: iter([b"x" * (8 << 20)]), stall_s=0.5)
    assert feed.pipe.poll(30)
    os.kill(feed.pid, signal.SIGSTOP)
    item, ends = next_of(feed)
    assert (len(item), ends) == (8 << 20, ("stood still for 0.5 s",))


def test_one_that_stands_still_again_ends_the_run_with_what_it_was_at(make_feed):
    def items(watch):
        watch("/mnt/a.tar")
        yield os.kill(os.getpid(), signal.SIGSTOP)

    with pytest.raises(
        ShardError, match=r"/mnt/a.tar: the process that counts stood still for 0.5 s, 2 times in a row"
    ):
        next_of(make_feed(items, stall_s=0.5))


def test_a_slow_process_that_gives_signs_of_life_is_waited_for(make_feed):
    def items(watch):
        for _ in range(30):
            watch("/mnt/slow.tar")
            time.sleep(0.1)
        yield 1

    assert next_of(make_feed(items, stall_s=1.0)) == (1, ())


def test_it_tells_what_the_process_is_at_while_it_is_waited_for(make_feed, tmp_path):
    def items(watch):
        watch("/mnt/a.tar")
        while not (tmp_path / "go").exists():
            time.sleep(0.02)
        yield 1

    feed = make_feed(items)
    assert feed.under_way() == []
    waiting = threading.Thread(target=next_of, args=(feed,))
    waiting.start()
    deadline = time.monotonic() + 30
    while "a.tar" not in str(feed.under_way()) and time.monotonic() < deadline:
        time.sleep(0.02)
    (said,) = feed.under_way()
    assert said.startswith(f"/mnt/a.tar (the process that counts, process {feed.pid}, for ")
    (tmp_path / "go").touch()
    waiting.join()
    assert feed.under_way() == []


def test_closing_ends_the_process_whatever_it_is_at():
    def items(watch):
        time.sleep(600)
        yield 1

    feed = Feed(items, "test-feed", "sleeps", 30.0)
    start, pid = time.monotonic(), feed.pid
    feed.close()
    feed.close()
    assert time.monotonic() - start < 10
    assert not os.path.exists(f"/proc/{pid}")
