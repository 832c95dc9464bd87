"""Visual Genome, RefCOCO and Flickr30k Entities on small files in their published form."""

import pickle

import pytest

from data_pipelines.errors import RecordError
from data_pipelines.samples import Region, Text
from data_pipelines.sources.flickr30k import read_flickr30k
from data_pipelines.sources.refcoco import read_refcoco
from data_pipelines.sources.visual_genome import read_visual_genome


def parts(record):
    return [tuple(p for p in message.parts if not hasattr(p, "max_pixels")) for message in record.messages]


def box(*numbers):
    return (tuple(float(number) for number in numbers),)


def test_visual_genome_regions_ask_both_ways(tmp_path, make_picture, write_json, load):
    make_picture("VG_100K_2/17.jpg")
    regions = [
        {"region_id": 1, "x": 1, "y": 2, "width": 3, "height": 4, "phrase": "a red door "},
        {"region_id": 2, "x": 5, "y": 5, "width": 5, "height": 5, "phrase": "the sky"},
        {"region_id": 3, "x": 9, "y": 5, "width": 5, "height": 5, "phrase": "The sky"},
        {"region_id": 4, "x": 9, "y": 5, "width": 500, "height": 5, "phrase": "far out"},
        {"region_id": 5, "x": 9, "y": 5, "width": 5, "height": 5, "phrase": " "},
        {"region_id": 6, "y": 5, "width": 5, "height": 5, "phrase": "nowhere"},
    ]
    pictures = [{"id": 17, "regions": regions}, {"id": 18, "regions": []}, {"id": 17, "regions": 1}]
    path = write_json("region_descriptions.json", pictures)
    folders = [tmp_path / "VG_100K", tmp_path / "VG_100K_2"]
    imported = load(
        read_visual_genome(path, folders, write_json("d.json", [{"image_id": 17, "width": 40, "height": 20}]))
    )
    record = imported.only()
    assert (record.key, record.task) == ("0000017", "referring")
    door = box(1, 2, 4, 6)
    assert parts(record) == [
        (Region("0.jpg", "a red door"),),
        (Region("0.jpg", None, door),),
        (Region("0.jpg", "This", door), Text(" is")),
        (Text("a red door"),),
        (Region("0.jpg", "This", box(5, 5, 10, 10)), Text(" is")),
        (Text("the sky"),),
        (Region("0.jpg", "This", box(9, 5, 14, 10)), Text(" is")),
        (Text("The sky"),),
    ]
    assert imported.reasons() == [
        ("0000017: regions[4]", "empty_text"),
        ("0000017: regions[5]", "bad_box"),
        ("0000018", "missing_media"),
        ("0000017", "bad_field"),
        ("0000017", "bad_box"),
        ("0000017", "bad_box"),
    ]
    few = load(read_visual_genome(path, folders, max_regions=1)).only()
    assert len(few.messages) == 4


REFS = [
    {
        "ref_id": 0,
        "ann_id": 5,
        "image_id": 7,
        "split": "train",
        "sentences": [{"sent": "left dog"}, {"sent": "brown one"}],
    },
    {
        "ref_id": 1,
        "ann_id": 6,
        "image_id": 7,
        "split": "train",
        "sentences": [{"sent": "right dog"}, {"sent": "brown one"}],
    },
    {"ref_id": 2, "ann_id": 6, "image_id": 7, "split": "val", "sentences": [{"sent": "held out"}]},
    {"ref_id": 3, "ann_id": 99, "image_id": 7, "split": "train", "sentences": [{"sent": "x"}]},
]
INSTANCES = {
    "images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 40, "height": 20}],
    "annotations": [{"id": 5, "bbox": [1, 2, 3, 4]}, {"id": 6, "bbox": [20, 2, 3, 4]}],
}


def test_refcoco_in_the_authors_form(tmp_path, make_picture, write_json, load):
    make_picture("train2014/COCO_train2014_000000000007.jpg")
    refs, instances = write_json("refs.json", REFS), write_json("instances.json", INSTANCES)
    imported = load(read_refcoco(refs, instances, tmp_path / "train2014"))
    left, right = box(1, 2, 4, 6), box(20, 2, 23, 6)
    assert parts(imported.only()) == [
        (Region("0.jpg", "left dog"),),
        (Region("0.jpg", None, left),),
        (Region("0.jpg", "right dog"),),
        (Region("0.jpg", None, right),),
        (Region("0.jpg", "This", left), Text(" is")),
        (Text("left dog"),),
        (Region("0.jpg", "This", right), Text(" is")),
        (Text("right dog"),),
    ]
    assert imported.reasons() == [("refs.json:refs[3]", "no_media")]


def test_refcoco_entries_without_a_usable_id_are_told_where_they_are_needed(tmp_path, make_picture, write_json, load):
    make_picture("COCO_train2014_000000000007.jpg")
    broken = {"images": [{}, *INSTANCES["images"]], "annotations": [{"id": [6]}, INSTANCES["annotations"][0]]}
    refs = [*REFS, {"ann_id": [5], "image_id": 7, "split": "train", "sentences": [{"sent": "x"}]}]
    imported = load(read_refcoco(write_json("refs.json", refs), write_json("instances.json", broken), tmp_path))
    assert len(imported.only().messages) == 6  # "left dog", "brown one", and the first's box
    assert imported.reasons() == [(f"refs.json:refs[{i}]", "no_media") for i in (1, 3, 4)]


def test_refcoco_in_mdetrs_form(tmp_path, make_picture, write_json, load):
    make_picture("a.jpg")
    content = {
        "images": [
            {"id": n, "file_name": "a.jpg", "width": 40, "height": 20, "caption": c} for n, c in enumerate("xy")
        ],
        "annotations": [
            {"image_id": 0, "bbox": [1, 2, 3, 4], "original_id": 8},
            {"image_id": 1, "bbox": [1, 2, 3, 4], "original_id": 8},
            {"image_id": 5, "bbox": [1, 2, 3, 4]},
        ],
    }
    imported = load(read_refcoco(write_json("finetune.json", content), None, tmp_path))
    asked = [
        p[0].phrase for p in parts(imported.only()) if isinstance(p[0], Region) and p[0].phrase not in (None, "This")
    ]
    assert asked == ["x", "y"]
    assert len(imported.only().messages) == 6
    assert [reason for _, reason in imported.reasons()] == ["no_media"]


def test_a_pickle_is_never_opened(tmp_path, write_json):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(RecordError, match="not read"):
        list(read_refcoco(tmp_path / "refs(unc).p", write_json("i.json", INSTANCES), tmp_path))
    assert not (tmp_path / "ran").exists()


XML = """<annotation><filename>1.jpg</filename><size><width>40</width><height>20</height><depth>3</depth></size>
<object><name>1</name><name>2</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>4</xmax><ymax>6</ymax></bndbox></object>
<object><name>1</name><bndbox><xmin>9</xmin><ymin>2</ymin><xmax>12</xmax><ymax>6</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"""


@pytest.fixture
def flickr(tmp_path, make_picture, load):
    make_picture("images/1.jpg")
    for folder in ("Sentences", "Annotations"):
        (tmp_path / folder).mkdir()

    def run(sentences, xml=XML, **options):
        (tmp_path / "Sentences" / "1.txt").write_text(sentences)
        (tmp_path / "Annotations" / "1.xml").write_text(xml)
        return load(read_flickr30k(tmp_path / "images", tmp_path / "Sentences", tmp_path / "Annotations", **options))

    return run


def test_flickr_phrases_carry_their_boxes(flickr):
    imported = flickr(
        "[/EN#1/people Two men] with [/EN#2/bodyparts/people hats] in [/EN#3/scene a park] see "
        "[/EN#0/notvisual each other] .\n"
        "[/EN#2/clothing Hats] .\nNobody is here .\n"
    )
    both, hats = (*box(1, 2, 4, 6), *box(9, 2, 12, 6)), box(1, 2, 4, 6)
    assert parts(imported.only()) == [
        (Text("Generate the caption in English:"),),
        (Text("Nobody is here ."),),
        (Text("Generate the caption in English with grounding:"),),
        (
            Region("0.jpg", "Two men", both),
            Text(" with "),
            Region("0.jpg", "hats", hats),
            Text(" in a park see each other ."),
        ),
        (Text("Generate another caption in English with grounding:"),),
        (Region("0.jpg", "Hats", hats), Text(" .")),
    ]
    assert imported.only().task == "grounded_caption"


def test_flickr_ids_choose_and_broken_files_are_told(flickr, tmp_path):
    (tmp_path / "train.txt").write_text("1\n2\n")
    assert flickr("A man .", ids=tmp_path / "train.txt").reasons() == [("2", "missing_media")]
    bomb = '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'
    for xml in ("<annotation>", bomb, XML.replace("<xmin>1<", "<xmin>one<")):
        assert flickr("A man .", xml).reasons() == [("1", "bad_xml")]


def test_a_caption_that_loses_its_boxes_stays_a_caption(flickr):
    imported = flickr("[/EN#1/people Two men] .", XML.replace("<ymax>6<", "<ymax>600<"))
    assert parts(imported.only()) == [(Text("Generate the caption in English:"),), (Text("Two men ."),)]
    assert imported.reasons() == [("1", "bad_box"), ("1", "bad_box")]
