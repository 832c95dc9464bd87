"""COCO: hand-written annotations and the documents they become."""

import pytest

from data_pipelines.errors import RecordError
from data_pipelines.samples import MediaRef, Message, Region, Text
from data_pipelines.sources.coco import read_coco


def instances(*annotations, images=((7, "a.jpg", 40, 20),)):
    return {
        "images": [{"id": i, "file_name": name, "width": w, "height": h} for i, name, w, h in images],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "traffic light"}],
        "annotations": [
            {"id": number, "image_id": 7, "category_id": category, "bbox": list(box), "iscrowd": crowd}
            for number, (category, box, crowd) in enumerate(annotations)
        ],
    }


CAPTIONS = {
    "images": [{"id": 7, "file_name": "a.jpg", "width": 40, "height": 20}],
    "annotations": [{"id": 1, "image_id": 7, "caption": "A dog. "}, {"id": 2, "image_id": 7, "caption": "A pet"}],
}


def test_captions_objects_and_referring_share_one_document(tmp_path, make_picture, write_json, load):
    make_picture("images/a.jpg")
    boxes = write_json("i.json", instances((2, (1, 2, 3, 4), 0), (1, (5, 6, 7, 8), 0), (2, (9, 1, 2, 3), 0)))
    record = load(read_coco(tmp_path / "images", boxes, write_json("c.json", CAPTIONS))).only()
    assert (record.key, record.task) == ("000000000007", "grounded_caption")
    assert (record.media["0.jpg"].width, record.media["0.jpg"].height) == (40, 20)
    lights = ((1.0, 2.0, 4.0, 6.0), (9.0, 1.0, 11.0, 4.0))
    assert record.messages == (
        Message("user", (MediaRef("0.jpg", kind="image"), Text("Generate the caption in English:"))),
        Message("assistant", (Text("A dog."),)),
        Message("user", (Text("Generate another caption in English:"),)),
        Message("assistant", (Text("A pet"),)),
        Message("user", (Text("List the objects in the picture with grounding:"),)),
        Message(
            "assistant",
            (Region("0.jpg", "traffic light", lights), Text(", "), Region("0.jpg", "dog", ((5.0, 6.0, 12.0, 14.0),))),
        ),
        Message("user", (Region("0.jpg", "dog"),)),
        Message("assistant", (Region("0.jpg", None, ((5.0, 6.0, 12.0, 14.0),)),)),
    )


def test_crowds_are_neither_listed_nor_asked_for(tmp_path, make_picture, write_json, load):
    make_picture("images/a.jpg")
    boxes = write_json("i.json", instances((1, (5, 6, 7, 8), 0), (1, (0, 0, 40, 20), 1)))
    record = load(read_coco(tmp_path / "images", boxes, None)).only()
    assert [message.parts for message in record.messages[1:]] == [(Region("0.jpg", "dog", ((5.0, 6.0, 12.0, 14.0),)),)]


def test_broken_annotations_cost_themselves_only(tmp_path, make_picture, write_json, load):
    make_picture("images/a.jpg")
    content = instances((1, (5, 6, 7, 8), 0), (9, (1, 1, 2, 2), 0), (1, (1, 1, 500, 2), 0), (1, (3, 3, 0, 4), 0))
    content["annotations"].append({"id": 98, "image_id": 7, "category_id": [1], "bbox": [1, 1, 1, 1]})
    content["annotations"].append({"id": 99, "image_id": 8, "category_id": 1, "bbox": [1, 1, 1, 1]})
    content["images"].append({"id": 5, "file_name": "../i.json"})
    content["images"].append({"id": 6, "file_name": "gone.jpg"})
    imported = load(read_coco(tmp_path / "images", write_json("i.json", content), None))
    assert imported.only().messages[1].parts == (Region("0.jpg", "dog", ((5.0, 6.0, 12.0, 14.0),)),)
    assert imported.reasons() == [
        ("i.json:1", "bad_field"),
        ("i.json:98", "bad_field"),
        ("i.json:99", "no_media"),
        ("000000000005", "unsafe_path"),
        ("000000000006", "missing_media"),
        ("000000000007", "bad_box"),
        ("000000000007", "bad_box"),
    ]


def test_a_missing_or_foreign_file_is_one_clear_error(tmp_path, write_json):
    with pytest.raises(RecordError, match="cannot be read"):
        list(read_coco(tmp_path, tmp_path / "none.json", None))
    with pytest.raises(RecordError, match="images = None"):
        list(read_coco(tmp_path, write_json("x.json", {"annotations": []}), None))
