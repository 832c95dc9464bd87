"""The inspection page: what it shows is what the batches hold, and it opens from disk alone."""

import json
import re
import shutil
import subprocess

import av
import numpy as np
import pytest
import torch
from tiny_shards import TinyData

from data_pipelines.cli import main
from data_pipelines.config import MediaConfig
from data_pipelines.encode.patches import clip_to_patches, image_to_patches
from data_pipelines.encode.sample import SampleEncoder
from data_pipelines.pack.collate import collate
from data_pipelines.report.collect import _shares
from data_pipelines.report.documents import DocumentWriter, Origin
from data_pipelines.report.pictures import save_strip, unpatch
from data_pipelines.report.site import Page, clear_site, write_site
from data_pipelines.samples import IGNORE_INDEX, Media, MediaRef, Message, Record, Region, Text
from data_pipelines.shards.writer import ShardWriter

from test_check import picture  # isort: skip


@pytest.fixture
def page(tiny: TinyData, tmp_path):
    words = ["inspect", f"{tiny.folder}/*.tar", "--tokenizer", f"{tiny.folder}/tokenizer", "--max-tokens", "192"]
    words += ["--max-pixels", "28224", "--max-samples", "9", "--packs", "2", "--out", f"{tmp_path}/page"]
    assert main([*words, "--processes", "1"]) == 0
    return tmp_path / "page"


def content_of(page):
    text = (page / "index.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)[1])


def chunk_of(page, number):
    text = (page / "data" / f"{number:05d}.js").read_text()
    return json.loads(re.fullmatch(rf"chunk\({number}, (.*)\);\n", text, re.DOTALL)[1])


def document(tokenizer, record, data, tmp_path, template="plain", **media):
    """The page's document of one record, and the encoded sample it was made from."""
    encoder = SampleEncoder(tokenizer, template, MediaConfig(**media), 4096)
    encoded, _ = encoder.encode(record, lambda name: data[name])
    encoder.close()
    batch = collate(0, [encoded], tokenizer.special, 4096)
    writer = DocumentWriter(tokenizer, tmp_path, "t")
    (shown,) = writer.documents(batch, [Origin("set", "a.tar", record, lambda name: data[name])])
    return shown, encoded, batch


def test_pictures_are_taken_back_out_of_the_patches_exactly():
    rng = np.random.default_rng(0)
    still = rng.integers(0, 255, (56, 84, 3), dtype=np.uint8)
    patches = image_to_patches(torch.from_numpy(still).permute(2, 0, 1))
    assert (unpatch(patches, (1, 4, 6))[0] == still).all()
    clip = rng.integers(0, 255, (4, 28, 56, 3), dtype=np.uint8)
    patches = clip_to_patches(torch.from_numpy(clip).permute(0, 3, 1, 2))
    assert (unpatch(patches, (2, 2, 4)) == clip).all()


def test_a_long_clip_is_drawn_in_even_pairs(tmp_path):
    strip = save_strip(np.zeros((200, 28, 28, 3), np.uint8), tmp_path / "a.webp")
    assert len(strip.shown) == 48
    assert strip.shown[:2] == (0, 1)
    assert strip.shown[-2:] == (198, 199)
    assert all(second == first + 1 for first, second in zip(strip.shown[::2], strip.shown[1::2], strict=True))


def test_tokens_supervision_and_positions_are_those_of_the_batch(tokenizer, tmp_path):
    """A picture of 84 x 56 pixels: 2 x 3 tokens. It begins at position 1, so the text after it goes on at 1 + 3 = 4."""
    question = Message("user", (MediaRef("0.png"), Text("Where is "), Region("0.png", "the cat"), Text("?")))
    box = Region("0.png", None, ((0.0, 0.0, 42.0, 28.0),))
    media = {"0.png": Media("0.png", "image", 84, 56)}
    record = Record("k", "referring", (question, Message("assistant", (box,))), media)
    shown, encoded, batch = document(tokenizer, record, {"0.png": picture(84, 56)}, tmp_path)
    (item,) = shown["media"]
    assert (item["t"], item["h"], item["w"]) == ([1], [1, 2], [1, 2, 3])
    assert (item["start"], item["tokens"], item["seen"]) == (1, 6, [84, 56])
    assert item["boxes"] == [{"points": ((0, 0), (500, 500)), "phrase": "the cat"}]
    pieces = shown["pieces"]
    assert pieces["text"][0] == "<|vision_start|>"
    assert pieces["kinds"][:3] == "sms"
    assert pieces["pos"][:3] == [0, 1, 4]  # the closing tag after positions 1 to 3 of the picture
    ids = [
        i for ids, kind in zip(pieces["ids"], pieces["kinds"], strict=True) for i in [ids] * (6 if kind == "m" else 1)
    ]
    assert ids == encoded.input_ids.tolist()
    learnt = [k.isupper() for k in pieces["kinds"] for _ in range(6 if k == "m" else 1)]
    assert learnt == (encoded.labels != IGNORE_INDEX).tolist()
    said = "".join(text for text, kind in zip(pieces["text"], pieces["kinds"], strict=True) if kind.isupper())
    assert said == "<|box_start|>(0,0),(500,500)<|box_end|><|endoftext|>"
    assert shown["supervised"] == batch.num_supervised


def test_characters_of_several_tokens_are_shown_whole(tokenizer, tmp_path):
    words = "世界 😀 ok"
    record = Record("k", "text", (Message("assistant", (Text(words),)),))
    shown, encoded, _ = document(tokenizer, record, {}, tmp_path)
    pieces = shown["pieces"]
    assert "".join(pieces["text"]) == words + "<|endoftext|>"
    assert "\ufffd" not in "".join(pieces["text"])
    flat = [i for ids in pieces["ids"] for i in ([ids] if isinstance(ids, int) else ids)]
    assert flat == encoded.input_ids.tolist()


def test_stills_and_clips_of_one_document_keep_their_places_and_times(tokenizer, tmp_path):
    """The batch holds stills before clips; the document has the clip first. 8 frames at 4 a second: 0 to 1.75 s."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 30 * shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = {"0.mp4": path.read_bytes(), "1.png": picture(56, 28)}
    parts = (MediaRef("0.mp4", nframes=4), MediaRef("1.png"), Text("What?"))
    media = {"0.mp4": Media("0.mp4", "video", 64, 48, 8, 4.0, 2.0), "1.png": Media("1.png", "image", 56, 28)}
    record = Record("k", "vqa", (Message("user", parts), Message("assistant", (Text("a dog"),))), media)
    shown, _, _ = document(tokenizer, record, data, tmp_path, video_min_pixels=784, min_pixels=784)
    clip, still = shown["media"]
    assert (clip["kind"], still["kind"]) == ("video", "image")
    assert clip["grid"][0] == 2
    assert clip["times"] == [0.0, 0.5, 1.25, 1.75]  # nearest to 0, 0.583, 1.167, 1.75
    assert still["seen"] == [56, 28]
    assert (tmp_path / clip["file"]).is_file()
    assert (tmp_path / still["file"]).is_file()


def test_the_page_shows_mixture_samples_packs_and_their_details(page):
    content = content_of(page)
    assert content["capacity"] == [192, 768]
    assert content["datasets"] == ["pictures", "texts"]
    assert [(row["dataset"], row["task"], row["samples"]) for row in content["mixture"]] == [
        ("pictures", "caption", 20),
        ("texts", "text", 15),
    ]
    alone = [entry for entry in content["documents"] if "pack" not in entry]
    assert len(alone) == 9
    assert {entry["dataset"] for entry in alone} == {"pictures", "texts"}
    for pack in content["packs"]:
        assert pack["tokens"] == sum(tokens for _, tokens, _, _, _ in pack["docs"]) <= 192
    for number, (_, tokens, _, key, place) in enumerate(content["packs"][0]["docs"]):
        shown = content["documents"][place]
        assert (shown["key"], shown["tokens"], shown["pack"], shown["item"]) == (key, tokens, 0, number)
    for entry in content["documents"]:
        detail = chunk_of(page, entry["chunk"])[entry["place"]]
        assert (detail["key"], detail["tokens"]) == (entry["key"], entry["tokens"])
        for item in detail["media"]:
            assert (page / item["file"]).is_file()
    counts = content["charts"]["lengths"]["counts"]
    assert [sum(series) for series in counts] == [20, 15]


def test_the_page_names_no_other_host_and_text_cannot_become_markup(tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>"
    page = Page(hostile, [hostile], [hostile], (16, 64), documents=[{"key": hostile, "excerpt": hostile}])
    text = write_site(page, tmp_path).read_text()
    assert hostile not in text
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)=["']?https?:""", text)
    assert content_of(tmp_path)["documents"][0]["key"] == hostile


def test_an_older_page_is_replaced_and_any_other_folder_refused(page, tmp_path):
    assert (page / "media").is_dir()
    clear_site(page)
    assert list(page.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        clear_site(tmp_path)
    assert (tmp_path / "notes.txt").is_file()


def test_a_sample_that_fails_is_listed_with_its_reason_and_the_others_are_shown(tiny, tmp_path):
    with ShardWriter(tmp_path / "shards", "mixed") as writer:
        facts = {"media": {"0.png": {"width": 60, "height": 40}}}
        writer.write("good", {"caption": "a red dog", **facts}, {"0.png": picture(60, 40)})
        writer.write("bad", {"caption": "a red dog", **facts}, {"0.png": picture(60, 40)[:300]})
    words = ["inspect", f"{tmp_path}/shards/*.tar", "--tokenizer", f"{tiny.folder}/tokenizer", "--packs", "1"]
    assert main([*words, "--out", f"{tmp_path}/page", "--processes", "1"]) == 0
    content = content_of(tmp_path / "page")
    assert {entry["key"] for entry in content["documents"]} == {"good"}
    assert {(key, reason) for _, key, reason, _ in content["problems"]} == {("bad", "corrupt_image")}


def test_rare_tasks_are_shown_whole_and_large_ones_share_the_rest():
    assert _shares([100, 2, 50], 12) == [5, 2, 5]
    assert _shares([3, 3], 100) == [3, 3]
    assert _shares([10, 10, 10], 2) == [1, 1, 0]
    assert _shares([], 5) == []


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_opens_the_page_from_disk_with_a_document(page):
    place = next(i for i, entry in enumerate(content_of(page)["documents"]) if entry["media"])
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"{(page / 'index.html').as_uri()}#d{place}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert "Uncaught" not in done.stderr
    assert "Refused" not in done.stderr
    assert done.stdout.count('class="card sample"') == 9
    assert done.stdout.count('class="packrow"') >= 2
    dialog = done.stdout.split("<dialog")[1]
    assert "&lt;|vision_start|&gt;" in dialog
    assert "learnt" in dialog
    assert 'class="grid-layer"' in dialog
