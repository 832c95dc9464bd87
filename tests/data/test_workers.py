"""Workers that die, hang or fail: what the run sees of it, and what is left behind."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_pipelines.errors import ShardError
from data_pipelines.pack.collate import collate
from data_pipelines.pack.slots import packs_ahead, slot_bytes
from data_pipelines.pack.workers import WorkerPool
from data_pipelines.plan.planner import Pack
from data_pipelines.plan.shelf import Item
from data_pipelines.samples import Encoded, LedgerEvent

SPECIAL = SimpleNamespace(endoftext=0, image_pad=8, video_pad=9)


def pack(number, rows=(0, 1, 2), events=()):
    return Pack(number, tuple(Item(0, 0, row, 0, 4, 0) for row in rows), 4 * len(rows), 0, events)


class Reader:
    """Makes batches of three documents; `acts` maps (pack, item) to what happens there, item -1 before the first."""

    def __init__(self, watch, acts):
        self.watch, self.acts = watch, acts

    def __call__(self, pack):
        documents, events = [], []
        self.acts.get((pack.number, -1), lambda: None)()
        skipped = {place: (reason, message) for place, reason, message in pack.skipped}
        for place, item in enumerate(pack.items):
            if place in skipped:
                events.append(LedgerEvent("d", f"k{item.row}", *skipped[place]))
                continue
            self.watch(place)
            act = self.acts.get((pack.number, place))
            if act is not None:
                act()
            ids = torch.full((4,), pack.number * 10 + item.row)
            documents.append(Encoded(f"k{item.row}", 0, ids, torch.full((4,), -100), (), ()))
        self.watch(-1)
        return collate(pack.number, documents, SPECIAL, 64, events)


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def once(path, act):
    """Does `act` the first time that any process gets here."""

    def guarded():
        if not path.exists():
            path.write_text("")
            act()

    return guarded


@pytest.fixture
def make_pool():
    pools = []

    def make(acts, workers=2, timeout_s=30.0, prefetch=2):
        pool = WorkerPool(
            lambda watch: Reader(watch, acts),
            lambda pack, place: ("d", f"k{pack.items[place].row}"),
            workers,
            workers * prefetch,
            slot_bytes(64, 16),
            timeout_s,
            2 * timeout_s,
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


def run(pool, count):
    found, number = [], 0
    while len(found) < count:
        while pool.has_room:
            pool.submit(pack(number))
            number += 1
        found.append(pool.next())
    return found


def events(batches):
    return [(batch.number, event.key, event.reason) for batch in batches for event in batch.events]


def test_batches_come_in_the_order_of_the_packs(make_pool):
    slow = {(number, 0): lambda: time.sleep(0.05) for number in range(0, 12, 3)}
    batches = run(make_pool(slow, workers=3), 12)
    assert [batch.number for batch in batches] == list(range(12))
    assert [batch.input_ids[0].item() for batch in batches] == [10 * number for number in range(12)]
    assert all(batch.keys == ("k0", "k1", "k2") and batch.events == () for batch in batches)


def test_it_tells_what_each_worker_is_at(make_pool, tmp_path):
    acts = {(1, 2): lambda: time.sleep(60), (2, -1): lambda: time.sleep(60)}
    pool = make_pool(acts, workers=2)
    assert pool.under_way() == []
    for number in range(4):  # worker 0 has packs 0 and 2, worker 1 packs 1 and 3
        pool.submit(pack(number))
    assert pool.next().number == 0
    deadline = time.monotonic() + 30
    while not all(word in str(pool.under_way()) for word in ("d/k2", "before")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first, second = (worker.process.pid for worker in pool._workers)
    said = [line.rpartition(",")[0] for line in pool.under_way()]
    assert said == [
        f"before the first sample of pack 2 (data worker 0, process {first}",
        f"d/k2 of pack 1 (data worker 1, process {second}",
    ]


def test_a_stopped_worker_that_has_begun_nothing_is_told_with_the_pack_it_was_given(make_pool):
    pool = make_pool({}, workers=1)
    pid = pool._workers[0].process.pid
    pool.submit(pack(0))
    pool.next()
    os.kill(pid, signal.SIGSTOP)
    pool.submit(pack(10))
    assert pool.under_way()[0].startswith(f"has not begun pack 10 (data worker 0, process {pid}, for ")
    os.kill(pid, signal.SIGCONT)


def test_a_worker_killed_from_outside_costs_no_sample(make_pool, tmp_path):
    batches = run(make_pool({(3, 1): once(tmp_path / "dead", kill_self)}), 8)
    assert [batch.keys for batch in batches] == [("k0", "k1", "k2")] * 8
    assert events(batches) == [(3, "k1", "worker_replaced")]


def test_a_sample_that_kills_its_worker_twice_is_left_out(make_pool):
    batches = run(make_pool({(3, 1): kill_self}), 8)
    assert [batch.keys for batch in batches if batch.number != 3] == [("k0", "k1", "k2")] * 7
    assert batches[3].keys == ("k0", "k2")
    assert events(batches) == [(3, "k1", "worker_replaced"), (3, "k1", "worker_died")]


def test_a_sample_over_its_deadline_is_left_out(make_pool):
    start = time.monotonic()
    batches = run(make_pool({(2, 0): lambda: time.sleep(600)}, timeout_s=0.5), 6)
    assert batches[2].keys == ("k1", "k2")
    assert events(batches) == [(2, "k0", "deadline")]
    assert time.monotonic() - start < 60


def test_a_stopped_worker_does_not_stop_the_run(make_pool, tmp_path):
    stop = once(tmp_path / "stopped", lambda: os.kill(os.getpid(), signal.SIGSTOP))
    batches = run(make_pool({(1, 2): stop}, timeout_s=0.5), 6)
    assert events(batches) == [(1, "k2", "deadline")]


def test_the_sample_that_was_late_is_left_out_though_its_worker_went_on(make_pool, monkeypatch):
    pool = make_pool({(0, 0): lambda: time.sleep(600)}, workers=1, timeout_s=0.5)
    judge = pool._late_at

    def judge_then_go_on(number):
        at = judge(number)
        if at is not None:
            pool._at[number] = (at[0], at[1] + 1, time.monotonic_ns())
        return at

    monkeypatch.setattr(pool, "_late_at", judge_then_go_on)
    assert events(run(pool, 1)) == [(0, "k0", "deadline")]


def test_a_worker_that_stalls_before_its_first_sample_blames_none(make_pool, tmp_path):
    stall = once(tmp_path / "stalled", lambda: time.sleep(600))
    batches = run(make_pool({(1, -1): stall}, timeout_s=0.5), 4)
    assert [batch.keys for batch in batches] == [("k0", "k1", "k2")] * 4
    assert events(batches) == [(1, "pack 1", "worker_replaced")]


@pytest.mark.parametrize("where", ["reader", "pack"])
def test_storage_that_never_answers_ends_the_run_with_the_shards_name(where):
    def make_reader(watch):
        if where == "reader":
            time.sleep(600)
        return Reader(watch, {(0, -1): lambda: time.sleep(600)})

    pool = WorkerPool(
        make_reader,
        lambda pack, place: ("d", "k"),
        1,
        1,
        slot_bytes(64, 16),
        sample_timeout_s=30,
        stall_s=1,
        name_shards=lambda pack: "/mnt/a.tar",
    )
    pool.submit(pack(0))
    with pytest.raises(ShardError, match=r"/mnt/a.tar: no worker could begin pack 0 within 1 s, in 2 tries"):
        pool.next()
    pool.close()


def test_a_failing_program_ends_the_run_with_its_traceback(make_pool):
    def fail():
        raise KeyError("a defect")

    with pytest.raises(RuntimeError, match=r"(?s)pack 2.*KeyError: 'a defect'"):
        run(make_pool({(2, 0): fail}), 6)


def test_workers_that_die_outside_samples_end_the_run(make_pool):
    pool = WorkerPool(lambda watch: kill_self(), lambda pack, place: ("d", "k"), 1, 1, slot_bytes(64, 16), 30, 60)
    pool.submit(pack(0))
    with pytest.raises(RuntimeError, match="die at pack 0 outside any sample"):
        pool.next()
    pool.close()


def test_what_the_plan_noted_reaches_the_batch(make_pool):
    pool = make_pool({}, workers=1)
    pool.submit(pack(0, events=(LedgerEvent("d", "x" * 200_000, "r", "m"),)))
    assert [event.reason for event in pool.next().events] == ["r"]


def children():
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_closing_leaves_no_process_and_no_shared_memory(make_pool):
    processes, shared = children(), shared_bytes()
    pool = make_pool({(2, 0): lambda: time.sleep(600)})
    run(pool, 2)
    assert len(children() - processes) == 2
    assert shared_bytes() - shared >= 4 * slot_bytes(64, 16)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 10
    assert children() <= processes
    assert shared_bytes() - shared < slot_bytes(64, 16)  # a page says what each worker is at


def test_the_pools_own_memory_stays_flat_over_many_packs(make_pool):
    assert growth(make_pool({}, workers=1), 50, 300) < 4 << 20


def growth(pool, warm_up, packs):
    """Bytes by which this process and the pool's workers grow over some packs, which nobody reads or decodes."""

    def resident():
        pids = [os.getpid(), *(worker.process.pid for worker in pool._workers)]
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return pages * os.sysconf("SC_PAGE_SIZE")

    run(pool, warm_up)
    before, number = resident(), warm_up
    for _ in range(packs):
        while pool.has_room:
            number += 1
            pool.submit(pack(number))
        pool.next()
    return resident() - before


def test_slots_stay_within_their_bytes():
    # 2 workers x 2 packs of 100 MiB in 300 MiB: 3 packs; a pack over the bound is still made, alone
    assert packs_ahead(2, 2, 300, 100 << 20) == 3
    assert packs_ahead(2, 2, 4096, 100 << 20) == 4
    assert packs_ahead(16, 2, 50, 100 << 20) == 1


@pytest.mark.parametrize("ahead", [1, 3, 5])
def test_no_more_packs_are_under_way_than_there_are_slots(make_pool, ahead):
    pool = WorkerPool(
        lambda watch: Reader(watch, {}), lambda pack, place: ("d", "k"), 2, ahead, slot_bytes(64, 16), 30, 60
    )
    submitted = 0
    while pool.has_room:
        pool.submit(pack(submitted))
        submitted += 1
    assert submitted == ahead
    for number in range(12):
        assert pool.next().number == number
        pool.submit(pack(number + ahead))
    pool.close()


def shared_bytes():
    """Bytes of anonymous shared memory mapped by this process."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/dev/zero (deleted)" in line:
            start, end = (int(place, 16) for place in line.split()[0].split("-"))
            total += end - start
    return total


def test_replaced_workers_leave_no_memory_and_no_descriptors(make_pool, tmp_path):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    deaths = {(number, 1): once(tmp_path / f"dead{number}", kill_self) for number in range(1, 8)}
    pool = make_pool(deaths, workers=1, prefetch=1)
    pool.submit(pack(0))
    pool.next()
    open_files, shared = descriptors(), shared_bytes()
    replaced = []
    for number in range(1, 10):
        pool.submit(pack(number))
        replaced += [event.reason for event in pool.next().events]
    assert replaced == ["worker_replaced"] * 7
    assert (descriptors(), shared_bytes()) == (open_files, shared)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_pools_own_memory_stays_flat_over_twenty_thousand_packs(make_pool):
    """Of packs that are decoded: test_elastic."""
    assert growth(make_pool({}, workers=2), 500, 20_000) < 8 << 20
