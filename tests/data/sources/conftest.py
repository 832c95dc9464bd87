"""Fixtures for imports: small pictures on disk, and what an import wrote, read back."""

import io
import json
import tarfile
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode.record import parse_record
from data_pipelines.sources.importer import run_import
from data_pipelines.sources.shard_groups import ImportSettings


@dataclass
class Imported:
    """What a folder of shards holds: records by key, media bytes by (key, name), ledger lines, the manifest."""

    report: object
    records: dict = field(default_factory=dict)
    media: dict = field(default_factory=dict)
    ledger: list = field(default_factory=list)
    manifest: dict = field(default_factory=dict)

    def only(self):
        (record,) = self.records.values()
        return record

    def reasons(self):
        return [(line["key"], line["reason"]) for line in self.ledger]


def read_back(out, report=None):
    imported = Imported(report)
    imported.manifest = json.loads((out / "manifest.json").read_text())
    imported.ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    for shard in imported.manifest["shards"]:
        members = {}
        with tarfile.open(out / shard["path"]) as tar:
            for info in tar:
                folder, _, base = info.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                members.setdefault(key, {})[suffix] = tar.extractfile(info).read()
        for key, held in members.items():
            present = {name: data if name == "json" else None for name, data in held.items()}
            imported.records[key] = parse_record(key, present)
            imported.media |= {(key, name): data for name, data in held.items() if name != "json"}
    return imported


@pytest.fixture
def load(tmp_path):
    """Run an import of entries into a fresh folder and read it back."""

    def run(entries, name="test", **settings):
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        report = run_import(entries, ImportSettings(out, name, "test", {}, **settings), lambda _: None)
        return read_back(out, report)

    return run


def picture_bytes(width=40, height=20, form="JPEG", orientation=None, seed=0):
    """A picture whose top left quarter is red on blue, so that turning it can be seen."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:] = (0, 0, 200 + seed % 50)
    pixels[: height // 2, : width // 2] = (220, 0, 0)
    file = io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, form, **({"exif": exif} if orientation else {}))
    return file.getvalue()


@pytest.fixture
def make_picture(tmp_path):
    """Write a picture below tmp_path."""

    def write(name, **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes(**options))
        return path

    return write


@pytest.fixture
def write_json(tmp_path):
    """Write JSON (or JSON lines, by the extension) below tmp_path."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = content if name.endswith(".jsonl") else [content]
        path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
        return path

    return write


def clip_bytes(frames=10, width=32, height=16, rate=10):
    """A small H.264 clip in mp4."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            pixels = np.full((height, width, 3), 20 * number % 255, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()
