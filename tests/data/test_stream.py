"""Tars read once: what the webdataset package keeps silent is said, nothing is lost, a resume goes on by shard."""

import bz2
import gzip
import io
import json
import os
import re
import signal
import tarfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import ShardError
from data_pipelines.index.build import load_index
from data_pipelines.index.streamed import StreamedFacts
from data_pipelines.plan.progress import Progress
from data_pipelines.plan.stream import stream_order
from data_pipelines.samples import Record
from data_pipelines.shards.storage import REMOTE_DEFAULTS, LocalFile
from data_pipelines.shards.stream import stream_samples
from data_pipelines.shards.tar import scan_tar
from data_pipelines.shards.writer import ShardWriter
from data_pipelines.streaming import StreamLoader

PACKS = 4


def tar_bytes(*members, form=tarfile.PAX_FORMAT, encoding="utf-8"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, encoding=encoding) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


# Six samples of two members of one block each: a sample takes 4 blocks of 512, key k its header at 2048 * k.
SIX = tar_bytes(*((f"{key}.{suffix}", b"x" * 100) for key in range(6) for suffix in ("json", "jpg")))
LONG = tar_bytes((f"{'long/' * 60}a.json", b"{}"), ("ä.json", b"1"), ("b.json", b"2"))


TWICE = tar_bytes(("a.json", b"1"), ("b.json", b"2"), ("b.json", b"3"), ("c.json", b"4"))
OUTSIDE = tar_bytes(("../a.json", b"1"), ("../a.jpg", b"1"), ("c.json", b"4"))
ABSOLUTE = tar_bytes(("/a.json", b"1"), ("/a.jpg", b"1"), ("./b.json", b"4"))
LATIN = tar_bytes(("ä.json", b"1"), ("b.json", b"2"), form=tarfile.GNU_FORMAT, encoding="latin-1")
# Names under which the package keeps facts of its own.
RESERVED = tar_bytes(("a.__key__", b"z"), ("a.json", b"1"), ("b.__url__", b"z"), ("b.json", b"2"))


def streamed(tmp_path, data, name="x.tar"):
    path = tmp_path / name
    path.write_bytes(data)
    problems = []
    samples = list(stream_samples(str(path), REMOTE_DEFAULTS, problems))
    return samples, [(problem.reason, problem.message) for problem in problems]


def spoilt(data, at):
    return data[:at] + b"\xff" * 20 + data[at + 20 :]


DAMAGE = {
    "none": (SIX, "012345", []),
    "long names": (LONG, None, []),
    "names that are no UTF-8": (LATIN, ["\\xe4", "b"], []),
    "bad header inside a sample": (spoilt(SIX, 3 * 2048 + 1024), "012", ["bad_header"]),
    "bad header between samples": (spoilt(SIX, 4 * 2048), "0123", ["bad_header"]),
    "bad first header": (spoilt(SIX, 0), "", ["bad_header"]),
    "cut in data": (SIX[: 4 * 2048 + 600], "0123", ["cut_shard"]),
    "cut in a second member": (SIX[: 4 * 2048 + 1600], "0123", ["cut_shard"]),
    "cut in a header": (SIX[: 4 * 2048 + 100], "0123", ["cut_shard"]),
    "no end marker": (SIX[: 6 * 2048], "012345", ["no_end_marker"]),
    "tars joined": (SIX + SIX, "012345", ["data_after_end"]),
    "empty": (b"", "", ["bad_header"]),
    "a page": (b"<html>" * 500, "", ["bad_header"]),
    "a member twice": (TWICE, "ac", ["duplicate_key"]),
    "outside": (OUTSIDE, "c", ["unsafe_name"]),
    "absolute names": (ABSOLUTE, "ab", []),
    "the package's own names": (RESERVED, "ab", []),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_said_and_costs_what_lies_behind_it(tmp_path, name):
    data, keys, reasons = DAMAGE[name]
    samples, problems = streamed(tmp_path, data)
    assert [reason for reason, _ in problems] == reasons
    if keys is not None:
        assert [sample.key for sample in samples] == list(keys)
    # the same samples and reasons as the indexed way finds
    scan = scan_tar(LocalFile(str(tmp_path / "x.tar")))
    assert [(sample.key, tuple(sample.members)) for sample in samples] == [
        (sample.key, tuple(sample.members)) for sample in scan.samples
    ]
    assert reasons == [problem.reason for problem in scan.problems]


def test_the_package_alone_is_silent_about_a_bad_header(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(spoilt(SIX, 4 * 2048))
    assert len(list(webdataset.WebDataset(str(path), shardshuffle=False))) == 4  # of six, and no word


def test_members_that_stand_apart_are_dropped_and_said(tmp_path):
    data = tar_bytes(("a.jpg", b"1"), ("b.json", b"2"), ("a.json", b"3"), ("c.json", b"4"))
    samples, problems = streamed(tmp_path, data)
    assert [(sample.key, list(sample.members)) for sample in samples] == [
        ("a", ["jpg"]),
        ("b", ["json"]),
        ("c", ["json"]),
    ]
    assert problems == [("duplicate_key", "members are scattered, dropped")]


def test_gzip_is_unpacked_and_its_damage_said(tmp_path):
    samples, problems = streamed(tmp_path, gzip.compress(SIX), "x.tar.gz")
    assert (len(samples), problems) == (6, [])
    samples, problems = streamed(tmp_path, gzip.compress(SIX)[:-20], "x.tar.gz")
    assert [reason for reason, _ in problems] == ["cut_shard"]
    assert len(samples) <= 6


def test_a_claim_of_too_many_bytes_is_refused_before_it_is_read(tmp_path):
    info = tarfile.TarInfo("a.mp4")
    info.size = 1 << 40
    claim = tar_bytes(("0.json", b"{}"))[:1024] + info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    _, problems = streamed(tmp_path, claim)
    assert [reason for reason, _ in problems] == ["media_too_big"]


@pytest.mark.parametrize("form", ["GNU", "pax"])
def test_a_sparse_member_ends_its_shard_before_the_reader_expands_it(tmp_path, form):
    """A block of a tar may stand for terabytes of zeros, and a map that does not parse is an error of tarfile's."""
    info = tarfile.TarInfo("9.json")
    if form == "GNU":
        info.type = tarfile.GNUTYPE_SPARSE
        member = info.tobuf(tarfile.GNU_FORMAT)
    else:
        info.pax_headers = {"GNU.sparse.map": "one", "GNU.sparse.size": str(1 << 40)}
        member = info.tobuf(tarfile.PAX_FORMAT)
    samples, problems = streamed(tmp_path, SIX[: 6 * 2048] + member + bytes(1024))
    assert [sample.key for sample in samples] == list("012345")
    ((reason, message),) = problems
    assert reason == "bad_header"
    assert "without sparse members; 6 samples before it are used" in message


def test_an_error_of_the_reader_names_the_shard_and_no_object_of_the_program(tmp_path):
    _, ((_, message),) = streamed(tmp_path, gzip.compress(SIX)[:-20], "x.tar.gz")
    assert "x.tar.gz" in message
    assert " object at 0x" not in message


def test_a_pipe_is_read_like_a_file(tmp_path):
    path = tmp_path / "pipe.tar"
    os.mkfifo(path)
    if os.fork() == 0:
        path.write_bytes(SIX)
        os._exit(0)
    problems = []
    assert len(list(stream_samples(str(path), REMOTE_DEFAULTS, problems))) == 6
    assert problems == []
    os.wait()


def config(tiny, folder=None, workers=0, **kwargs):
    made = replace(tiny.config(workers=workers, **kwargs), reader="webdataset")
    if folder is None:
        return made
    sources = {name: replace(source, shards=(f"{folder}/{name}-*.tar",)) for name, source in made.sources.items()}
    return replace(made, sources=sources)


@pytest.fixture
def many(tiny, tmp_path):
    """24 texts in 8 shards of 3, and their configuration."""
    with ShardWriter(tmp_path, "many", max_records=3) as writer:
        for number in range(24):
            writer.write(f"m{number:02d}", {"text": "a red dog sits " * (1 + number % 5)}, {})
    made = tiny.config(pictures=1.0, pool=4)
    source = replace(made.sources["pictures"], shards=(f"{tmp_path}/many-*.tar",))
    return replace(
        made, sources={"many": source}, reader="webdataset", plan=replace(made.plan, max_tokens=24, window_shards=2)
    )


def batches(loader, steps):
    found = [batch for _, step in zip(range(steps), loader, strict=False) for batch in step]
    loader.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_packs_are_full_and_hold_every_sample(tiny, workers):
    loader = StreamLoader(config(tiny, workers=workers), tiny.tokenizer, PACKS, 0, 1, seed=0)
    found = batches(loader, 10)
    assert [batch.number for batch in found] == list(range(40))
    assert not [event for batch in found for event in batch.events]
    assert len({key for batch in found for key in batch.keys}) == 35
    assert sum(batch.num_tokens for batch in found) / (40 * 192) > 0.9
    share = Counter(dataset for batch in found for dataset in batch.datasets)
    assert share[0] / share[1] == pytest.approx(2.0, rel=0.1)


def test_workers_make_the_packs_that_one_process_makes(tiny):
    alone, workers = (
        batches(StreamLoader(config(tiny, workers=count), tiny.tokenizer, PACKS, 0, 1, seed=0), 5) for count in (0, 3)
    )
    assert [(batch.keys, batch.input_ids.tolist()) for batch in alone] == [
        (batch.keys, batch.input_ids.tolist()) for batch in workers
    ]


def keys_of(shards):
    return {f"m{3 * shard + row:02d}" for shard in shards for row in range(3)}


class Ranks:
    """All ranks of a run in one process, step by step."""

    def __init__(self, tiny, made, world, state=None):
        self.loaders = [
            StreamLoader(made, tiny.tokenizer, 4, rank, world, seed=0, gather=self.gather) for rank in range(world)
        ]
        if state is not None:
            for loader in self.loaders:
                loader.load_state_dict(json.loads(json.dumps(state)))
        self.steps = [iter(loader) for loader in self.loaders]

    def gather(self, item):
        return self.gathered

    def step(self):
        parts = [next(step) for step in self.steps]
        return [key for part in parts for batch in part for key in batch.keys]

    def state(self):
        # as a collective, in which all ranks tell what they have before any of them goes on
        told = [(loader._given.copy(), loader._steps) for loader in self.loaders]
        self.gathered = [(given.done, given.tokens, steps) for given, steps in told]
        states = [loader.state_dict() for loader in self.loaders]
        assert all(state == states[0] for state in states)
        return states[0]


def test_ranks_read_shards_of_their_own(tiny, many):
    ranks = Ranks(tiny, many, 2)
    parts = [list(next(step)) for step in ranks.steps]
    assert [sorted(batch.number for batch in part) for part in parts] == [[0, 2], [1, 3]]
    first, second = ({key for batch in part for key in batch.keys} for part in parts)
    shards = [{int(key[1:]) // 3 for key in keys} for keys in (first, second)]
    assert not shards[0] & shards[1]


@pytest.mark.parametrize("worlds", [(1, 1), (1, 4), (4, 1), (2, 4), (4, 2)])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_resume_under_any_world_loses_no_sample_and_repeats_only_shards_under_way(tiny, many, worlds, steps):
    ranks = Ranks(tiny, many, worlds[0])
    before = [key for _ in range(steps) for key in ranks.step()]
    state = ranks.state()
    assert state["stream"]["packs"] == 4 * steps
    progress = Progress.from_json(state["stream"]["sources"]["many"])
    order = stream_order(8, 0, "many", progress.epoch)
    done = {order[place] for place in range(8) if progress.done.get(progress.epoch, 0) >> place & 1}
    rest = Ranks(tiny, many, worlds[1], state)
    after = [key for _ in range(40) for key in rest.step()]
    counts = Counter(before)
    assert all(counts[key] > progress.epoch for key in keys_of(done))
    assert len(set(after)) == 24
    if worlds[1] == 1:  # the rest of the epoch comes first; the pool of 4 lets that many of the next one pass
        rest_of_epoch = keys_of(set(range(8)) - done)
        assert set(after[: len(rest_of_epoch) - 4]) <= rest_of_epoch
    assert Progress.from_json(rest.state()["stream"]["sources"]["many"]).epoch > progress.epoch


def test_epochs_done_on_all_ranks_are_forgotten_and_the_packs_stay_the_same(tiny, many):
    plain, saved = Ranks(tiny, many, 2), Ranks(tiny, many, 2)
    for step in range(60):
        assert plain.step() == saved.step()
        if step % 5 == 4:
            state = saved.state()
            held = [loader._given.done["many"] for loader in saved.loaders]
            assert max(map(len, held)) <= 3
    assert state == plain.state()
    assert state["stream"]["sources"]["many"]["epoch"] > 6
    resumed = Ranks(tiny, many, 2, state)
    again = Ranks(tiny, many, 2, plain.state())
    assert [resumed.step() for _ in range(5)] == [again.step() for _ in range(5)]


def test_progress_counts_whole_epochs_and_keeps_the_rest_as_a_place_and_bits():
    progress = Progress(2, {2: 0b0001})
    merged = progress.plus([{2: 0b0110, 3: 0b1011}, {2: 0b1000, 4: 0b1000}], 4)
    assert merged == Progress(3, {3: 0b1011, 4: 0b1000})
    assert merged.to_json() == {"epoch": 3, "places": {"3": [2, "2"], "4": [0, "8"]}}
    assert Progress.from_json(merged.to_json()) == merged


def test_the_state_does_not_grow_with_the_shards():
    """64 ranks took their shards in turn; the slowest is 20 shards behind the fastest, everywhere in the epoch."""
    sizes = []
    for num_shards in (10_000, 1_000_000):
        done = 0
        for rank in range(64):
            ahead = num_shards // 128 - rank % 21
            done |= sum(1 << rank + 64 * turn for turn in range(ahead - 21, ahead))
        done |= (1 << 64 * (num_shards // 128 - 41)) - 1
        progress = Progress(5, {5: done})
        assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
        sizes.append(len(json.dumps(progress.to_json())))
    assert sizes[1] < sizes[0] + 10 < 1000


def test_fewer_shards_than_ranks_is_an_error_with_the_remedy(tiny):
    with pytest.raises(ValueError, match=r"source 'pictures' has 3 shards for 4 ranks: .*reader=index"):
        StreamLoader(config(tiny), tiny.tokenizer, PACKS, 0, 4, seed=0)


def test_shares_that_need_sizes_are_refused(tiny):
    made = config(tiny)
    sources = {name: replace(source, weight=1.0, epochs=2.0) for name, source in made.sources.items()}
    with pytest.raises(ValueError, match="epochs and size_temperature need the sources' sizes"):
        StreamLoader(replace(made, sources=sources), tiny.tokenizer, PACKS, 0, 1, seed=0)


def test_states_of_the_two_readers_are_not_mixed_up(tiny):
    state = StreamLoader(config(tiny), tiny.tokenizer, PACKS, 0, 1, seed=0).state_dict()
    from data_pipelines.loader import PackLoader

    with pytest.raises(ValueError, match="reader: was webdataset, is None"):
        PackLoader(tiny.config(), tiny.tokenizer, PACKS, 0, 1, seed=0).load_state_dict(state)


def test_changed_shards_begin_an_epoch_by_the_flag_only(tiny, many, tmp_path):
    loader = StreamLoader(many, tiny.tokenizer, 4, 0, 1, seed=0)
    batches(loader, 2)
    state = loader.state_dict()
    (tmp_path / "many-00003.tar").unlink()
    changed = StreamLoader(many, tiny.tokenizer, 4, 0, 1, seed=0)
    with pytest.raises(ValueError, match=r"source many: was \[8, .*is \[7, .*data_change=accept"):
        changed.load_state_dict(state)
    notes = changed.load_state_dict(state, accept_changes=True)
    epoch = state["stream"]["sources"]["many"]["epoch"]
    assert notes[0] == f"source many is new or its shards changed: it begins epoch {epoch + 1}"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_and_broken_samples_reach_the_ledger(tiny, many, tmp_path, workers):
    path = tmp_path / "many-00003.tar"
    data = path.read_bytes()
    path.write_bytes(spoilt(data, 2048))  # a text's sample takes two blocks: m09 and m10 stay, m11 is lost
    more = tar_bytes(("bad.json", b'{"messages": []}'), ("m99.json", b'{"text": "a dog"}'))
    (tmp_path / "many-00008.tar").write_bytes(more)
    made = replace(many, loader=replace(many.loader, num_workers=workers))
    loader = StreamLoader(made, tiny.tokenizer, 4, 0, 1, seed=0)
    found = batches(loader, 12)
    assert {"m09", "m10", "m99"} <= {key for batch in found for key in batch.keys}
    assert not {"m11", "bad"} & {key for batch in found for key in batch.keys}
    told = {(event.dataset, event.reason) for batch in found for event in batch.events}
    assert told == {("many", "bad_header"), ("many", "no_messages")}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_opened_ends_the_run_with_its_name(tiny, many, tmp_path, workers):
    made = replace(many, loader=replace(many.loader, num_workers=workers))
    loader = StreamLoader(made, tiny.tokenizer, 4, 0, 1, seed=0)
    for path in tmp_path.glob("many-*.tar"):
        path.unlink()
    with pytest.raises(ShardError, match=r"many-0000\d.tar: cannot be opened: No such file"):
        next(iter(loader))
    loader.close()


def test_a_source_without_usable_samples_is_an_error_with_the_reasons(tiny, many, tmp_path):
    for path in tmp_path.glob("many-*.tar"):
        path.write_bytes(tar_bytes((f"{path.stem}.json", b'{"messages": []}')))
    with pytest.raises(ShardError, match=r"source 'many' has no usable sample: no_messages \(8\)"):
        next(iter(StreamLoader(many, tiny.tokenizer, 4, 0, 1, seed=0)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tar.bz2", bz2.compress(os.urandom(2000)), r"bad_header \(1\). compressed with bzip2: decompress it"),
        ("x.jsonl", b'{"text": "a dog"}\n' * 100, r"bad_header \(1\). no tar header .*it begins with b'{.text"),
    ],
)
def test_files_that_are_no_tars_are_told_with_what_one_of_them_says(tiny, many, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    sources = {"many": replace(many.sources["many"], shards=(f"{tmp_path}/{name}",))}
    with pytest.raises(ShardError, match=f"source 'many' has no usable sample: {message}"):
        next(iter(StreamLoader(replace(many, sources=sources), tiny.tokenizer, 4, 0, 1, seed=0)))


def test_a_pipe_as_a_shard_is_refused_with_the_reason(tiny, many, tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    sources = {"many": replace(many.sources["many"], shards=(f"{tmp_path}/pipe.tar",))}
    with pytest.raises(
        ShardError, match=r"no shard matches '.*pipe.tar': it is no file, and shards are read every epoch"
    ):
        StreamLoader(replace(many, sources=sources), tiny.tokenizer, 4, 0, 1, seed=0)


def children():
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(child) for child in listed]


def test_a_killed_stream_goes_on_and_is_noted(tiny, many):
    others = children()  # of tests before this one
    made = replace(many, loader=replace(many.loader, num_workers=1))
    first = StreamLoader(made, tiny.tokenizer, 4, 0, 1, seed=0)
    found = [*next(iter(first))]
    first.close()
    loader = StreamLoader(made, tiny.tokenizer, 4, 0, 1, seed=0)
    loader.load_state_dict(first.state_dict())  # packs are numbered over the whole run
    steps = iter(loader)
    found += next(steps)
    os.kill(loader._feed.feed.pid, signal.SIGKILL)
    # the pipe still holds what was packed before: hundreds of packs as small as these
    while len(found) < 4000 and not any(batch.events for batch in found[-4:]):
        found += next(steps)
        loader.state_dict()  # forgets epochs, also for the process that is started anew
    for _ in range(12):
        found += next(steps)
    loader.close()
    assert [batch.number for batch in found] == list(range(len(found)))
    ((number, event),) = ((batch.number, event) for batch in found for event in batch.events)
    assert (event.key, event.reason) == (f"pack {number}", "worker_replaced")
    assert len({key for batch in found for key in batch.keys}) == 24
    assert not set(children()) - set(others)


def test_a_stopped_stream_is_replaced_and_noted_with_its_shard(tiny, many):
    made = replace(many, loader=replace(many.loader, num_workers=1, sample_timeout_s=1.0))
    loader = StreamLoader(made, tiny.tokenizer, 4, 0, 1, seed=0)
    steps, found = iter(loader), []
    found += next(steps)
    os.kill(loader._feed.feed.pid, signal.SIGSTOP)
    while len(found) < 4000 and not any(batch.events for batch in found[-4:]):
        found += next(steps)
    loader.close()
    ((message,),) = ([event.message for event in batch.events] for batch in found if batch.events)
    assert re.match(r"the process that streams the shards stood still for 2 s at .*/many-0000\d.tar; ", message)


def test_the_stream_is_named_while_it_is_waited_for_and_no_worker(tiny, many):
    made = replace(many, loader=replace(many.loader, num_workers=2))
    loader = StreamLoader(made, tiny.tokenizer, 4, 0, 1, seed=0)
    steps = iter(loader)
    next(steps)
    pid = loader._feed.feed.pid
    os.kill(pid, signal.SIGSTOP)
    over, deadline = threading.Event(), time.monotonic() + 60

    def train():
        while not over.is_set():
            next(steps)

    training = threading.Thread(target=train)
    training.start()
    try:
        while "the process that streams" not in str(loader.under_way()) and time.monotonic() < deadline:
            time.sleep(0.01)
        said = loader.under_way()
    finally:
        over.set()
        os.kill(pid, signal.SIGCONT)
        training.join()
        loader.close()
    assert len(said) == 1
    assert re.match(rf".*/many-0000\d.tar \(the process that streams the shards, process {pid}, for \d+ s\)", said[0])


def resident_shared():
    """Bytes of shared memory that this process has touched."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssShmem"))
    return int(line.split()[1]) << 10


def test_packs_with_large_media_stay_within_prefetch_mb(tiny, tmp_path):
    """A sample a pack, of 3 MB as stored; a slot for its tensors takes 1 MB."""
    with (tmp_path / "large.tar").open("wb") as file:
        for number in range(12):
            data = tar_bytes((f"{number}.json", b'{"text": "a red dog sits"}'), (f"{number}.bin", os.urandom(3 << 20)))
            file.write(data[: 2 * 512 + 512 + (3 << 20)])
        file.write(bytes(1024))
    made = config(tiny, workers=1)
    sources = {"large": replace(made.sources["texts"], shards=(f"{tmp_path}/large.tar",))}
    plan = replace(made.plan, packing="single", max_tokens=64, max_patches=64)
    settings = replace(made.loader, prefetch_factor=6, prefetch_mb=12)
    loader = StreamLoader(replace(made, sources=sources, plan=plan, loader=settings), tiny.tokenizer, 1, 0, 1, seed=0)
    before, most, keys = resident_shared(), 0, set()
    for _, (batch,) in zip(range(24), loader, strict=False):
        most = max(most, resident_shared() - before)
        keys.update(batch.keys)
    loader.close()
    assert len(keys) == 12
    assert 3 << 20 < most < 13 << 20


def test_a_stream_from_urls_is_the_one_from_the_disk(tiny, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    from http_server import serve

    monkeypatch.setenv("no_proxy", "*")
    local = config(tiny)
    expected = batches(StreamLoader(local, tiny.tokenizer, PACKS, 0, 1, seed=0), 4)
    with serve(tiny.folder) as (address, faults):
        remote = RemoteConfig(str(tmp_path / "cache"), cache_mb=2, block_kb=4, backoff_s=0.01, timeout_s=10.0)
        made = replace(config(tiny, address, workers=1), remote=remote)
        for fault in ({}, {"cut": 2, "busy": 2}, {"ranges": False, "cut": 1}, {"ranges": False, "tell_size": False}):
            faults.__dict__.update(ranges=True, tell_size=True)
            faults.__dict__.update(fault)
            found = batches(StreamLoader(made, tiny.tokenizer, PACKS, 0, 1, seed=0), 4)
            assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    assert not list(tmp_path.rglob("blocks/*/*"))  # read once: nothing is kept


def side_files(folder):
    return {path.name: path.read_bytes() for path in (folder / ".index").glob("*.index")}


@pytest.mark.parametrize("workers", [0, 1])
def test_whole_tars_have_their_index_once_they_were_streamed(tiny, tmp_path, workers):
    for path in tiny.folder.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    made = config(tiny, tmp_path, workers=workers)
    batches(StreamLoader(made, tiny.tokenizer, PACKS, 0, 1, seed=0), 12)
    streamed = side_files(tmp_path)
    for path in sorted(tmp_path.glob("*.tar")):
        load_index(str(path), rebuild=True)
    assert streamed == side_files(tmp_path)
    assert len(streamed) == 5


def test_tars_that_lost_something_and_compressed_ones_get_no_index_by_streaming(tiny, many, tmp_path):
    first, second, third, fourth, *_ = sorted(tmp_path.glob("many-*.tar"))
    first.write_bytes(spoilt(first.read_bytes(), 2048))
    second.write_bytes(first.read_bytes()[:2048])  # whole samples, no end marker
    third.write_bytes(tar_bytes(("bad.json", b'{"messages": []}'), ("m99.json", b'{"text": "a dog"}')))
    fourth.write_bytes(gzip.compress(fourth.read_bytes()))
    batches(StreamLoader(many, tiny.tokenizer, 4, 0, 1, seed=0), 12)
    assert set(side_files(tmp_path)) == {f"many-0000{number}.tar.index" for number in range(4, 8)}


def test_an_index_that_is_there_is_left_alone(tiny, many, tmp_path):
    path = tmp_path / "many-00000.tar"
    load_index(str(path))
    (before,) = (tmp_path / ".index").glob("*.index")
    time_ns = before.stat().st_mtime_ns
    batches(StreamLoader(many, tiny.tokenizer, 4, 0, 1, seed=0), 12)
    assert before.stat().st_mtime_ns == time_ns
    assert len(side_files(tmp_path)) == 8


def test_a_shard_that_changed_while_it_was_streamed_gets_no_index(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(("a.json", b'{"text": "a dog"}')))
    facts = StreamedFacts(str(path))
    facts.add(Record("a", "text", (), {}))
    path.write_bytes(tar_bytes(("a.json", b'{"text": "a cat"}')))
    os.utime(path, ns=(1, 1))
    facts.keep()
    assert not side_files(tmp_path)
