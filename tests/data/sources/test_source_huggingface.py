"""Hugging Face datasets by a mapping of columns, from local parquet and JSON files."""

import json

import datasets
import pytest
import yaml

from data_pipelines.cli import main
from data_pipelines.samples import MediaRef, Region, Text
from data_pipelines.sources.huggingface import read_dataset, read_mapping
from data_pipelines.sources.item import Expected
from tests.data.sources.conftest import picture_bytes, read_back

PICTURE = picture_bytes()


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Write rows as a parquet file; returns the arguments that load it again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()

    def write(columns, features, streaming=False):
        path = tmp_path / f"{len(list(tmp_path.glob('*.parquet')))}.parquet"
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(path))
        load = {"path": "parquet", "data_files": str(path), "split": "train", "streaming": streaming}
        return {**load, "cache_dir": str(tmp_path / "cache")}

    return write


IMAGE = datasets.Image()
TEXT = datasets.Value("string")


def image():
    return {"bytes": PICTURE, "path": "a.jpg"}


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_questions_boxes_and_labels(parquet, load, streaming):
    columns = {
        "image": [image(), image()],
        "caption": [["One.", "Two."], ["Three."]],
        "question": ["What?", "How?"],
        "answers": [["a", "b", "b"], []],
        "label": [1, 0],
        "objects": [{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["dog"]}, {"bbox": [], "category": []}],
        "similarity": [0.5, 0.25],
    }
    features = {
        "image": IMAGE,
        "caption": datasets.List(TEXT),
        "question": TEXT,
        "answers": datasets.List(TEXT),
        "label": datasets.ClassLabel(names=["cat", "sea_lion"]),
        "objects": {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(TEXT)},
        "similarity": datasets.Value("float32"),
    }
    mapping = {
        "load": parquet(columns, features, streaming),
        "media": [{"column": "image", "kind": "image"}],
        "captions": ["caption"],
        "question": "question",
        "answer": "answers",
        "label": "label",
        "boxes": {"column": "objects.bbox", "phrases": "objects.category", "format": "xywh"},
        "score": "similarity",
        "task": "mine",
    }
    imported = load(read_dataset(mapping, None))
    record = imported.only()
    assert (record.key, record.task) == ("00000000", "mine")
    box = ((1.0, 2.0, 4.0, 6.0),)
    assert [message.parts for message in record.messages if message.role == "assistant"] == [
        (Text("One."),),
        (Text("Two."),),
        (Region("0.jpg", "dog", box),),
        (Region("0.jpg", None, box),),
        (Text("sea lion"),),
        (Text("b"),),
    ]
    assert imported.media["00000000", "0.jpg"] == PICTURE
    assert imported.reasons() == [("00000001", "no_annotation")]  # no answer


def test_chats_with_lists_of_pictures(parquet, load):
    turns = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "both"}]
    features = {"images": datasets.List(IMAGE), "conversations": datasets.List({"from": TEXT, "value": TEXT})}
    loading = parquet({"images": [[image(), image()]], "conversations": [turns]}, features)
    mapping = {"load": loading, "media": [{"column": "images"}], "messages": "conversations"}
    record = load(read_dataset(mapping, None)).only()
    first, second = MediaRef("0.jpg", kind="image"), MediaRef("1.jpg", kind="image")
    assert record.messages[0].parts == (first, Text(" or "), second, Text("?"))


def test_texts_quads_and_relative_boxes(parquet, load):
    features = {"image": IMAGE, "box": datasets.List(datasets.Value("float32")), "name": TEXT}
    loading = parquet({"image": [image()], "box": [[0.5, 0.5, 0.5, 1.0]], "name": ["it"]}, features)
    boxes = {"column": "box", "phrases": "name", "format": "cxcywh", "relative": True}
    record = load(read_dataset({"load": loading, "media": [{"column": "image"}], "boxes": boxes}, None)).only()
    assert record.messages[1].parts == (Region("0.jpg", "it", ((10.0, 0.0, 30.0, 20.0),)),)
    loading = parquet({"text": ["Some words.", " "]}, {"text": TEXT})
    imported = load(read_dataset({"load": loading, "text": "text"}, None))
    assert imported.only().messages[0].parts == (Text("Some words."),)
    assert imported.reasons() == [("00000001", "empty_text")]


def test_pictures_by_path_need_a_media_root(tmp_path, make_picture, write_json, load):
    make_picture("media/a.jpg")
    path = write_json("rows.jsonl", [{"image": "a.jpg", "caption": "x"}, {"image": "../../etc/passwd", "caption": "x"}])
    loading = {"path": "json", "data_files": str(path), "split": "train", "cache_dir": str(tmp_path / "cache")}
    mapping = {"load": loading, "media": [{"column": "image"}], "captions": ["caption"]}
    assert [reason for _, reason in load(read_dataset(mapping, None)).reasons()] == ["missing_media"] * 2
    imported = load(read_dataset(mapping, tmp_path / "media"))
    assert list(imported.records) == ["00000000"]
    assert [reason for _, reason in imported.reasons()] == ["unsafe_path"]


def test_a_column_that_is_absent_is_told_per_row(parquet, load):
    loading = parquet({"a": ["x"]}, {"a": TEXT})
    assert load(read_dataset({"load": loading, "captions": ["b"]}, None)).reasons() == [("00000000", "bad_field")]


def test_the_command_reads_a_mapping(tmp_path, parquet):
    loading = parquet({"text": [f"text {i}" for i in range(5)]}, {"text": TEXT})
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"load": loading, "text": "text"}))
    out = tmp_path / "out"
    assert main(["import", "huggingface", str(tmp_path / "m.yaml"), "--limit", "3", "--out", str(out)]) == 0
    assert list(read_back(out).records) == ["00000000", "00000001", "00000002"]
    assert next(read_dataset({"load": loading, "text": "text"}, None)) == Expected(5)
    assert next(read_dataset({"load": loading, "text": "text"}, None, limit=3)) == Expected(3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"load": {"path": "x"}, "caption": "y"}, "unknown field 'caption'"),
        ({"captions": ["y"]}, "needs `load:`"),
        ({"load": {"path": "x", "trust_remote_code": True}}, "own code"),
    ],
)
def test_a_wrong_mapping_says_what_is_wrong(tmp_path, content, words):
    (tmp_path / "m.yaml").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        read_mapping(tmp_path / "m.yaml")


def test_chat_columns_of_structs_take_the_pictures_in_order(parquet, load):
    # The form of HuggingFaceH4/llava-instruct-mix-vsft: every field in every part, and an index.
    part = {"index": datasets.Value("int64"), "text": TEXT, "type": TEXT, "image_url": {"url": TEXT}, "image": TEXT}
    features = {
        "images": datasets.List(IMAGE),
        "messages": datasets.List({"role": TEXT, "content": datasets.List(part)}),
    }

    def filled(kind, **fields):
        return {**dict.fromkeys(part), "type": kind, **fields}

    asked = [
        filled("text", text="Is "),
        filled("image", index=0),
        filled("text", text=" like "),
        filled("image_url", image_url={"url": "http://x/y.jpg"}),
    ]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": [filled("text", text="no")]}]
    loading = parquet({"images": [[image(), image()]], "messages": [turns]}, features)
    imported = load(read_dataset({"load": loading, "media": [{"column": "images"}], "messages": "messages"}, None))
    assert [message.parts for message in imported.only().messages] == [
        (Text("Is "), MediaRef("0.jpg", kind="image"), Text(" like "), MediaRef("1.jpg", kind="image")),
        (Text("no"),),
    ]


def test_numbers_of_nested_classes_become_their_names(parquet, load):
    names = datasets.ClassLabel(names=["dog", "sea_lion"])
    places = datasets.List(datasets.List(datasets.Value("float32")))
    for objects in (
        {"bbox": places, "category": datasets.List(names)},
        datasets.List({"bbox": datasets.List(datasets.Value("float32")), "category": names}),
    ):
        value = {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [1]}
        if isinstance(objects, datasets.List):
            value = [{"bbox": [1.0, 2.0, 3.0, 4.0], "category": 1}]
        loading = parquet({"image": [image()], "objects": [value]}, {"image": IMAGE, "objects": objects})
        boxes = {"column": "objects.bbox", "phrases": "objects.category"}
        imported = load(read_dataset({"load": loading, "media": [{"column": "image"}], "boxes": boxes}, None))
        assert imported.only().messages[1].parts == (Region("0.jpg", "sea lion", ((1.0, 2.0, 3.0, 4.0),)),)


def test_absolute_paths_are_read_inside_the_media_root_alone(tmp_path, make_picture, load, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_picture("set/cat/a.jpg")
    make_picture("set/dog/b.jpg")
    loading = {"path": "imagefolder", "data_dir": str(tmp_path / "set"), "split": "train"}
    mapping = {
        "load": {**loading, "cache_dir": str(tmp_path / "cache")},
        "media": [{"column": "image"}],
        "label": "label",
    }
    imported = load(read_dataset(mapping, tmp_path / "set"))
    assert [record.messages[1].parts for record in imported.records.values()] == [(Text("cat"),), (Text("dog"),)]
    imported = load(read_dataset(mapping, tmp_path / "set" / "dog"))
    assert imported.reasons() == [("00000000", "unsafe_path")]
