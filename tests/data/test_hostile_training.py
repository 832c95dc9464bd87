"""All 157 broken and hostile items of the optional data folder on the way of training, against their expectations.

Pictures and clips go in as one tar, tars as they are, JSON as lines beside its media: index, count, read, decode,
encode. What an item may end as is read from its expectation in the manifest.
"""

import json
import re
import shutil

import pytest

from data_pipelines.config import MediaConfig
from data_pipelines.encode.sample import SampleEncoder
from data_pipelines.errors import DataError
from data_pipelines.index.build import Counting
from data_pipelines.index.source import SourceIndex
from data_pipelines.ledger import LOSSLESS
from data_pipelines.shards.writer import ShardWriter

pytestmark = pytest.mark.real_data

# Samples a tar trains on; where the expectation names no number, what it asks for was counted by hand.
TARS = {
    "good": 4, "truncated_in_member": 2, "no_end_blocks": 4, "bad_checksum": 0, "huge_claimed_size": 0,
    "path_traversal": 2, "links_devices": 1, "missing_json": 3, "missing_image": 3, "duplicate_key": 3,
    "interleaved_keys": 2, "empty_members": 1, "bad_json_member": 1, "html_image_member": 1, "unicode_dots_names": 2,
    "macos_junk": 1, "empty": 0, "zero_byte": 0, "not_a_tar": 0, "gzip_named": 0,
}  # fmt: skip
NOTHING_LOST = (
    "good",
    "no_end_blocks",
    "interleaved_keys",
    "unicode_dots_names",
    "macos_junk",
    "empty",
)
LINES = {"mixed": (2, 5), "crlf": (2, 0), "u2028": (2, 0), "no_final_newline": (2, 0)}
LOADS = re.compile(
    r"\bload|decodes|use |keep|resize|as image|one policy|repeat|round|sample by|one frame|cap at|subtract|at least 2"
    r"|every frame|apply|as rotated|caption-only|encode|last wins|put it first|truncate|convert|policy|reorder|clip\)"
    r"|normalise|no division"
)
LOST = re.compile(r"skip|refuse|drop|error|truncate|PIL warns|no division|skips|clear")


@pytest.fixture(scope="module")
def bad(shared_data):
    return shared_data / "bad"


@pytest.fixture(scope="module")
def items(bad):
    listed = json.loads((bad / "manifest.json").read_text())["items"]
    assert len(listed) == 157
    return listed


@pytest.fixture(scope="module")
def encoder(tiny):
    encoder = SampleEncoder(
        tiny.tokenizer, "plain", MediaConfig(max_pixels=256 * 784, video_max_pixels=256 * 784), 16384
    )
    yield encoder
    encoder.close()


def train(encoder, shard):
    """Keys that are encoded in full, and {key: reason} of what is lost."""
    source = SourceIndex("s", [str(shard)], Counting(encoder.tokenizer, encoder.template))
    lost = {key: reason for key, reason, _ in source.table(0).problems if reason not in LOSSLESS}
    keys = set()
    for row in range(source.num_samples):
        key = source.key(0, row)
        if key in lost:
            continue
        try:
            record, read = source.read(0, row)
            counts = encoder.count(record)
            document, _ = encoder.encode(record, read)
            assert len(document.input_ids) == counts.num_tokens
            keys.add(key)
        except DataError as error:
            lost[key] = error.reason
    source.close()
    return keys, lost


def as_expected(item, loaded, lost):
    """Whether an item may end so: trained on whole, or lost with exactly one reason."""
    said = item["expected"]
    if loaded:
        return not lost and bool(LOADS.search(said))
    return lost == 1 and (bool(LOST.search(said)) or not LOADS.search(said))


def test_pictures_and_clips(bad, items, encoder, tmp_path):
    media = [item for item in items if item["file"].startswith(("image/", "video/"))]
    assert len(media) == 89
    with ShardWriter(tmp_path, "m") as writer:
        for number, item in enumerate(media):
            path = bad / item["file"]
            member = "0.jpg" if item["file"].startswith("image/") else "0.mp4"
            if path.is_file():  # the folder among them is met as a line below
                writer.write(f"{number}", {"caption": "a dog"}, {member: path.read_bytes()})
    keys, lost = train(encoder, tmp_path / "m-00000.tar")
    ends = {number: (str(number) in keys, int(str(number) in lost)) for number in range(89)}
    wrong = [
        (item["file"], lost.get(str(number)), item["expected"])
        for number, item in enumerate(media)
        if (bad / item["file"]).is_file() and not as_expected(item, *ends[number])
    ]
    assert wrong == []


def test_tars(bad, items, encoder, tmp_path):
    assert {item["file"] for item in items if item["file"][:4] == "tar/"} == {f"tar/{name}.tar" for name in TARS}
    for name, count in TARS.items():
        shutil.copy(bad / "tar" / f"{name}.tar", tmp_path)
        keys, lost = train(encoder, tmp_path / f"{name}.tar")
        assert len(keys) == count, (name, keys, lost)
        # of the names that point outside, absolute ones are keys like others, and ".." is refused
        expected = {"links_devices": 4, "path_traversal": 2}.get(name, 0 if name in NOTHING_LOST else 1)
        assert len(lost) == expected, (name, lost)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.tar" for name in TARS} | {".index"}


def test_json(bad, items, encoder, tmp_path):
    listed = [item for item in items if item["file"].startswith("json/")]
    assert len(listed) == 48
    shutil.copytree(bad / "image", tmp_path / "image")
    (tmp_path / "json").mkdir()
    wrong = []
    for item in listed:
        source = bad / item["file"]
        path = tmp_path / "json" / f"{source.stem}.jsonl"
        path.write_bytes(source.read_bytes())
        keys, lost = train(encoder, f"{path}::{tmp_path}/image")
        if source.suffix == ".jsonl":
            assert (len(keys), len(lost)) == LINES[source.stem], (source.stem, keys, lost)
        elif not as_expected(item, len(keys) == 1, len(lost)):
            wrong.append((item["file"], sorted(keys), lost, item["expected"]))
    assert wrong == []


def test_a_folder_named_like_a_picture_is_one_lost_line(bad, encoder, tmp_path):
    shutil.copytree(bad / "image" / "directory.jpg", tmp_path / "directory.jpg")
    path = tmp_path / "train.jsonl"
    path.write_text('{"image": "directory.jpg", "caption": "a dog"}\n{"text": "a dog"}\n')
    assert train(encoder, path) == ({"train/000001"}, {"train/000000": "missing_media"})
