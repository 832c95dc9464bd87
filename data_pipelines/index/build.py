"""Build the side files of shards: on first need, cached, shared between ranks, stale only when the content changes.

Enters: a shard, and for the text column a tokenizer and template. Leaves: side files in `.index/` beside the shard, or
in a cache folder where that cannot be written. Costs one pass over the shard's headers and records, and over the media
whose dimensions the records do not state: about 0.1 ms a sample and 0.05 ms for each media header. Where only the time
of a shard's last change is another (a copy; or a record mended at equal size), its headers and records are compared
with what was indexed, once.

A sample that cannot be used is left out of the index, or has -1 text tokens, and is listed under `problems`; nothing
else is lost. Processes that need the same file share the work: a lock a shard, and files appear by rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import data_pipelines
from data_pipelines.config import MediaConfig, RemoteConfig, Template
from data_pipelines.decode.video import ClipDecoder
from data_pipelines.encode.chat import is_truncatable, tokenize_record
from data_pipelines.errors import DataError, ShardError
from data_pipelines.index.layout import content_digest, measure_sample, read_sample, scan_shard
from data_pipelines.index.places import side_places
from data_pipelines.index.progress import Progress, progress_on_stderr
from data_pipelines.index.read import media_refs
from data_pipelines.index.roll import Roll, forget_rolls
from data_pipelines.index.samples import IndexRow, ShardIndex, index_columns
from data_pipelines.index.side_files import Built, find_side_file, has_time_of, keep_side_file
from data_pipelines.index.table import Columns
from data_pipelines.processes import end_of, map_in_processes
from data_pipelines.shards.names import is_remote, public_name
from data_pipelines.shards.storage import REMOTE_DEFAULTS, ShardFile, open_shard

if TYPE_CHECKING:
    from data_pipelines.tokenizer import TextTokenizer

PARALLEL_FROM_BYTES = 256 << 20
MAX_LISTED_PROBLEMS = 1000
_COUNTED_BY = ("decode/*.py", "encode/chat.py", "encode/boxes.py", "index/read.py", "index/lines.py", "tokenizer.py")


@dataclass(frozen=True)
class Counting:
    """What text tokens depend on beside the record: the tokenizer, the template, and this program's own rules."""

    tokenizer: TextTokenizer
    template: Template
    vision_ids: bool = False

    @cached_property
    def name(self) -> str:
        """Distinguishes the text columns of one shard.

        It holds a hash of the code that decides the tokens: counts by another version of it would break the plan.
        """
        digest = hashlib.blake2b(digest_size=4)
        folder = Path(data_pipelines.__file__).parent
        for pattern in _COUNTED_BY:
            for path in sorted(folder.glob(pattern)):
                digest.update(path.read_bytes())
        numbered = "-ids" if self.vision_ids else ""
        return f"{self.template}{numbered}-{self.tokenizer.fingerprint}-{digest.hexdigest()}"


def load_index(shard: str, remote: RemoteConfig = REMOTE_DEFAULTS, rebuild: bool = False) -> ShardIndex:
    """The index of `shard`, built if it is absent or stale, or to be rebuilt.

    Raises:
        ShardError: the shard cannot be read.
    """
    with _opened(shard, remote) as file:
        index = None if rebuild else _held_index(file)
        return index or ShardIndex(keep_side_file(file, "index", {}, _build_index(file)))


def load_text_tokens(
    shard: str,
    index: ShardIndex,
    counting: Counting,
    remote: RemoteConfig = REMOTE_DEFAULTS,
    rebuild: bool = False,
) -> Columns:
    """The text column of `shard`: array `tokens` int32 [n], -1 where the text cannot be encoded (see its problems)."""
    kind, rows = f"text-{counting.name}", {"rows": index.fingerprint}
    with _opened(shard, remote) as file:
        held = None if rebuild else find_side_file(file, kind, rows)
        return held or keep_side_file(file, kind, rows, _count_text(file, index, counting))


def build_missing(
    shards: Sequence[str],
    counting: Counting | None,
    processes: int | None = None,
    progress: Progress | None = None,
    remote: RemoteConfig = REMOTE_DEFAULTS,
    rebuild: bool = False,
) -> None:
    """Build what is absent or stale for all `shards`, as `try_to_build`.

    Raises:
        ShardError: a shard cannot be read; the others are finished first.
    """
    for error in try_to_build(shards, counting, processes, progress, remote, rebuild).values():
        raise error


def try_to_build(
    shards: Sequence[str],
    counting: Counting | None,
    processes: int | None = None,
    progress: Progress | None = None,
    remote: RemoteConfig = REMOTE_DEFAULTS,
    rebuild: bool = False,
) -> dict[str, ShardError]:
    """Build what is absent or stale for all `shards`; returns what is wrong with those that could not be read.

    `progress(shard, done, total)` is called after each.

    `counting` None builds the indices alone, `processes` None uses this machine's cores where the shards are large,
    `progress` None tells on stderr what takes longer than two seconds, `rebuild` builds anew what is there, too.
    Processes of one or several machines may call this at once: each takes the shards that no other is at.
    """
    if rebuild:
        forget_rolls(shards)
    missing, num_bytes = _missing(shards, counting, remote, rebuild)
    count = len(os.sched_getaffinity(0)) if processes is None else processes
    count = min(len(missing), count if num_bytes > PARALLEL_FROM_BYTES or processes else 1)
    build = partial(_build, counting=counting, remote=remote, rebuild=rebuild)
    errors = {}
    with progress_on_stderr(len(missing), progress) as tell, closing(_build_each(missing, build, count)) as results:
        for done, (shard, error) in enumerate(results, 1):
            if error is not None:
                errors[shard] = error
            tell(shard, done, len(missing))
    return errors


def _missing(
    shards: Sequence[str], counting: Counting | None, remote: RemoteConfig, rebuild: bool
) -> tuple[list[str], int]:
    """The shards to build, and their bytes."""
    if counting is not None and not rebuild:
        known = Roll(shards, counting.name, remote).known
        shards = [shard for shard in shards if shard not in known]
    # Threads, because a remote shard takes several requests to look at; local ones are done in the same breath.
    with ThreadPoolExecutor(remote.max_requests if any(map(is_remote, shards)) else 1) as pool:
        sizes = list(pool.map(lambda shard: _stale_bytes(shard, counting, remote, rebuild), shards))
    return [shard for shard, size in zip(shards, sizes, strict=True) if size is not None], sum(filter(None, sizes))


def _build_each(
    shards: Sequence[str], build: Callable[[tuple[str, bool]], _Outcome], processes: int
) -> Generator[tuple[str, ShardError | None], None, None]:
    """Each shard with what is wrong with it: first those that no other process is at, then those that others build."""
    for wait in (False, True):
        tasks = [(shard, wait) for shard in shards]
        results: Generator[tuple[tuple[str, bool], _Outcome], None, None]
        if processes > 1:
            results = map_in_processes(build, tasks, processes, _lost)
        else:
            results = ((task, build(task)) for task in tasks)
        busy = []
        with closing(results):
            for (shard, _), outcome in results:
                if outcome.done:
                    yield shard, outcome.error
                else:
                    busy.append(shard)
        shards = busy


@dataclass(frozen=True, slots=True)
class _Outcome:
    """`done`, or another process is at it; an unreadable shard is an `error` of its own, so that the others go on."""

    done: bool = True
    error: ShardError | None = None


def _build(task: tuple[str, bool], counting: Counting | None, remote: RemoteConfig, rebuild: bool) -> _Outcome:
    """Build both side files of one (shard, whether to wait for others that are at it)."""
    shard, wait = task
    with _lock(shard, wait) as held:
        if not held:
            return _Outcome(done=False)
        try:
            index = load_index(shard, remote, rebuild)
            if counting is not None:
                load_text_tokens(shard, index, counting, remote, rebuild)
        except ShardError as error:
            return _Outcome(error=error)
    return _Outcome()


def _lost(task: tuple[str, bool], code: int) -> _Outcome:
    message = f"the process that indexed it {end_of(code)}; `qwen2vl-data check` finds the sample"
    return _Outcome(error=ShardError(public_name(task[0]), "index_crashed", message))


def is_as_indexed(file: ShardFile, index: ShardIndex) -> bool:
    """Whether all that the index goes by is still so. Costs a pass over headers and records."""
    return content_digest(scan_shard(file), file) == str(index.columns.meta["content"])


def _held_index(file: ShardFile) -> ShardIndex | None:
    """The index that is there, if it still belongs to the shard."""
    held = find_side_file(file, "index", {})
    if held is None or has_time_of(held, file):
        return None if held is None else ShardIndex(held)
    # Of the same size and tag, but changed or copied since: blocks between those that the tag looks at may be others.
    if not is_as_indexed(file, ShardIndex(held)):
        return None
    return ShardIndex(keep_side_file(file, "index", {}, (held.arrays, held.meta)))


def _build_index(file: ShardFile) -> Built:
    """Scan, parse and measure one shard; a clip that exceeds the decoders' deadline costs its sample alone."""
    with closing(ClipDecoder(timeout_s=MediaConfig.decode_timeout_s)) as clips:
        return _index_samples(file, clips)


def _index_samples(file: ShardFile, clips: ClipDecoder) -> Built:
    scan = scan_shard(file)
    problems: list[DataError] = list(scan.problems)
    # Samples that miss a member which is a link are told, and counted, once.
    linked = {problem.key for problem in problems if problem.reason == "not_a_file"}
    rows = []
    for sample in scan.samples:
        try:
            record = measure_sample(sample.key, sample.members, file, clips)
        except DataError as error:
            if f"{file.name}/{sample.key}" not in linked:
                problems.append(error)
            continue
        medias = [(record.media[ref.name], ref) for ref in media_refs(record)]
        rows.append(IndexRow(sample.key, record.task, sample.members, medias))
    arrays, meta = index_columns(rows)
    return arrays, {**meta, "content": content_digest(scan, file), **_listed(problems)}


def _count_text(file: ShardFile, index: ShardIndex, counting: Counting) -> Built:
    """Text tokens of every sample: the tokens of its document without the runs of its media."""
    tokens = np.full(index.num_samples, -1, np.int32)
    truncatable = np.zeros(index.num_samples, np.uint8)
    problems: list[DataError] = []
    for row in range(index.num_samples):
        key = index.key(row)
        facts = {media.name: media for media, _ in index.media(row)}
        try:
            record, _ = read_sample(key, index.members(row), file, facts)
            tokenized = tokenize_record(record, counting.tokenizer, counting.template, facts, counting.vision_ids)
            tokens[row] = tokenized.text_tokens
            truncatable[row] = is_truncatable(record)
        except DataError as error:
            problems.append(error)
    return {"tokens": tokens, "truncatable": truncatable}, _listed(problems)


def _listed(problems: Sequence[DataError]) -> dict[str, Any]:
    """Problems as stored: counts are exact, the list is bounded (a million bad samples need no million sentences)."""
    listed = [(problem.key, problem.reason, problem.message) for problem in problems[:MAX_LISTED_PROBLEMS]]
    return {
        "problems": listed,
        "unlisted": dict(Counter(problem.reason for problem in problems[MAX_LISTED_PROBLEMS:])),
    }


@contextmanager
def _opened(shard: str, remote: RemoteConfig) -> Iterator[ShardFile]:
    file = open_shard(shard, remote)
    try:
        yield file
    finally:
        file.close()


def _stale_bytes(shard: str, counting: Counting | None, remote: RemoteConfig, rebuild: bool) -> int | None:
    """The size of a shard whose side files are absent or stale; None: they are fresh; 0: it cannot be read."""
    try:
        with _opened(shard, remote) as file:
            held = None if rebuild else find_side_file(file, "index", {}, published=False)
            if held is None or not has_time_of(held, file):
                return file.size
            if counting is None:
                return None
            rows = {"rows": ShardIndex(held).fingerprint}
            return None if find_side_file(file, f"text-{counting.name}", rows, published=False) else file.size
    except ShardError:
        return 0


@contextmanager
def _lock(shard: str, wait: bool) -> Iterator[bool]:
    """Hold the shard's lock; yields False at once if another has it and `wait` is not set.

    The lock saves work, rename gives safety: where a file system has no locks, both build and write the same bytes.
    """
    for path in side_places(shard, "lock"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            break
        except OSError:
            continue
    else:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            yield True
            return
        yield True
    finally:
        os.close(descriptor)
