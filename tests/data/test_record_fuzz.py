"""Records from arbitrary JSON and bytes: a `Record` or a `RecordError` with the key, never anything else."""

import copy
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.decode.record import parse_record
from data_pipelines.errors import RecordError
from data_pipelines.samples import Record

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
NAMES = st.sampled_from(
    [
        "messages",
        "role",
        "content",
        "type",
        "text",
        "image",
        "images",
        "caption",
        "boxes",
        "box",
        "phrase",
        "quads",
        "quad",
        "media",
        "width",
        "task",
        "video",
        "fps",
        "0.jpg",
        "supervised",
        "label",
        "bbox",
    ]
)
SHAPED = st.recursive(
    LEAVES | st.sampled_from(["user", "assistant", "region", "0.jpg", "<image>"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=30,
)
GOOD = {
    "task": "vqa",
    "messages": [
        {
            "role": "user",
            "content": [{"type": "image", "image": "0.jpg", "max_pixels": 784}, {"type": "text", "text": "?"}],
        },
        {
            "role": "assistant",
            "content": [{"type": "region", "phrase": "x", "boxes": [[1, 2, 3, 4]], "quads": [[0] * 4 + [5] * 4]}],
        },
    ],
    "media": {
        "0.jpg": {"width": 10, "height": 10},
        "1.mp4": {"width": 9, "height": 9, "duration_s": 1, "fps": 2, "frames": 3},
    },
}


def assert_record_or_error(members):
    try:
        record = parse_record("shard/7", members)
    except RecordError as caught:
        error = caught
    else:
        assert isinstance(record, Record)
        assert any(message.role == "assistant" for message in record.messages)
        return
    assert error.key == "shard/7"
    assert str(error).isascii()


@given(VALUES | SHAPED)
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_record_or_an_error(value):
    data = json.dumps(value).encode()
    assert_record_or_error({"json": data, "0.jpg": None})
    assert_record_or_error({"json": data})


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_record_or_an_error(data, as_text):
    assert_record_or_error({"txt" if as_text else "json": data, "jpg": None})


def places(value, path=()):
    """Every place inside a JSON value, as paths."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from places(child, (*path, name))


@given(st.sampled_from([path for path in places(GOOD) if path]), VALUES)
@settings(max_examples=300, deadline=None)
def test_a_good_record_with_one_value_replaced_is_a_record_or_an_error(path, value):
    record = copy.deepcopy(GOOD)
    inner = record
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    assert_record_or_error({"json": json.dumps(record).encode(), "0.jpg": None, "1.mp4": None})


@given(st.integers(0, 400), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_a_good_record_with_one_byte_replaced_is_a_record_or_an_error(place, byte):
    data = bytearray(json.dumps(GOOD).encode())
    data[place % len(data)] = byte
    assert_record_or_error({"json": bytes(data), "0.jpg": None, "1.mp4": None})
