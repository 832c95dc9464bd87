"""Pictures at import: original bytes, EXIF applied once to pixels and boxes, and paths that stay inside."""

import os

import numpy as np
import pytest

from data_pipelines.decode.image import decode_image, image_orientation
from data_pipelines.errors import MediaError
from data_pipelines.samples import Region
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.item import Annotations, Item, Labelled, MediaSource

# Where the box (4, 2, 10, 8) of the unturned 40 x 20 picture lies once its orientation is applied, by hand:
# mirrored x: 40 - 10 = 30, 40 - 4 = 36; flipped y: 20 - 8 = 12, 20 - 2 = 18; 5..8 swap the axes.
TURNED = {
    1: (4, 2, 10, 8),
    2: (30, 2, 36, 8),
    3: (30, 12, 36, 18),
    4: (4, 12, 10, 18),
    5: (2, 4, 8, 10),
    6: (12, 4, 18, 10),
    7: (12, 30, 18, 36),
    8: (2, 30, 8, 36),
}


def boxed(path, size=None, relative=False, box=(4.0, 2.0, 10.0, 8.0)):
    media = MediaSource(path.name, "image", path, size=size, relative=relative)
    return Item("k", Annotations(objects=(Labelled("thing", (box,)),)), (media,))


def only_box(imported):
    (region,) = [p for m in imported.only().messages for p in m.parts if isinstance(p, Region)]
    return region.boxes[0]


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_orientation_is_applied_to_pixels_and_boxes_once(make_picture, load, orientation, form):
    path = make_picture("a.img", orientation=orientation, form=form)
    imported = load([boxed(path)])
    assert only_box(imported) == TURNED[orientation]
    ((name, data),) = [(name, data) for (_, name), data in imported.media.items()]
    assert name == ("0.jpg" if form == "JPEG" else "0.png")
    assert image_orientation(data, "k") == 1
    facts = imported.only().media[name]
    assert (facts.width, facts.height) == ((20, 40) if orientation >= 5 else (40, 20))
    before = decode_image(path.read_bytes(), "k", 10**6).astype(int)
    after = decode_image(data, "k", 10**6).astype(int)
    assert np.abs(before - after).mean() < 4  # one more JPEG encoding at quality 95
    if orientation == 1:
        assert data == path.read_bytes()


def test_a_declared_displayed_size_says_that_boxes_are_turned_already(make_picture, load):
    path = make_picture("a.jpg", orientation=6)
    assert only_box(load([boxed(path, size=(20, 40))])) == (4, 2, 10, 8)
    assert only_box(load([boxed(path, size=(40, 20))])) == TURNED[6]


def test_a_declared_size_of_another_picture_is_refused(make_picture, load):
    imported = load([boxed(make_picture("a.jpg"), size=(80, 40))])
    assert imported.reasons() == [("k", "size_mismatch")]


def test_relative_boxes_count_in_fractions_of_the_displayed_picture(make_picture, load):
    path = make_picture("a.jpg", orientation=6)
    assert only_box(load([boxed(path, relative=True, box=(0.25, 0.5, 0.75, 1.0))])) == (5, 20, 15, 40)


def test_names_that_lead_outside_are_refused(tmp_path, make_picture):
    root = tmp_path / "root"
    inside = make_picture("root/sub/a.jpg")
    secret = make_picture("secret.jpg")
    (root / "link.jpg").symlink_to(secret)
    (root / "good.jpg").symlink_to(inside)
    os.mkfifo(root / "pipe.jpg")
    assert resolve_media("sub/a.jpg", root, None, "k") == inside
    assert resolve_media("good.jpg", root, None, "k") == inside
    assert resolve_media("../sub/a.jpg", root, root / "sub", "k") == inside
    outside = ["../secret.jpg", "link.jpg", str(secret), "http://x/a.jpg", "a\0.jpg", "~/a.jpg", "..\\secret.jpg"]
    for name in outside:
        with pytest.raises(MediaError) as caught:
            resolve_media(name, root, None, "k")
        assert caught.value.reason == "unsafe_path", name
    for name in ["gone.jpg", "sub", "pipe.jpg", "", None, 5, ["a"], "x" * 5000]:
        with pytest.raises(MediaError) as caught:
            resolve_media(name, root, None, "k")
        assert caught.value.reason == "missing_media", name


def test_cut_pictures_pass_unless_they_are_verified_and_strips_never_do(tmp_path, make_picture, load):
    whole = make_picture("a.jpg", width=400, height=300)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:-400])
    make_picture("strip.png", width=402, height=2, form="PNG")
    entries = [
        Item(name[:-4], Annotations(label="x"), (MediaSource(name, "image", tmp_path / name),))
        for name in ("a.jpg", "cut.jpg", "strip.png")
    ]
    assert load(entries).reasons() == [("strip", "bad_aspect")]
    assert load(entries, verify=True).reasons() == [("cut", "corrupt_image"), ("strip", "bad_aspect")]


def test_content_decides_what_a_file_is(tmp_path, make_picture, load):
    make_picture("named.png", form="WEBP")
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "zero.jpg").write_bytes(b"")
    entries = [
        Item(name, Annotations(label="x"), (MediaSource(file, "image", tmp_path / file),))
        for name, file in (("a", "named.png"), ("b", "page.jpg"), ("c", "zero.jpg"))
    ]
    imported = load(entries)
    assert set(imported.media) == {("a", "0.webp")}
    assert imported.reasons() == [("b", "not_an_image"), ("c", "empty_media")]


def test_a_clip_without_a_clips_name_is_named_by_content(tmp_path, load):
    from sources.conftest import clip_bytes

    files = {"a": ("clip", "mp4"), "b": ("clip.jpg", "mp4"), "c": ("clip.MKV", "mkv"), "d": ("clip.wmv", "wmv")}
    for name, _ in files.values():
        (tmp_path / name).write_bytes(clip_bytes(width=64, height=48))
    entries = [
        Item(key, Annotations(captions=("x",)), (MediaSource(name, "video", tmp_path / name),))
        for key, (name, _) in files.items()
    ]
    imported = load(entries)
    assert set(imported.media) == {(key, f"0.{suffix}") for key, (_, suffix) in files.items()}
