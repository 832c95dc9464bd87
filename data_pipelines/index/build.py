"""Build the side files of shards: on first need, cached, shared between ranks, stale only when the content changes.

Enters: a shard, and for the text column a tokenizer and template. Leaves: side files in `.index/` beside the shard, or
in a cache folder where that cannot be written. Costs one pass over the shard's headers and records, and over the media
whose dimensions the records do not state: about 0.1 ms a sample and 0.05 ms for each media header.

A sample that cannot be used is left out of the index, or has -1 text tokens, and is listed under `problems`; nothing
else is lost. Processes that need the same file share the work: a lock a shard, and files appear by rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import data_pipelines
from data_pipelines.config import MediaConfig, RemoteConfig, Template
from data_pipelines.decode.video import ClipDecoder
from data_pipelines.encode.chat import is_truncatable, tokenize_record
from data_pipelines.errors import DataError, ShardError
from data_pipelines.index.layout import measure_sample, read_sample, scan_shard
from data_pipelines.index.places import side_places
from data_pipelines.index.read import media_refs
from data_pipelines.index.roll import Roll
from data_pipelines.index.samples import FORMAT, IndexRow, ShardIndex, index_columns
from data_pipelines.index.table import Array, ColumnError, Columns, write_columns
from data_pipelines.shards.names import is_remote
from data_pipelines.shards.storage import REMOTE_DEFAULTS, ShardFile, open_shard, read_beside
from data_pipelines.whole import write_whole

if TYPE_CHECKING:
    from data_pipelines.tokenizer import TextTokenizer

Progress = Callable[[str, int, int], None]
Built = tuple[dict[str, Array], dict[str, Any]]

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


def load_index(shard: str, remote: RemoteConfig = REMOTE_DEFAULTS) -> ShardIndex:
    """The index of `shard`, built if it is absent or stale.

    Raises:
        ShardError: the shard cannot be read.
    """
    with _opened(shard, remote) as file:
        return ShardIndex(_load_or_build(file, "index", {}, lambda: _build_index(file)))


def load_text_tokens(
    shard: str, index: ShardIndex, counting: Counting, remote: RemoteConfig = REMOTE_DEFAULTS
) -> Columns:
    """The text column of `shard`: array `tokens` int32 [n], -1 where the text cannot be encoded (see its problems)."""
    with _opened(shard, remote) as file:
        rows = {"rows": index.fingerprint}
        return _load_or_build(file, f"text-{counting.name}", rows, lambda: _count_text(file, index, counting))


def build_missing(
    shards: Sequence[str],
    counting: Counting | None,
    processes: int | None = None,
    progress: Progress | None = None,
    remote: RemoteConfig = REMOTE_DEFAULTS,
) -> None:
    """Build what is absent or stale for all `shards`; `progress(shard, done, total)` is called after each.

    `counting` None builds the indices alone, `processes` None uses this machine's cores where the shards are large.
    Processes of one or several machines may call this at once: each takes the shards that no other is at.

    Raises:
        ShardError: a shard cannot be read; the others are finished first.
    """
    if counting is not None:
        known = Roll(shards, counting.name, remote).known
        shards = [shard for shard in shards if shard not in known]
    # Threads, because a remote shard takes several requests to look at; local ones are done in the same breath.
    with ThreadPoolExecutor(remote.max_requests if any(map(is_remote, shards)) else 1) as pool:
        sizes = list(pool.map(lambda shard: _stale_bytes(shard, counting, remote), shards))
    missing = [shard for shard, size in zip(shards, sizes, strict=True) if size is not None]
    large = sum(size or 0 for size in sizes) > PARALLEL_FROM_BYTES
    count = min(len(missing), len(os.sched_getaffinity(0)) if processes is None else processes)
    errors = []
    results = _build_each(missing, counting, count if large or processes else 1, remote)
    for done, (shard, error) in enumerate(results, 1):
        errors += [error] if error is not None else []
        if progress is not None:
            progress(shard, done, len(missing))
    if errors:
        raise errors[0]


def _build_each(
    shards: Sequence[str], counting: Counting | None, processes: int, remote: RemoteConfig
) -> Iterator[tuple[str, ShardError | None]]:
    if processes > 1:
        # Spawned, not forked: the caller may hold threads of torch or CUDA.
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(_build, shard, counting, remote): shard for shard in shards}
            for future in as_completed(futures):
                yield futures[future], future.result()
        return
    # First what no other process is at; then wait for those that others build.
    busy = []
    for shard in shards:
        with _lock(shard, wait=False) as held:
            if held:
                yield shard, _build(shard, counting, remote)
            else:
                busy.append(shard)
    for shard in busy:
        with _lock(shard, wait=True):
            yield shard, _build(shard, counting, remote)


def _build(shard: str, counting: Counting | None, remote: RemoteConfig) -> ShardError | None:
    """Build both side files of one shard; an unreadable shard is returned, so that the others go on."""
    try:
        index = load_index(shard, remote)
        if counting is not None:
            load_text_tokens(shard, index, counting, remote)
    except ShardError as error:
        return error
    return None


def _build_index(file: ShardFile) -> Built:
    """Scan, parse and measure one shard; a clip that exceeds the decoders' deadline costs its sample alone."""
    with closing(ClipDecoder(timeout_s=MediaConfig.decode_timeout_s)) as clips:
        return _index_samples(file, clips)


def _index_samples(file: ShardFile, clips: ClipDecoder) -> Built:
    scan = scan_shard(file)
    problems: list[DataError] = list(scan.problems)
    rows = []
    for sample in scan.samples:
        try:
            record = measure_sample(sample.key, sample.members, file, clips)
        except DataError as error:
            problems.append(error)
            continue
        medias = [(record.media[ref.name], ref) for ref in media_refs(record)]
        rows.append(IndexRow(sample.key, record.task, sample.members, medias))
    arrays, meta = index_columns(rows)
    return arrays, {**meta, **_listed(problems)}


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


def _load_or_build(file: ShardFile, kind: str, facts: dict[str, Any], build: Callable[[], Built]) -> Columns:
    identity = {**_identity(file), **facts}
    fresh = _find(file.name, kind, identity) or _find_published(file, kind, identity)
    if fresh is not None:
        return fresh
    return keep_side_file(file, kind, facts, build())


def keep_side_file(file: ShardFile, kind: str, facts: Mapping[str, Any], built: Built) -> Columns:
    """Write what was built where it belongs, with what says which content and `facts` it belongs to."""
    identity = {**_identity(file), **facts}
    arrays, meta = built
    *beside, spare = side_places(file.name, kind)
    for path in beside:
        with suppress(OSError):  # a read-only data set
            write_columns(path, arrays, {**meta, **identity})
            return Columns(path)
    write_columns(spare, arrays, {**meta, **identity})
    return Columns(spare)


def _identity(file: ShardFile) -> dict[str, Any]:
    """What says that a side file belongs to this content."""
    return {"format": FORMAT, "size": file.size, "tag": file.tag()}


def _find(shard: str, kind: str, identity: dict[str, Any]) -> Columns | None:
    """A side file that belongs to exactly this content, or None."""
    for path in side_places(shard, kind):
        try:
            columns = Columns(path)
        except ColumnError:
            continue
        if all(columns.meta.get(name) == value for name, value in identity.items()):
            return columns
    return None


def _find_published(file: ShardFile, kind: str, identity: dict[str, Any]) -> Columns | None:
    """A side file that was uploaded with a remote shard (`.index/` beside it), copied into the cache; or None."""
    if not is_remote(file.name):
        return None
    data = read_beside(file, f".index/{os.path.basename(file.name)}.{kind}")
    if data is None:
        return None
    (path,) = side_places(file.name, kind)
    write_whole(path, data)
    return _find(file.name, kind, identity)


def _stale_bytes(shard: str, counting: Counting | None, remote: RemoteConfig) -> int | None:
    """The size of a shard whose side files are absent or stale; None: they are fresh; 0: it cannot be read."""
    try:
        with _opened(shard, remote) as file:
            identity = _identity(file)
            index = _find(shard, "index", identity)
            if index is None or counting is None:
                return file.size if index is None else None
            identity["rows"] = ShardIndex(index).fingerprint
            return None if _find(shard, f"text-{counting.name}", identity) else file.size
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
