"""What is wrong with a shard: its bytes, its tar structure, its records, every picture and every clip.

Enters: a shard, or a part of one. Leaves: findings, (shard, key, reason, message) each, in reading order. It asks the
functions that training asks (scan, records, decoders, budgets), so what passes here is not left out of a run. Costs
what decoding costs: 2 ms for a picture of 0.3 megapixels, one CPU second for a clip whose frames are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipelines.config import MediaConfig, PlanConfig, RemoteConfig, Template
from data_pipelines.decode.image import decode_image, probe_image
from data_pipelines.decode.members import media_kind
from data_pipelines.decode.video import ClipDecoder
from data_pipelines.encode.budget import plan_media, within_patches
from data_pipelines.encode.sample import SampleEncoder
from data_pipelines.errors import DataError, MediaError, ShardError
from data_pipelines.index.layout import measure_sample, read_sample, scan_shard
from data_pipelines.index.read import media_refs, read_member, read_record, with_media
from data_pipelines.ledger import LOSSLESS
from data_pipelines.samples import Media, MediaRef, Record
from data_pipelines.shards.names import file_of, is_lines, public_name
from data_pipelines.shards.storage import REMOTE_DEFAULTS, ShardFile, open_shard, read_beside
from data_pipelines.shards.tar import TarSample, TarScan
from data_pipelines.tokenizer import TextTokenizer

PART_BYTES = 64 << 20
NO_SAMPLES = "a sound shard without a single sample: is it another program's, or were its names no samples'?"
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `key` is "" for the shard itself; `lost` whether a run goes without something for it."""

    shard: str
    key: str
    reason: str
    message: str
    lost: bool

    @classmethod
    def of(cls, shard: str, key: str, reason: str, message: str) -> Finding:
        """A finding; whether it costs samples follows from its reason."""
        return cls(public_name(shard), key, reason, message, reason not in LOSSLESS)


@dataclass(frozen=True)
class CheckSettings:
    """How deep to look: `read_frames` decodes the frames a run would sample (else clips are opened, one frame decoded).

    With a tokenizer (a folder) the text is encoded too, and samples that fit no pack are found.
    """

    media: MediaConfig = field(default_factory=MediaConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    template: Template = "plain"
    tokenizer: str | None = None
    read_frames: bool = True
    remote: RemoteConfig = REMOTE_DEFAULTS

    @property
    def media_limits(self) -> MediaConfig:
        """`media` in a pack of `plan`."""
        return within_patches(self.media, self.plan.max_patches)


@dataclass(frozen=True, slots=True)
class ShardPart:
    """Every `count`-th sample of a shard, from number `number` on: large shards are shared among processes.

    Part 0 also looks at the shard as a whole.
    """

    shard: str
    number: int
    count: int

    @classmethod
    def all_of(cls, shard: str, size: int) -> list[ShardPart]:
        """The parts of a shard of `size` bytes, about 64 MB each."""
        count = max(1, -(-size // PART_BYTES))
        return [cls(shard, number, count) for number in range(count)]


class PartChecker:
    """The samples of one part, one by one: `keys[i]` and what `check(i)` finds. `close` ends the clip decoder.

    `whole` is what is wrong with the shard itself (part 0 only), which reads all its bytes.
    """

    def __init__(self, part: ShardPart, settings: CheckSettings) -> None:
        self._part, self._settings = part, settings
        self._file: ShardFile | None = None
        self._scan = TarScan([], [])
        self._opening: list[ShardError] = []
        try:
            self._file = open_shard(part.shard, settings.remote)
            self._scan = scan_shard(self._file)
        except ShardError as error:
            self._opening.append(error)
        self._samples = self._scan.samples[part.number :: part.count]
        self.keys = [sample.key for sample in self._samples]
        self._clips = ClipDecoder(settings.media.video_backend, settings.media.decode_timeout_s)
        self._encoder: SampleEncoder | None = None

    def whole(self, alive: Callable[[], None] = lambda: None) -> list[Finding]:
        """Findings of the shard itself: unreadable bytes, tar structure, a manifest that says otherwise.

        `alive` is called after each MiB: reading a large shard takes longer than a sample may.
        """
        if self._part.number:
            return []
        problems = [*self._opening, *self._scan.problems]
        if self._file is not None:
            problems += _unreadable_or_changed(self._file, len(self._scan.samples), alive)
            if not self._scan.samples and all(problem.reason in LOSSLESS for problem in problems):
                problems.append(ShardError(self._part.shard, "no_samples", NO_SAMPLES))
        return [self._finding(key_in(problem.key, public_name(self._part.shard)), problem) for problem in problems]

    def check(self, number: int) -> list[Finding]:
        """Findings of sample `number`: several where several of its members are bad."""
        sample = self._samples[number]
        try:
            return [self._finding(sample.key, error) for error in self._problems(sample)]
        except Exception as error:  # decoders raise what they like: one sample must not end the check
            return [self._finding(sample.key, DataError(sample.key, "unexpected_error", _describe(error)))]

    def size(self, number: int) -> int:
        """Bytes of the sample's members."""
        return sum(member.size for member in self._samples[number].members.values())

    def close(self) -> None:
        """End the decoder process and close the shard."""
        self._clips.close()
        if self._file is not None:
            self._file.close()

    def _finding(self, key: str, problem: DataError) -> Finding:
        return Finding.of(self._part.shard, key, problem.reason, problem.message)

    def _problems(self, sample: TarSample) -> Iterator[DataError]:
        try:
            record, read = self._record(sample)
        except DataError as error:
            yield error
            return
        facts: dict[str, Media] = {}
        for ref in {ref.name: ref for ref in media_refs(record)}.values():
            try:
                facts[ref.name] = self._check_media(record, ref, read(ref.name))
            except DataError as error:
                yield error
        if len(facts) == len({ref.name for ref in media_refs(record)}):
            yield from self._misfits(record, facts)

    def _record(self, sample: TarSample) -> tuple[Record, Callable[[str], bytes]]:
        """The sample's record, with the facts it states itself, and a function that reads a media member."""
        assert self._file is not None
        key, members, file = sample.key, sample.members, self._file
        if is_lines(file.name):
            return read_sample(key, members, file, measure_sample(key, members, file, self._clips).media)
        return read_record(key, members, file), lambda name: read_member(key, name, members[name], file)

    def _check_media(self, record: Record, ref: MediaRef, data: bytes) -> Media:
        """Open and decode one member; its facts as training takes them (the record's, where it states them)."""
        key, limits = record.key, self._settings.media_limits
        if len(data) > limits.max_source_bytes:
            message = f"{ref.name} has {len(data)} bytes, over max_source_bytes={limits.max_source_bytes}"
            raise MediaError(key, "too_many_bytes", message)
        stated = record.media.get(ref.name)
        if (ref.kind or media_kind(ref.name)) == "video":
            found = self._clips.probe(data, ref.name, key)
        else:
            found = probe_image(data, ref.name, key)
            decode_image(data, key, limits.max_source_pixels)
        if stated is not None and (stated.width, stated.height) != (found.width, found.height):
            message = (
                f"{ref.name} shows {found.width} x {found.height} pixels, the record says {stated.width} x "
                f"{stated.height}; correct the record's media facts"
            )
            raise MediaError(key, "size_mismatch", message)
        # Aspect ratio and, for clips, how many frames a run would take; text is counted below.
        plan = plan_media([(found, ref)], 0, limits, self._settings.plan.max_tokens, key)[0]
        if found.kind == "video" and self._settings.read_frames:
            if found.width * found.height > limits.max_source_pixels:
                message = f"{ref.name}: frames of {found.width} x {found.height} pixels"
                raise MediaError(key, "too_many_pixels", f"{message}, over {limits.max_source_pixels}")
            # The frames of the plan, two tokens large: decoding is what is tested, resizing costs.
            self._clips.read(data, found, replace(plan, grid_thw=(plan.grid_thw[0], 2, 4)), key)
        return stated if stated is not None and (stated.kind == "image" or stated.duration_s or stated.fps) else found

    def _misfits(self, record: Record, facts: Mapping[str, Media]) -> Iterator[DataError]:
        """Boxes outside their pictures; with a tokenizer also text without an encoding and samples over the budgets."""
        try:
            record = with_media(record, facts)
            if self._settings.tokenizer is not None:
                if self._encoder is None:
                    tokenizer, settings = TextTokenizer(self._settings.tokenizer), self._settings
                    self._encoder = SampleEncoder(
                        tokenizer, settings.template, settings.media_limits, settings.plan.max_tokens
                    )
                self._encoder.count(record)
        except DataError as error:
            yield error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def key_in(key: str, shard: str) -> str:
    """The sample's part of a scan problem's key ("SHARD/KEY"), "" for the shard itself."""
    return key.removeprefix(shard).removeprefix("/")


def _unreadable_or_changed(file: ShardFile, num_samples: int, alive: Callable[[], None]) -> Iterator[ShardError]:
    """Read every byte; hold size, checksum and samples against the manifest beside the shard, where one lists it."""
    digest = hashlib.sha256()
    try:
        for offset in range(0, file.size, _BLOCK):
            digest.update(file.read(offset, min(_BLOCK, file.size - offset)))
            alive()
    except ShardError as error:
        yield error
        return
    listed = _manifest_entry(file)
    found = {"bytes": file.size, "records": num_samples, "sha256": digest.hexdigest()}
    for name, value in found.items():
        if name in listed and listed[name] != value:
            message = f"manifest.json lists {name} {listed[name]}, the shard has {value}: copy or import it again"
            yield ShardError(file.name, "not_as_in_manifest", message)


def _manifest_entry(file: ShardFile) -> dict[str, Any]:
    """What `manifest.json` beside the shard says of it; {} where there is none, or it is another program's."""
    shard = Path(file_of(file.name))
    try:
        data = read_beside(file, "manifest.json") or (shard.parent / "manifest.json").read_bytes()
        listed = json.loads(data)["shards"]
        return next((dict(entry) for entry in listed if entry["path"] == shard.name), {})
    except (OSError, ValueError, KeyError, TypeError):
        return {}
